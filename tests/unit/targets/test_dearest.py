"""Why a quantized file is slow: the runtime's times of its nodes, and the sentence made of them."""

from __future__ import annotations

from compressor.models.onnx_graph import read_model
from compressor.profile import QuantizationRules, load_profile
from targets import registry
from targets.dearest import TimesNodes, lost_in
from tools.operator_groups import samples, write_group
from tools.target_rules import emitted


def test_the_operators_that_cost_more_are_told_with_their_slowest_nodes():
    plain = {"a": ("Conv", 4.0), "b": ("FusedConv", 2.0), "m": ("Mul", 0.5), "n": ("Mul", 0.5), "s": ("Softmax", 0.2)}
    after = {
        "a": ("QLinearConv", 2.0),
        "b": ("QLinearConv", 1.0),
        "m": ("QLinearMul", 1.5),
        "n": ("QLinearMul", 2.0),
        "s": ("Softmax", 0.3),
        "q": ("QuantizeLinear", 0.9),
        "d": ("DequantizeLinear", 0.8),
    }
    assert lost_in(after, plain) == (
        "lost in Mul (3.50 ms, in float 1.00; `n`, `m`) and QuantizeLinear (0.90 ms, in float 0.00; `q`)"
    )
    assert lost_in(plain, plain) == ""
    assert lost_in({}, plain) == ""


def test_onnx_runtime_tells_the_time_of_every_node_by_its_name_in_the_file(tmp_path):
    backend, profile = registry.get("onnxruntime-cpu"), load_profile("this-machine")
    assert isinstance(backend, TimesNodes)
    artifact = emitted("cnn", QuantizationRules(), tmp_path)
    times = backend.node_times(backend.compile(artifact, profile, tmp_path / "q"), profile, samples("cnn", 1))
    weighted = {node.name for node in read_model(artifact.path).graph.node if node.op_type in ("Conv", "Gemm")}
    assert weighted <= set(times)
    assert all(time > 0 for operator, time in times.values() if operator == "QLinearConv")
    plain = write_group("cnn", tmp_path / "float.onnx")
    floats = backend.node_times(backend.compile(plain, profile, tmp_path / "f"), profile, samples("cnn", 1))
    assert not any(operator.startswith("QLinear") for operator, _ in floats.values())
