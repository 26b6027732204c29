"""Which variants fit, and the reason for each that does not."""

import dataclasses
import importlib.util

import pytest

from compressor.export.facts import describe
from compressor.profile import QuantizationRules
from compressor.quantize import variants
from compressor.recipe import QuantizeStage
from tests import onnx_models

STAGE = QuantizeStage(kind="quantize")
CPU = QuantizationRules()
TENSORRT = QuantizationRules(
    activation="int8", symmetric_activation=True, quantize_bias=False, weighted_only=True, dynamic=False
)
HAS_NNCF = importlib.util.find_spec("nncf") is not None


@pytest.fixture(scope="module")
def cnn(tmp_path_factory):
    return describe(onnx_models.cnn(tmp_path_factory.mktemp("m") / "m.onnx"))


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    return describe(onnx_models.transformer(tmp_path_factory.mktemp("m") / "m.onnx"))


def names(pair):
    return [variant.name for variant in pair[0]]


def test_a_cnn_gets_static_variants_and_never_a_dynamic_one(cnn):
    chosen, rejected = variants(STAGE, QuantizationRules(), cnn)
    assert names((chosen, rejected))[:2] == ["int8-static-per-channel-ort", "int8-static-per-tensor-ort"]
    assert all(variant.operators is None for variant in chosen)
    assert "ConvInteger" in rejected["int8-dynamic-ort"]


def test_a_masked_transformer_is_never_quantized_as_a_whole(masked):
    chosen, rejected = variants(STAGE, QuantizationRules(), masked)
    assert all(variant.operators == ("Gather", "Gemm", "MatMul") for variant in chosen)
    assert "int8-dynamic-ort" in names((chosen, rejected))
    assert "mask" in rejected["int8-static-whole-graph"]


def test_tensorrt_gets_weighted_operators_only_and_no_unsigned_engine(cnn):
    chosen, rejected = variants(STAGE, TENSORRT, cnn)
    assert names((chosen, rejected)) == ["int8-static-per-channel-ort", "int8-static-per-tensor-ort"]
    assert all("Gather" not in variant.operators for variant in chosen)
    assert "unsigned" in rejected["int8-static-per-channel-nncf"]
    assert "run time" in rejected["int8-dynamic-ort"]


def test_the_recipe_limits_engines_and_schemes(cnn):
    config = QuantizeStage(kind="quantize", engines=("onnxruntime",), schemes=("static-per-tensor",))
    chosen, rejected = variants(config, QuantizationRules(), cnn)
    assert names((chosen, rejected)) == ["int8-static-per-tensor-ort"]
    assert "onnxruntime only" in rejected["int8-static-per-channel-nncf"]
    assert "static-per-tensor only" in rejected["int8-static-per-channel-ort"]


def test_nothing_is_built_without_int8_twice_or_without_weights(cnn):
    assert "no int8" in variants(STAGE, QuantizationRules(int8=False), cnn)[1]["int8"]
    done = dataclasses.replace(cnn, quantized=True, operators={"QuantizeLinear": 1})
    assert variants(STAGE, QuantizationRules(), done)[0] == ()
    assert "already quantized (QuantizeLinear)" in variants(STAGE, QuantizationRules(), done)[1]["int8"]
    inside = tuple(dataclasses.replace(node, inside="choice") for node in cnn.weighted)
    nested = dataclasses.replace(cnn, weighted=inside)
    assert "in `choice`" in variants(STAGE, QuantizationRules(), nested)[1]["int8"]
    after = tuple(dataclasses.replace(node, after="where") for node in cnn.weighted)
    late = dataclasses.replace(cnn, weighted=after)
    assert "comes after `where`" in variants(STAGE, QuantizationRules(), late)[1]["int8"]
    bare = dataclasses.replace(cnn, weighted=())
    assert "no Conv" in variants(STAGE, QuantizationRules(), bare)[1]["int8"]


def test_a_missing_nncf_is_a_reason_with_its_installation(cnn, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    chosen, rejected = variants(STAGE, QuantizationRules(), cnn)
    assert "int8-static-per-channel-nncf" not in names((chosen, rejected))
    assert "pip install" in rejected["int8-static-per-channel-nncf"]


@pytest.mark.skipif(not HAS_NNCF, reason="nncf is not installed")
def test_nncf_is_offered_where_it_is_installed(cnn):
    assert "int8-static-per-channel-nncf" in names(variants(STAGE, QuantizationRules(), cnn))


def test_what_the_recipe_and_the_rules_ask_for_reaches_the_variants(cnn, masked):
    stage = QuantizeStage(kind="quantize", engines=("onnxruntime",), calibration="mse", corrections=("bias",))
    chosen, _ = variants(stage, CPU, cnn)
    assert {(variant.calibration, variant.corrections) for variant in chosen} == {("mse", ("bias",))}
    chosen, rejected = variants(STAGE, QuantizationRules(per_channel=False), cnn)
    assert not any(variant.per_channel for variant in chosen)
    assert "one scale per weight tensor" in rejected["int8-static-per-channel-ort"]
    weights = QuantizeStage(kind="quantize", weights=("int4", "int8"), group=64, weight_method="rtn")
    made = {variant.name: variant for variant in variants(weights, CPU, masked)[0]}
    assert (made["int4-weights-ort"].bits, made["int4-weights-ort"].group) == (4, 64)
    assert "no MatMul" in variants(weights, CPU, cnn)[1]["int8-weights-ort"]
    assert "does not read" in variants(weights, TENSORRT, masked)[1]["int8-weights-ort"]
    assert "int4-weights-gptq-ort" in names(variants(weights.model_copy(update={"weight_method": "gptq"}), CPU, masked))
    scaled = variants(weights.model_copy(update={"weight_method": "awq"}), CPU, masked)[0]
    wanted = ["int4-weights-awq-ort", "int8-weights-awq-ort"] + ["int4-weights-awq-nncf"] * HAS_NNCF
    assert sorted(v.name for v in scaled if v.kind == "weights") == sorted(wanted)
    only = QuantizeStage(kind="quantize", engines=("nncf",), calibration="entropy")
    assert "minmax or percentile" in variants(only, CPU, cnn)[1]["int8-static-per-channel-nncf"]
