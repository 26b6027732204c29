"""Groups of operators through the TFLite writer: answers of LiteRT, Gelu from its Erf forms, refusals by name."""

from __future__ import annotations

import math

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, save

from compressor.errors import CompileError
from compressor.profile import load_profile
from compressor.types import Artifact, Format, TensorSpec, file_digest
from targets import registry
from targets.base import Missing
from targets.gelu import with_gelu
from targets.static_graph import read_static
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


def test_a_chain_with_another_factor_is_no_gelu(tmp_path):
    artifact = erf_form(tmp_path / "m.onnx", "after", half=0.6)
    graph = read_static(artifact.path, {"x": (1, 4)})
    assert with_gelu(graph) == graph
    assert "Erf" in {node.operator for node in graph.nodes}
    with pytest.raises(CompileError, match="Erf"):
        litert().compile(artifact, load_profile("this-machine-litert"), tmp_path / "out")
