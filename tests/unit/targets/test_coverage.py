"""Kernel coverage of graphs that ONNX Runtime really optimised."""

from __future__ import annotations

import onnx
import pytest
from onnx import helper

from compressor.profile import load_profile
from targets.backends.onnxruntime_cpu import OnnxRuntimeCpu
from targets.coverage import explain, kernel_coverage, node_count
from tests.unit.targets.conftest import artifact


def coverage_of(models, name, tmp_path, **runtime):
    profile = load_profile("this-machine")
    if runtime:
        profile = profile.model_copy(update={"runtime": profile.runtime.model_copy(update=runtime)})
    compiled = OnnxRuntimeCpu().compile(artifact(models[name], name), profile, tmp_path)
    assert compiled.path == models[name], "the portable file is what ships"
    assert compiled.placed > 0
    return compiled.coverage


def test_static_qdq_runs_quantized_everywhere(models, tmp_path):
    coverage = coverage_of(models, "static", tmp_path)
    assert (coverage.quantized, coverage.total) == (4, 4)
    assert explain(coverage) == ""


def test_fp32_file_is_float_and_says_so(models, tmp_path):
    coverage = coverage_of(models, "fp32", tmp_path)
    assert (coverage.quantized, coverage.total) == (0, 4)
    assert {fact.reason for fact in coverage.left_float} == {"the file is not quantized"}


def test_dynamic_convolutions_do_not_count(models, tmp_path):
    coverage = coverage_of(models, "dynamic", tmp_path)
    assert (coverage.quantized, coverage.total) == (1, 4)
    assert {fact.operator for fact in coverage.left_float} == {"ConvInteger"}
    assert "3 of 4" in explain(coverage)


def test_without_graph_optimisation_a_quantized_file_runs_float(models, tmp_path):
    """The QDQ pairs are only fused by the extended level: the same file, and nothing runs quantized."""
    coverage = coverage_of(models, "static", tmp_path, graph_level="disabled")
    assert (coverage.quantized, coverage.total) == (0, 4)
    assert all("no int8 kernel for this pattern" in fact.reason for fact in coverage.left_float)


def test_weights_behind_dequantize_are_named(models, tmp_path):
    coverage = coverage_of(models, "weights", tmp_path, graph_level="disabled")
    reasons = {fact.name: fact.reason for fact in coverage.left_float}
    assert "through DequantizeLinear at run time" in reasons["conv2"]
    assert "activation is not quantized" in reasons["conv2"]
    assert reasons["head"] == "not selected by the quantizer"


def graph_with(*nodes, stored=()):
    return helper.make_model(helper.make_graph(list(nodes), "g", [], [], list(stored)))


def test_product_of_two_computed_tensors_has_no_weight():
    model = graph_with(
        helper.make_node("QuantizeLinear", ["a", "s"], ["q"]), helper.make_node("MatMul", ["x", "y"], ["z"], "scores")
    )
    (fact,) = kernel_coverage(model).left_float
    assert fact.reason == "both operands are computed: there is no weight to quantize"


def test_nested_graphs_are_counted():
    inner = helper.make_graph([helper.make_node("QLinearMatMul", ["a"] * 8, ["b"])], "then", [], [])
    other = helper.make_graph([helper.make_node("MatMul", ["a", "w"], ["b"])], "else", [], [])
    weight = helper.make_tensor("w", onnx.TensorProto.FLOAT, [1], [1.0])
    model = graph_with(helper.make_node("If", ["c"], ["b"], then_branch=inner, else_branch=other), stored=[weight])
    coverage = kernel_coverage(model)
    assert (coverage.quantized, coverage.total) == (1, 2)
    assert coverage.left_float[0].reason == "not selected by the quantizer"
    assert node_count(model) == 3


@pytest.mark.parametrize("operator", ["QAttention", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QGemm"])
def test_contributed_operators_count(operator):
    coverage = kernel_coverage(graph_with(helper.make_node(operator, ["x"], ["y"], domain="com.microsoft")))
    assert (coverage.quantized, coverage.total) == (1, 1)
