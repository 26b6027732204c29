"""The lint and the emulated saturation."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from compressor.errors import StageError
from compressor.profile import HardwareProfile, QuantizationRules, load_profile
from compressor.quantize import Variant, quantize
from compressor.quantize.checks.lint import lint
from compressor.quantize.checks.saturation import pair_sums, saturation
from tests import onnx_models
from tools.target_rules import emitted

CPU = QuantizationRules()
TENSORRT = QuantizationRules(
    activation="int8", symmetric_activation=True, quantize_bias=False, weighted_only=True, dynamic=False
)
PER_CHANNEL = Variant("q", "onnxruntime", "static")
AVX2 = {"processor": "x", "architecture": "x86_64", "features": ["avx2", "fma"]}


@pytest.fixture(scope="module")
def cnn(tmp_path_factory):
    return onnx_models.artifact(onnx_models.cnn(tmp_path_factory.mktemp("cnn") / "m.onnx"))


def images():
    return iter([onnx_models.images(12)])


def test_every_file_passes_the_rules_it_was_made_for_and_the_lint_names_nodes_otherwise(cnn, tmp_path):
    made = onnx.load(quantize(cnn, PER_CHANNEL, CPU, images, tmp_path / "q.onnx").path)
    assert lint(made, CPU) == ()
    assert lint(onnx.load(cnn.path), TENSORRT) == ()
    found = lint(made, TENSORRT)
    told = "\n".join(map(str, found))
    assert "int32 bias" in told
    assert "to uint8, the target takes int8" in told
    names = {node.name for node in made.graph.node}
    assert {problem.where.strip("`") for problem in found} <= names
    assert any("10 scales" in p.what for p in lint(made, QuantizationRules(per_channel=False)))
    assert any("takes no int8" in p.what for p in lint(made, QuantizationRules(int8=False)))
    assert lint(made, QuantizationRules(opset=20)) == (), "nothing in it changes with a later opset"
    assert any("127" in p.what for p in lint(made, QuantizationRules(reduce_range=True)))
    strict = Variant("q", "onnxruntime", "static", True, ("Conv", "Gemm"))
    assert lint(onnx.load(quantize(cnn, strict, TENSORRT, images, tmp_path / "t.onnx").path), TENSORRT) == ()


def test_a_gelu_of_an_older_opset_and_a_stored_scalar_are_named(tmp_path):
    net = emitted("transformer", QuantizationRules(whole_graph=True), tmp_path)
    made = onnx.load(net.path)
    (found,) = lint(made, QuantizationRules(opset=20))
    assert next(node for node in made.graph.node if node.op_type == "Erf").name in found.where
    signed = QuantizationRules(activation="int8", whole_graph=True)
    scalars = onnx.load(emitted("transformer", signed, tmp_path).path)
    told = [problem for problem in lint(scalars, TENSORRT) if "stored scalar" in problem.what]
    assert [problem.where for problem in told] == ["`w6_DequantizeLinear`"]
    vectors = emitted("transformer", signed.model_copy(update={"symmetric_activation": True}), tmp_path)
    assert not [problem for problem in lint(onnx.load(vectors.path), TENSORRT) if "scalar" in problem.what]


def test_what_the_target_would_refuse_is_not_written(cnn, tmp_path):
    rules = QuantizationRules(per_channel=False)
    with pytest.raises(StageError, match=r"would refuse `q`: `.*16 scales"):
        quantize(cnn, PER_CHANNEL, rules, images, tmp_path / "q.onnx")
    assert not (tmp_path / "q.onnx").exists()


@pytest.mark.parametrize("activation", ["uint16", "int16"])
def test_16_bit_activations_are_more_accurate_and_run(cnn, tmp_path, activation):
    rules = QuantizationRules(activation=activation, symmetric_activation=activation == "int16")
    variant = Variant("q", "onnxruntime", "static", True)
    fine = quantize(cnn, variant, rules, images, tmp_path / "fine.onnx")
    coarse = quantize(cnn, variant, CPU, images, tmp_path / "coarse.onnx")
    inputs = onnx_models.images(20, 7)
    wanted = onnx_models.run(cnn.path, inputs)
    error = [float(np.abs(onnx_models.run(item.path, inputs) - wanted).max()) for item in (fine, coarse)]
    assert error[0] < error[1]
    assert lint(onnx.load(fine.path), rules) == ()


def test_saturation_of_known_pairs():
    exact, held, count = pair_sums(
        np.array([[255, 255, 1, 1, 200]], np.uint8), np.array([[127, 127, 1, -1, 5]], np.int8)
    )
    assert (int(exact[0, 0]), int(held[0, 0]), count) == (64770 + 1000, 32767 + 1000, 1)
    exact, held, count = pair_sums(np.array([[255, 255]], np.uint8), np.array([[-128, -128]], np.int8))
    assert (int(exact[0, 0]), int(held[0, 0]), count) == (-65280, -32768, 1)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_seven_bit_weights_never_saturate(seed):
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 256, (3, 9)).astype(np.uint8)
    columns = rng.integers(-64, 65, (4, 9)).astype(np.int8)
    exact, held, count = pair_sums(rows, columns)
    assert count == 0
    np.testing.assert_array_equal(exact, held)
    np.testing.assert_array_equal(exact, rows.astype(int) @ columns.T.astype(int))


def loud(path, weight=1.0):
    """One Conv whose weights are all equal and whose inputs are all large: every pair of its sums saturates."""
    kernel = numpy_helper.from_array(np.full((4, 2, 3, 3), weight, np.float32), "w")
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="loud", pads=[1, 1, 1, 1])
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", 1, ["batch", 2, 8, 8])],
        [helper.make_tensor_value_info("y", 1, ["batch", 4, 8, 8])],
        [kernel],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return onnx_models.artifact(path)


def bright():
    return iter([{"x": np.random.default_rng(0).uniform(0.9, 1.0, (4, 2, 8, 8)).astype(np.float32)}])


def test_a_layer_that_saturates_is_named_and_seven_bits_cure_it(tmp_path):
    source = loud(tmp_path / "m.onnx")
    rules = QuantizationRules(saturates=True)
    with pytest.raises(StageError, match=r"`loud` would be wrong on this processor.*saturate without VNNI"):
        quantize(source, PER_CHANNEL, rules, bright, tmp_path / "q.onnx")
    full = quantize(source, PER_CHANNEL, CPU, bright, tmp_path / "full.onnx")
    (found,) = saturation(onnx.load(full.path), bright)
    assert found.layer == "loud"
    assert found.share > 0.5
    assert found.sqnr_db < 10
    reduced = QuantizationRules(saturates=True, reduce_range=True)
    made = quantize(source, PER_CHANNEL, reduced, bright, tmp_path / "r.onnx")
    assert not [fact for fact in made.facts if fact.action == "saturates"]


def test_every_quantized_layer_is_emulated(cnn, tmp_path):
    made = onnx.load(quantize(cnn, PER_CHANNEL, CPU, images, tmp_path / "q.onnx").path)
    for layer in saturation(made, images):
        assert 0 <= layer.share < 1
        assert layer.sqnr_db > 10
    assert {layer.layer for layer in saturation(made, images)} == {"c0_Conv", "c1_Conv", "c2_Conv", "logits_Gemm"}


def test_profiles_without_vnni_are_found_by_their_features():
    base = {"name": "p", "title": "p", "target": "onnxruntime-cpu"}
    old = HardwareProfile.model_validate({**base, "compute": AVX2}).quantization
    assert (old.saturates, old.reduce_range) == (True, True)
    new = {**AVX2, "features": ["avx2", "avx512_vnni"]}
    assert not HardwareProfile.model_validate({**base, "compute": new}).quantization.saturates
    stated = HardwareProfile.model_validate({**base, "compute": AVX2, "quantization": {"reduce_range": False}})
    assert stated.quantization.saturates
    assert not stated.quantization.reduce_range
    assert not load_profile("laptop-x86-vnni").quantization.saturates
    assert not load_profile("raspberry-pi-5").quantization.saturates
