"""Facts of ONNX files, and bad files."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from compressor.errors import ConfigError
from compressor.export.facts import describe
from tests import onnx_models


@pytest.mark.parametrize("as_constants", [False, True])
def test_counts_of_a_cnn_are_exact_wherever_the_weights_stand(tmp_path, as_constants):
    facts = describe(onnx_models.cnn(tmp_path / "m.onnx", as_constants=as_constants))
    assert facts.parameters == (16 * 27) + 4 * 16 + (16 * 144 + 16) + (32 * 144 + 32) + (320 + 10)
    assert facts.macs == 256 * (16 * 27 + 16 * 144) + 64 * 32 * 144 + 320
    assert facts.operators["Conv"] == 3
    assert [node.operator for node in facts.quantizable] == ["Conv", "Conv", "Conv", "Gemm"]
    assert not facts.quantized
    assert not facts.has_attention
    assert facts.inputs[0].shape == ("batch", 3, 16, 16)
    assert facts.metadata == {"author": "someone", "labels": "a,b"}


def test_masked_and_plain_attention_are_told_apart(tmp_path):
    masked = describe(onnx_models.transformer(tmp_path / "a.onnx"))
    plain = describe(onnx_models.transformer(tmp_path / "b.onnx", masked=False))
    assert (masked.has_attention, masked.has_masked_attention) == (True, True)
    assert (plain.has_attention, plain.has_masked_attention) == (True, False)
    assert len(masked.weighted) - len(masked.quantizable) == 2  # scores and their use have two computed operands
    one, width = 128, 64
    assert masked.macs == one * width * width * 4 + 2 * one * one * width + 2 * one * width * 4 * width + 4 * width


def test_weights_in_a_branch_and_after_data_dependent_shapes_are_seen(tmp_path):
    weight = onnx.numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    branch = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["t"], name="inner")],
        "then",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["e"])],
        "else",
        [],
        [helper.make_tensor_value_info("e", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("If", ["c"], ["y"], name="choice", then_branch=branch, else_branch=other),
        helper.make_node("NonZero", ["x"], ["n"], name="where"),
        helper.make_node("Cast", ["n"], ["nf"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["nf"], ["nt"]),
        helper.make_node("MatMul", ["nt", "w2"], ["z"], name="late"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 4]),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None), helper.make_tensor_value_info("z", 1, None)],
        [weight, onnx.numpy_helper.from_array(np.ones((2, 3), np.float32), "w2")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    facts = describe(tmp_path / "m.onnx")
    found = {node.name: (node.inside, node.after) for node in facts.weighted}
    assert found == {"inner": ("choice", ""), "late": ("", "where")}
    assert facts.has_control_flow
    assert facts.quantizable == ()


def test_a_truncated_file_a_missing_file_and_a_text_file_are_bad_input(tmp_path):
    path = onnx_models.cnn(tmp_path / "m.onnx")
    data = path.read_bytes()
    for name, content in (("cut.onnx", data[: len(data) // 2]), ("text.onnx", b"hello"), ("empty.onnx", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            describe(tmp_path / name)
        assert caught.value.exit_code == 2
    with pytest.raises(ConfigError, match="does not exist"):
        describe(tmp_path / "none.onnx")


def test_an_unknown_operator_is_named_with_its_node(tmp_path):
    node = helper.make_node("Frobnicate", ["x"], ["y"], name="odd")
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    onnx.save(helper.make_model(helper.make_graph([node], "g", value[:1], value[1:])), tmp_path / "m.onnx")
    with pytest.raises(ConfigError, match=r"node `odd`: operator `Frobnicate`"):
        describe(tmp_path / "m.onnx")


def test_external_data_outside_the_folder_is_refused(tmp_path):
    folder = tmp_path / "inside"
    folder.mkdir()
    model = onnx.load(onnx_models.cnn(tmp_path / "m.onnx"))
    onnx.save(model, folder / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    assert describe(folder / "m.onnx").parameters == describe(tmp_path / "m.onnx").parameters
    (folder / "w.bin").rename(tmp_path / "w.bin")
    with pytest.raises(ConfigError, match="does not exist"):
        describe(folder / "m.onnx")
    moved = onnx.load(folder / "m.onnx", load_external_data=False)
    for tensor in moved.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../w.bin"
    (folder / "m.onnx").write_bytes(moved.SerializeToString())
    with pytest.raises(ConfigError, match="outside the model's folder"):
        describe(folder / "m.onnx")
