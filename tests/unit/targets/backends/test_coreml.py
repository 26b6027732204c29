"""coreml: what is written is what the ONNX file says, int8 stays int8, the same bytes every time, refusals by name."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from compressor.errors import CompileError, RunError
from compressor.profile import load_profile
from targets import registry, toolchain
from targets.backends.coreml.backend import CoreMl
from targets.backends.rknn.model import write_onnx
from targets.base import Compiled, Missing
from targets.graph_file import save_graph
from targets.isolation import Limits
from targets.static_graph import Graph, fixed_shapes, read_static
from tests.unit.targets.backends.test_mobile import text, write_attention
from tests.unit.targets.conftest import artifact
from tools.operator_groups import GROUPS, samples, write_group

PROFILE = "iphone-15-pro"


def ready() -> CoreMl:
    state = registry.probe("coreml")
    if isinstance(state, Missing):
        pytest.skip(f"coreml is missing: {state.reason}")
    assert state.runs is None
    assert "Apple" in state.why_not
    return CoreMl()


def stored_weights(compiled: Compiled) -> int:
    with zipfile.ZipFile(compiled.path) as archive:
        (entry,) = (item for item in archive.infolist() if item.filename.endswith("weight.bin"))
        assert all(item.compress_type == zipfile.ZIP_STORED for item in archive.infolist())
        return entry.file_size


def test_a_quantized_net_keeps_its_int8_and_its_bytes(models, tmp_path):
    target, profile = ready(), load_profile(PROFILE)
    given = artifact(models["static"], "student/int8", precision="int8-static")
    first, again = (target.compile(given, profile, tmp_path / place) for place in ("a", "b"))
    assert first.path.read_bytes() == again.path.read_bytes()
    assert first.coverage is not None
    assert (first.coverage.quantized, first.coverage.total) == (4, 4)
    plain = target.compile(artifact(models["fp32"], "student/fp32"), profile, tmp_path / "c")
    assert stored_weights(first) < 0.75 * stored_weights(plain), "one byte a weight instead of two, and the scales"
    told = " ".join(first.notes)
    assert "3 conv" in told
    assert "quantize" in told
    with pytest.raises(RunError, match="Apple"), target.open(first, profile):
        pass


def test_masked_attention_becomes_one_program(tmp_path):
    compiled = ready().compile(text(write_attention(tmp_path / "a.onnx")), load_profile(PROFILE), tmp_path / "out")
    told = " ".join(compiled.notes)
    for operation in ("matmul", "softmax", "layer_norm", "gelu", "gather", "select"):
        assert operation in told, told


def every_value(graph: Graph, inputs: dict[str, np.ndarray], scratch: Path) -> dict[str, np.ndarray]:
    """Every tensor of one run in ONNX Runtime."""
    names = tuple(name for node in graph.nodes for name in node.outputs if name)
    write_onnx(replace(graph, outputs=names), scratch)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(scratch), options)
    return {**inputs, **dict(zip(names, session.run(list(names), inputs), strict=True))}


def test_what_core_ml_tools_evaluate_is_what_onnx_runtime_computes(tmp_path):
    """Node by node: Core ML Tools evaluate many operations while they build (no convolutions, no pools)."""
    ready()
    cases, graphs = [], []
    for number, group in enumerate(GROUPS):
        given = write_group(group, tmp_path / "m.onnx")
        graph = read_static(given.path, fixed_shapes(given.inputs, 1, 1))
        files = {"graph": str(tmp_path / f"{number}.graph.npz"), "values": str(tmp_path / f"{number}.values.npz")}
        save_graph(graph, Path(files["graph"]))
        np.savez(files["values"], **every_value(graph, samples(group, 1), tmp_path / "all.onnx"))
        cases.append(files)
        graphs.append(graph)
    reply = toolchain.call("coreml", {"action": "evaluate", "cases": cases}, Limits(120, 4096), "Core ML Tools")
    seen = set()
    for graph, found in zip(graphs, reply["cases"], strict=True):
        assert set(found) == {node.name for node in graph.nodes}
        for node in graph.nodes:
            if found[node.name] is not None:
                seen.add(node.operator)
                assert found[node.name] < 1e-4, node
    assert {"Add", "Concat", "Gather", "MatMul", "Mul", "Softmax", "Transpose"} <= seen


def test_an_operator_without_a_form_is_named(tmp_path):
    import onnx
    from onnx import TensorProto, helper

    from compressor.types import Artifact, Format, TensorSpec, file_digest

    nodes = [helper.make_node("Det", ["x"], ["y"], "the_det")]
    ends = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4, 4]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch"]),
    ]
    path = Path(tmp_path / "m.onnx")
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    specs = (TensorSpec("x", "float32", ("batch", 4, 4)),), (TensorSpec("y", "float32", ("batch",)),)
    given = Artifact("student/fp32", "student", path, Format.ONNX, "fp32", *specs, file_digest(path), 0)
    with pytest.raises(CompileError, match="`the_det`: Det has no form"):
        ready().compile(given, load_profile(PROFILE), tmp_path / "out")
