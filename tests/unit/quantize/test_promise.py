"""Sensitivity per layer, and layers put back to float until a promise holds."""

import numpy as np
import onnx
import pytest

from compressor.errors import StageError
from compressor.profile import QuantizationRules
from compressor.quantize import Variant, quantize
from compressor.quantize.calibration import choose
from compressor.quantize.promise import Sensitivity, restore
from compressor.quantize.promise.restore import order, rank
from compressor.quantize.promise.sensitivity import rounded
from compressor.types import file_digest
from tests import onnx_models

CPU = QuantizationRules()
PER_TENSOR = Variant("int8-static-per-tensor-ort", "onnxruntime", "static", False)
DYNAMIC = Variant("int8-dynamic-ort", "onnxruntime", "dynamic", True, ("Gather", "Gemm", "MatMul"))


def images():
    return iter([onnx_models.images(16)])


@pytest.fixture(scope="module")
def fragile(tmp_path_factory):
    """A network with one layer that a scale per tensor cannot serve: `c1` has one channel 300 times the others."""
    b = onnx_models.Builder(3)
    x = b.op("Relu", [b.op("Conv", ["image", b.normal("w0", 8, 3, 3, 3), b.normal("b0", 8)], "c0")], "r0")
    bad = b.rng.standard_normal((8, 8, 3, 3)).astype(np.float32) * 0.1
    bad[0] *= 300
    x = b.op("Conv", [x, b.weight("w1", bad), b.normal("b1", 8)], "c1")
    x = b.op("Mul", [x, b.weight("s", np.array([1 / 300] + [1] * 7, np.float32).reshape(1, 8, 1, 1))], "m")
    x = b.op("Relu", [b.op("Conv", [b.op("Relu", [x], "r1"), b.normal("w2", 16, 8, 3, 3)], "c2")], "r2")
    x = b.op("Flatten", [b.op("GlobalAveragePool", [x], "g")], "f")
    b.op("Gemm", [x, b.normal("w3", 10, 16), b.normal("b3", 10)], "logits", transB=1)
    path = tmp_path_factory.mktemp("fragile") / "m.onnx"
    onnx.save(b.model([("image", 1, ["batch", 3, 16, 16])], [("logits", 1, ["batch", 10])]), path)
    return onnx_models.artifact(path)


def closeness(source):
    inputs = onnx_models.images(64, seed=77)
    wanted = onnx_models.run(source.path, inputs)

    def score(artifact):
        got = onnx_models.run(artifact.path, inputs)
        return 1 - float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))

    return score


def test_ranking_finds_the_layer_that_int8_hurts(fragile):
    ranking = rank(fragile, PER_TENSOR, CPU, images, None)
    assert ranking[0].layer == "c1_Conv"
    assert {item.layer for item in ranking} == {"c0_Conv", "c1_Conv", "c2_Conv", "logits_Gemm"}
    assert sum(item.share for item in ranking) == pytest.approx(1)
    assert ranking[0].sqnr_db + 6 < ranking[1].sqnr_db
    macs = {"c0_Conv": 8 * 27 * 14 * 14, "c1_Conv": 8 * 72 * 12 * 12, "c2_Conv": 16 * 72 * 10 * 10, "logits_Gemm": 160}
    assert {item.layer: item.share for item in ranking} == pytest.approx(
        {name: value / sum(macs.values()) for name, value in macs.items()}
    )


def test_one_layer_goes_back_and_the_promise_holds(fragile, tmp_path):
    score = closeness(fragile)
    plain = score(quantize(fragile, PER_TENSOR, CPU, images, tmp_path / "plain.onnx"))
    floor = plain + 0.5 * (1 - plain)
    found = restore(fragile, PER_TENSOR, CPU, images, score, floor, tmp_path / "mixed.onnx", cache=tmp_path)
    assert found.holds
    assert found.kept_float == ("c1_Conv",)
    assert score(found.artifact) == found.score >= floor
    assert found.artifact.name == "student/int8-mixed-ort"
    assert found.artifact.digest == file_digest(tmp_path / "mixed.onnx")
    facts = {(fact.stage, fact.layer): fact for fact in found.artifact.facts}
    assert "put back to float" in facts["quantize", "c1_Conv"].reason
    assert facts["quantize", "c2_Conv"].action == "quantized"
    assert facts["sensitivity", "c1_Conv"].reason.startswith("rank 1 of 4")
    assert found.artifact.scheme["in float"] == "1 of 4 layers"
    assert sorted(path.name for path in tmp_path.glob("mixed*")) == ["mixed.onnx"]


def test_when_nothing_holds_the_best_is_returned_within_the_trials(fragile, tmp_path):
    score = closeness(fragile)
    found = restore(fragile, PER_TENSOR, CPU, images, score, 2.0, tmp_path / "mixed.onnx", trials=3)
    assert not found.holds
    assert len(found.trials) <= 3
    assert found.score == pytest.approx(max(value for _, value in found.trials), abs=1e-6)


def test_a_dynamic_file_is_mixed_as_well(tmp_path):
    source = onnx_models.artifact(onnx_models.transformer(tmp_path / "m.onnx"))

    def data():
        return iter([onnx_models.tokens(8)])

    sizes = []

    def score(artifact):
        sizes.append(sum(fact.action == "left-float" for fact in artifact.facts))
        return float(len(sizes) >= 2)

    found = restore(source, DYNAMIC, CPU, data, score, 0.5, tmp_path / "mixed.onnx")
    assert found.holds
    assert len(found.kept_float) >= 1


def test_cheap_noise_goes_first():
    layers = [
        Sensitivity("big", "Conv", 10.0, 0.7),
        Sensitivity("small", "Conv", 12.0, 0.05),
        Sensitivity("harmless", "Conv", 60.0, 0.25),
    ]
    assert order(layers) == ("small", "big", "harmless")


def test_rounding_is_exact_for_what_int8_can_hold():
    held = np.arange(-127, 128, dtype=np.float32).reshape(5, 51) * 0.5
    np.testing.assert_array_equal(rounded(held, None), held)
    values = np.random.default_rng(0).standard_normal((4, 9)).astype(np.float32)
    step = np.abs(values).max(axis=1, keepdims=True) / 127
    assert (np.abs(rounded(values, 0) - values) <= step / 2 + 1e-7).all()


def test_calibration_is_balanced_and_recorded():
    labels = np.array([0] * 90 + [1] * 10)
    chosen = choose(labels, 100, 20)
    assert np.bincount(labels[chosen.index]).tolist() == [10, 10]
    assert chosen.rule == "20 of 100 samples, balanced over 2 classes"
    assert choose(None, 5, 9).index.tolist() == [0, 1, 2, 3, 4]


def test_too_few_layers_are_an_error(tmp_path):
    b = onnx_models.Builder()
    b.op("Gemm", ["x", b.normal("w", 8, 8)], "y", transB=1)
    onnx.save(b.model([("x", 1, ["batch", 8])], [("y", 1, ["batch", 8])]), tmp_path / "m.onnx")
    data = {"x": np.ones((2, 8), np.float32)}
    with pytest.raises(StageError, match="no layers to choose"):
        restore(
            onnx_models.artifact(tmp_path / "m.onnx"),
            PER_TENSOR,
            CPU,
            lambda: iter([data]),
            len,
            1,
            tmp_path / "q.onnx",
        )
