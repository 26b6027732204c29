"""Optimised graphs: fewer nodes, standard operators, the same numbers."""

import numpy as np
import onnx
import pytest

from compressor.errors import StageError
from compressor.export.facts import describe
from compressor.export.optimise import optimise
from compressor.export.verify import verify
from compressor.types import file_digest
from tests import onnx_models


@pytest.mark.parametrize("as_constants", [False, True])
def test_batch_norm_identity_and_mean_go_and_the_numbers_stay(tmp_path, as_constants):
    source = onnx_models.cnn(tmp_path / "m.onnx", as_constants=as_constants)
    before = file_digest(source)
    facts = optimise(source, tmp_path / "o.onnx")
    found = describe(tmp_path / "o.onnx")
    assert set(found.operators) == {"Add", "Conv", "Flatten", "Gemm", "GlobalAveragePool", "MaxPool", "Relu"}
    assert {fact.layer for fact in facts} >= {"BatchNormalization", "Identity", "ReduceMean"}
    assert found.metadata == {"author": "someone", "labels": "a,b"}
    assert found.inputs == describe(source).inputs
    assert found.custom_domains == ()
    assert file_digest(source) == before
    batch = onnx_models.images(5)
    rows = verify(lambda x: {"logits": onnx_models.run(source, dict(x))}, tmp_path / "o.onnx", [batch])
    assert rows[0].passed
    assert rows[0].samples == 5 + 1 + 3


def test_the_result_has_no_stale_shapes_no_unused_weights_and_the_same_bytes_again(tmp_path):
    source = onnx_models.cnn(tmp_path / "m.onnx")
    optimise(source, tmp_path / "a.onnx")
    optimise(source, tmp_path / "b.onnx")
    optimise(tmp_path / "a.onnx", tmp_path / "c.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    model = onnx.load(tmp_path / "a.onnx")
    read = {name for node in model.graph.node for name in node.input}
    assert not model.graph.value_info
    assert all(tensor.name in read for tensor in model.graph.initializer)
    assert [entry.domain for entry in model.opset_import] == [""]
    assert describe(tmp_path / "c.onnx").operators == describe(tmp_path / "a.onnx").operators


def test_a_transformer_keeps_matmul_and_add_apart_and_its_dynamic_sequence(tmp_path):
    source = onnx_models.transformer(tmp_path / "m.onnx")
    optimise(source, tmp_path / "o.onnx")
    assert describe(tmp_path / "o.onnx").operators["MatMul"] == 8
    rows = verify(lambda x: {"logits": onnx_models.run(source, dict(x))}, tmp_path / "o.onnx", [onnx_models.tokens(4)])
    assert rows[0].passed
    assert rows[0].samples == 4 + 1 + 3 + 4  # as given, one, three, and half the sequence


def test_weights_that_are_listed_as_inputs_are_constants(tmp_path):
    model = onnx.load(onnx_models.cnn(tmp_path / "m.onnx"))
    for tensor in model.graph.initializer:
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, 1, tensor.dims))
    model.ir_version = 3
    (tmp_path / "old.onnx").write_bytes(model.SerializeToString())
    optimise(tmp_path / "old.onnx", tmp_path / "o.onnx")
    assert "BatchNormalization" not in describe(tmp_path / "o.onnx").operators
    inputs = onnx_models.images(2)
    assert np.allclose(
        onnx_models.run(tmp_path / "o.onnx", inputs), onnx_models.run(tmp_path / "m.onnx", inputs), atol=1e-5
    )


def test_a_graph_the_runtime_cannot_load_is_a_stage_error(tmp_path):
    model = onnx.load(onnx_models.cnn(tmp_path / "m.onnx"))
    model.graph.node[-1].input[1] = "w0"
    (tmp_path / "bad.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(StageError, match=r"bad\.onnx"):
        optimise(tmp_path / "bad.onnx", tmp_path / "o.onnx")
    assert not (tmp_path / "o.onnx").exists()
