"""Groups of operators through the TFLite writer: answers of LiteRT, Gelu from its Erf forms, refusals by name."""

from __future__ import annotations

import math

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, save

from compressor.profile import load_profile
from compressor.types import Artifact, Format, TensorSpec, file_digest
from targets import registry
from targets.base import Missing
from targets.gelu import with_gelu
from targets.static_graph import read_static
from targets.tflite import convert
from targets.tflite.reference import ReferenceCall
from tools.operator_groups import GROUPS, samples, write_group


def litert():
    state = registry.probe("litert")
    if isinstance(state, Missing):
        pytest.skip(f"litert is missing: {state.reason}")
    return registry.get("litert")


@pytest.mark.parametrize("group", GROUPS)
def test_litert_answers_like_onnx_runtime(group, tmp_path):
    target, profile = litert(), load_profile("this-machine-litert")
    artifact, inputs = write_group(group, tmp_path / "m.onnx"), samples(group, 3)
    compiled = target.compile(artifact, profile, tmp_path / "out")
    with target.open(compiled, profile) as session:
        found = next(iter(session.run(inputs).values()))
    expected = onnxruntime.InferenceSession(str(artifact.path)).run(None, inputs)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def erf_form(path, order: str, half: float = 0.5):
    """x -> Gelu, written as exporters do: ``after`` halves last, ``before`` halves x first."""
    stored = {"r": np.float32(math.sqrt(2)), "one": np.float32(1), "half": np.float32(half)}
    nodes = [
        helper.make_node("Div", ["x", "r"], ["d"], "div"),
        helper.make_node("Erf", ["d"], ["e"], "erf"),
        helper.make_node("Add", ["e", "one"], ["p"], "plus"),
    ]
    if order == "after":
        nodes += [
            helper.make_node("Mul", ["x", "p"], ["m"], "mul"),
            helper.make_node("Mul", ["m", "half"], ["y"], "end"),
        ]
    else:
        nodes += [
            helper.make_node("Mul", ["half", "x"], ["h"], "mul"),
            helper.make_node("Mul", ["p", "h"], ["y"], "end"),
        ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("x", "y")]
    graph = helper.make_graph(
        nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(value, name) for name, value in stored.items()]
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    specs = (TensorSpec("x", "float32", ("batch", 4)),), (TensorSpec("y", "float32", ("batch", 4)),)
    return Artifact("student/fp32", "student", path, Format.ONNX, "fp32", *specs, file_digest(path), 0)


@pytest.mark.parametrize("order", ["after", "before"])
def test_an_erf_chain_is_one_gelu(order, tmp_path):
    artifact = erf_form(tmp_path / "m.onnx", order)
    graph = read_static(artifact.path, {"x": (1, 4)})
    assert [node.operator for node in graph.nodes] == ["Gelu"]
    target, profile = litert(), load_profile("this-machine-litert")
    inputs = {"x": np.linspace(-3, 3, 8, dtype=np.float32).reshape(2, 4)}
    with target.open(target.compile(artifact, profile, tmp_path / "out"), profile) as session:
        found = session.run(inputs)["y"]
    expected = [[0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in row] for row in inputs["x"]]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_chain_with_another_factor_is_no_gelu_and_its_erf_a_formula(tmp_path):
    artifact = erf_form(tmp_path / "m.onnx", "after", half=0.6)
    graph = read_static(artifact.path, {"x": (1, 4)})
    assert with_gelu(graph) == graph
    assert "Erf" in {node.operator for node in graph.nodes}
    inputs = {"x": np.linspace(-6, 6, 400, dtype=np.float32).reshape(100, 4)}
    inputs["x"][50] = 0
    target, profile = litert(), load_profile("this-machine-litert")
    with target.open(target.compile(artifact, profile, tmp_path / "out"), profile) as session:
        found = session.run(inputs)["y"]
    expected = [[0.6 * v * (1 + math.erf(v / math.sqrt(2))) for v in row] for row in inputs["x"]]
    np.testing.assert_allclose(found, expected, atol=2e-6)


def pairs(operator: str, path, **attributes):
    """x -> pair -> operator -> pair -> y over [-4, 4], asymmetric on both sides."""
    stored = {"s": np.float32(8 / 255), "z": np.int8(3), "t": np.float32(5 / 255), "u": np.int8(-90)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "d"),
        helper.make_node(operator, ["d"], ["f"], "op", **attributes),
        helper.make_node("QuantizeLinear", ["f", "t", "u"], ["p"], "p"),
        helper.make_node("DequantizeLinear", ["p", "t", "u"], ["y"], "y"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 256]) for name in ("x", "y")]
    graph = helper.make_graph(
        nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(np.asarray(v), k) for k, v in stored.items()]
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), str(path))
    return read_static(path, {"x": (1, 256)})


@pytest.mark.parametrize(
    ("operator", "absent", "steps", "wanted"),
    [
        ("Gelu", frozenset(), 1, "GELU"),
        ("Gelu", frozenset({"GELU"}), 0, "GATHER"),
        ("Erf", frozenset(), 0, "GATHER"),
        ("HardSwish", frozenset(), 2, "HARD_SWISH"),
        ("HardSigmoid", frozenset(), 2, "ADD"),
        ("LeakyRelu", frozenset(), 1, "LEAKY_RELU"),
    ],
)
def test_int8_operators_of_one_tensor_stay_in_int8_over_all_codes(operator, absent, steps, wanted, tmp_path):
    """Every int8 code through the file, as near to ONNX Runtime as the kernel's own rounding allows."""
    graph = pairs(operator, tmp_path / "m.onnx")
    made = convert(graph, int8_interface=True, absent=absent)
    kinds = {tensor.type for operation in made.operations for tensor in (*operation.inputs, *operation.outputs)}
    assert "float32" not in kinds
    assert wanted in {operation.operator for operation in made.operations}
    (tmp_path / "m.tflite").write_bytes(made.content)
    x = ((np.arange(-128, 128) - 3) * np.float32(8 / 255)).astype(np.float32)[None]
    found = ReferenceCall(tmp_path / "m.tflite")({"x": x})["y"]
    expected = onnxruntime.InferenceSession(str(tmp_path / "m.onnx")).run(None, {"x": x})[0]
    assert np.abs(np.rint((found - expected) * 255 / 5)).max() <= steps


def test_a_runtime_without_gelu_gets_a_formula(tmp_path):
    artifact = erf_form(tmp_path / "m.onnx", "after")
    made = convert(read_static(artifact.path, {"x": (50, 4)}), absent=frozenset({"GELU"}))
    (tmp_path / "m.tflite").write_bytes(made.content)
    x = np.linspace(-7, 7, 200, dtype=np.float32).reshape(50, 4)
    found = ReferenceCall(tmp_path / "m.tflite")({"x": x})["y"]
    expected = [[0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in row] for row in x]
    np.testing.assert_allclose(found, expected, atol=2e-6)
