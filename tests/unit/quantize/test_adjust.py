"""Changes to the float graph: exact where they must be, and better in int8 where they claim to be."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from compressor.profile import QuantizationRules
from compressor.quantize import Variant, ort
from compressor.quantize.adjust import quantize_best
from compressor.quantize.adjust.bias import correct_bias, dequantized_weights
from compressor.quantize.adjust.equalise import equalise
from compressor.quantize.adjust.smooth import smooth
from compressor.quantize.prepare import prepare
from compressor.quantize.ranges import collect
from compressor.quantize.watch import output_sqnr_db, sqnr_db, watch
from tests import onnx_models

CPU = QuantizationRules()
PER_TENSOR = Variant("int8-static-per-tensor-ort", "onnxruntime", "static", False)


def chain(spread: float, seed: int = 0) -> onnx.ModelProto:
    """Conv-Relu-depthwise-Relu-MaxPool-Conv-mean-Gemm whose first layer has channels ``spread`` apart in size."""
    b = onnx_models.Builder(seed)
    scales = np.geomspace(1, spread, 16).astype(np.float32)
    first = b.rng.standard_normal((16, 3, 3, 3)).astype(np.float32) * 0.3 * scales[:, None, None, None]
    x = b.op("Conv", ["image", b.weight("w0", first), b.weight("b0", 0.1 * scales)], "c0", pads=[1, 1, 1, 1])
    x = b.op("Relu", [x], "r0")
    x = b.op("Conv", [x, b.normal("w1", 16, 1, 3, 3), b.normal("b1", 16)], "c1", pads=[1, 1, 1, 1], group=16)
    x = b.op("MaxPool", [b.op("Relu", [x], "r1")], "p1", kernel_shape=[2, 2], strides=[2, 2])
    second = b.rng.standard_normal((32, 16, 1, 1)).astype(np.float32) * 0.3 / scales[None, :, None, None]
    x = b.op("Relu", [b.op("Conv", [x, b.weight("w2", second), b.normal("b2", 32)], "c2")], "r2")
    x = b.op("Flatten", [b.op("GlobalAveragePool", [x], "g")], "f")
    b.op("Gemm", [x, b.normal("w3", 10, 32), b.normal("b3", 10)], "logits", transB=1)
    return b.model([("image", 1, ["batch", 3, 16, 16])], [("logits", 1, ["batch", 10])])


def images():
    return iter([onnx_models.images(16)])


def tokens():
    return iter([onnx_models.tokens(8)])


def copy(model):
    made = onnx.ModelProto()
    made.CopyFrom(model)
    return made


def weight(model, name):
    return next(numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name == name)


def test_sqnr_is_the_ratio_of_energies_in_decibels():
    assert sqnr_db(np.full(4, 10.0), np.full(4, 9.0)) == pytest.approx(20.0)
    assert sqnr_db(np.ones(3), np.ones(3)) == 200
    assert sqnr_db(np.zeros(3), np.ones(3)) == -200


def test_equalisation_keeps_the_float_function_and_evens_channels_out():
    model = prepare(chain(30.0))
    changed = copy(model)
    facts = equalise(changed)
    assert {fact.action for fact in facts} == {"equalised"}
    assert {fact.layer for fact in facts} >= {"c0_Conv", "c1_Conv"}
    assert output_sqnr_db(model, changed, images) > 100
    before, after = (np.abs(weight(item, "w0")).max(axis=(1, 2, 3)) for item in (model, changed))
    assert after.max() / after.min() < before.max() / before.min() / 4


def test_equalisation_leaves_branches_and_clipped_activations_alone():
    b = onnx_models.Builder()
    x = b.op("Conv", ["image", b.normal("w0", 8, 3, 1, 1)], "c0")
    y = b.op("Conv", [x, b.normal("w1", 8, 8, 1, 1)], "c1")
    x = b.op("Add", [x, y], "sum")
    x = b.op("Conv", [x, b.normal("w2", 8, 8, 1, 1)], "c2")
    x = b.op("Clip", [x, b.weight("low", np.array(0, np.float32)), b.weight("high", np.array(6, np.float32))], "six")
    b.op("Conv", [x, b.normal("w3", 4, 8, 1, 1)], "y")
    model = b.model([("image", 1, ["batch", 3, 16, 16])], [("y", 1, ["batch", 4, 16, 16])])
    assert equalise(copy(model)) == ()


def test_equalisation_makes_a_per_tensor_file_better():
    model = prepare(chain(30.0))
    even = Variant("q", "onnxruntime", "static", False, corrections="auto")
    plain, best = (quantize_best(model, variant, CPU, images, {}) for variant in (PER_TENSOR, even))
    assert "equalise" in best.corrections
    first, second = (output_sqnr_db(model, item.result, images) for item in (plain, best))
    assert second > first + 3
    assert best.sqnr_db == pytest.approx(second, abs=0.01)
    assert plain.tried == {}


def test_smoothing_folds_into_a_norm_exactly_and_helps(tmp_path):
    b = onnx_models.Builder(5)
    scale = np.ones(32, np.float32)
    scale[3] = 60.0  # one outlier channel
    x = b.op("LayerNormalization", ["x", b.weight("g", scale), b.weight("h", np.zeros(32, np.float32))], "ln")
    left = b.op("MatMul", [x, b.normal("w1", 32, 16)], "left")
    right = b.op("MatMul", [x, b.normal("w2", 32, 16)], "right")
    b.op("Add", [left, right], "y")
    model = prepare(b.model([("x", 1, ["batch", 32])], [("y", 1, ["batch", 16])]))
    data = {"x": np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)}
    smoothed = copy(model)
    facts = smooth(smoothed, lambda: iter([data]))
    assert [fact.layer for fact in facts] == ["left_MatMul", "right_MatMul"]
    assert output_sqnr_db(model, smoothed, lambda: iter([data])) > 100
    variant = Variant("q", "onnxruntime", "static", True, ("MatMul",))
    noise = []
    for item in (model, smoothed):
        ranges = collect(item, lambda: iter([data]), "minmax")
        noise.append(output_sqnr_db(model, ort.quantize_static(item, variant, CPU, ranges, {}), lambda: iter([data])))
    assert noise[1] > noise[0] + 3


def test_smoothing_passes_through_attention_and_leaves_residuals_alone(tmp_path):
    model = prepare(onnx.load(onnx_models.transformer(tmp_path / "m.onnx")))
    smoothed = copy(model)
    facts = smooth(smoothed, tokens)
    assert {fact.layer for fact in facts} == {"o1_MatMul", "f2_MatMul"}  # behind the attention, behind the ReLU
    assert output_sqnr_db(model, smoothed, tokens) > 90


def test_bias_correction_takes_the_mean_error_off():
    model = prepare(chain(1.0, seed=4))
    rounded = copy(model)  # the same graph with coarse weights, as a quantize-dequantize file computes
    variant = Variant("q", "onnxruntime", "static", False)
    quantized = ort.quantize_static(model, variant, CPU, collect(model, images, "minmax"), {})
    assert set(dequantized_weights(quantized)) == {"c0_Conv", "c1_Conv", "c2_Conv", "logits_Gemm"}
    corrected = copy(model)
    facts = correct_bias(corrected, quantized, images)
    assert {fact.action for fact in facts} == {"bias-corrected"}
    values = dequantized_weights(quantized)

    def means(source, bias_from):
        made = copy(source)
        for tensor in made.graph.initializer:
            if tensor.name in ("b0",):
                tensor.CopyFrom(numpy_helper.from_array(weight(bias_from, tensor.name), tensor.name))
            if tensor.name == "w0":
                tensor.CopyFrom(numpy_helper.from_array(values["c0_Conv"], "w0"))
        return dict(watch(made, {"c0"})(next(images())))["c0"].mean(axis=(0, 2, 3))

    wanted = dict(watch(model, {"c0"})(next(images())))["c0"].mean(axis=(0, 2, 3))
    before, after = (np.abs(means(rounded, item) - wanted).max() for item in (model, corrected))
    assert after < before / 3


def test_auto_never_keeps_what_does_not_help(tmp_path):
    model = prepare(onnx.load(onnx_models.cnn(tmp_path / "m.onnx")))
    variant = Variant("q", "onnxruntime", "static", False, calibration="auto", corrections="auto")
    best = quantize_best(model, variant, CPU, images, {})
    assert set(best.tried) >= {"minmax", "percentile", "entropy", "mse"}
    assert best.sqnr_db == max(best.tried.values())
