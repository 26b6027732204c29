"""Whole int8 graphs of transformers: masks stay float, biases stay with their product, and the answers hold."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

from compressor.models.onnx_graph import read_model
from compressor.profile import QuantizationRules
from compressor.quantize.integer import masked_scores
from targets.static_graph import read_static
from targets.tflite import convert
from tools import operator_groups
from tools.operator_groups import samples
from tools.target_rules import emitted

SMALL = QuantizationRules(activation="int8", integer_only=True, dynamic=False)


def masked(s: operator_groups.Sketch) -> str:
    """Tokens below 10 are masked with -1e4, as BERT exports do; a biased product after the attention."""
    x = s.node("Gather", s.weight(50, 16), "x")
    seen = s.node("Clip", s.node("Sub", s.node("Cast", "x", to=1), s.constant(np.float32(9))), *limits(s))
    away = s.node("Mul", s.node("Sub", s.constant(np.float32(1)), seen), s.constant(np.float32(-1e4)))
    away = s.node("Unsqueeze", away, s.constant(np.asarray([1], np.int64)))
    query, key, value = (s.node("MatMul", x, s.weight(16, 16)) for _ in range(3))
    scores = s.node("MatMul", query, s.node("Transpose", key, perm=[0, 2, 1]))
    share = s.node("Softmax", s.node("Add", s.node("Mul", scores, s.constant(np.float32(0.25))), away), axis=-1)
    out = s.node("Add", s.node("MatMul", s.node("MatMul", share, value), s.weight(16, 16)), s.weight(16))
    return s.node("MatMul", s.node("Relu", out), s.weight(16, 4))


def limits(s: operator_groups.Sketch) -> tuple[str, str]:
    return s.constant(np.float32(0)), s.constant(np.float32(1))


@pytest.fixture
def net(monkeypatch) -> str:
    monkeypatch.setitem(operator_groups.NETS, "masked", (masked, (6,), "int64"))
    return "masked"


def test_a_mask_does_not_drown_the_scores_and_a_bias_is_not_rounded_twice(net, tmp_path):
    artifact = emitted(net, SMALL, tmp_path)
    source, made = read_model(tmp_path / "float.onnx"), read_model(artifact.path)
    kept = masked_scores(source)
    assert {"softmax_14", "add_13", "mul_12", "clip_3"} <= set(kept)
    rounded = {
        node.name.removesuffix("_QuantizeLinear") for node in made.graph.node if node.op_type == "QuantizeLinear"
    }
    assert not rounded & {"add_13", "mul_5", "matmul_16"}, "neither masked scores nor a product before its bias"
    assert "matmul_11" in rounded
    assert rounded & {"add_17", "relu_18"}, "the sum is, with or behind its activation"
    inputs = samples(net, 32)
    wanted, found = (
        onnxruntime.InferenceSession(str(path)).run(None, inputs)[0]
        for path in (tmp_path / "float.onnx", artifact.path)
    )
    assert np.abs(found - wanted).max() < 0.06 * np.abs(wanted).max()


def test_its_products_are_int8_kernels_with_their_bias(net, tmp_path):
    artifact = emitted(net, SMALL, tmp_path)
    made = convert(read_static(artifact.path, {"x": (1, 6)}), int8_interface=True)
    assert made.coverage.quantized == made.coverage.total == 7
    names = [operation.operator for operation in made.operations]
    assert (names.count("FULLY_CONNECTED"), names.count("BATCH_MATMUL")) == (5, 2)
    assert "int64" not in {tensor.type for operation in made.operations for tensor in operation.inputs}


def test_a_convolutional_net_with_gelu_and_hard_swish_has_no_float_left(tmp_path):
    artifact = emitted("cnn", SMALL, tmp_path)
    made = convert(read_static(artifact.path, {"x": (1, 4, 8, 8)}), int8_interface=True)
    assert {"GELU", "HARD_SWISH", "LOGISTIC"} <= {operation.operator for operation in made.operations}
    assert "float32" not in {
        tensor.type for operation in made.operations for tensor in (*operation.inputs, *operation.outputs)
    }
