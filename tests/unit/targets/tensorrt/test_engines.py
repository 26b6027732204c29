"""Real engines, built by TensorRT-RTX without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
import psutil
import pytest

from compressor.errors import CompileError, RunError, TargetUnavailable
from compressor.profile import HardwareProfile
from compressor.types import Artifact, Origin, file_digest
from targets.backends.tensorrt import TensorRt, backend
from targets.backends.tensorrt.cuda import NoGpu, probe_cuda
from targets.backends.tensorrt.engine_file import normalised_digest, read_header
from targets.backends.tensorrt.isolation import Limits, call_worker
from targets.base import Compiled, Missing, Ready

MakeArtifact = Callable[..., Artifact]
MakeProfile = Callable[..., HardwareProfile]


def weights_bytes(compiled: Compiled) -> float:
    return next(float(each.detail["bytes"]) for each in compiled.estimates if each.detail["figure"] == "weights")


def test_probe_says_that_it_compiles_but_cannot_run(rtx: str) -> None:
    found = TensorRt().probe()
    assert isinstance(found, Ready)
    assert found.versions["TensorRT-RTX"] == rtx
    if isinstance(probe_cuda(), NoGpu):
        assert found.runs is None
        assert found.device == f"TensorRT-RTX builder {rtx}, no GPU here"
        assert "driver" in found.why_not


def test_header_names_the_release_and_the_size(rtx: str, engines: Mapping[str, Compiled]) -> None:
    for compiled in engines.values():
        header = read_header(compiled.path)
        assert (header.tag, header.flavour, header.version) == ("vtrt", "rtx", rtx)
        assert header.size == compiled.path.stat().st_size


@pytest.mark.parametrize("name", ["all-operators", "weighted-only"])
def test_int8_file_becomes_int8_layers(name: str, engines: Mapping[str, Compiled]) -> None:
    compiled = engines[name]
    assert compiled.coverage is not None
    assert (compiled.coverage.quantized, compiled.coverage.total) == (4, 4)
    assert compiled.coverage.left_float == ()
    manifest = json.loads(compiled.extra_files[0].read_text())
    assert manifest["precision_counts"] == {"conv Int8": 3, "gemm Int8": 1}
    assert {node for layer in manifest["compute_layers"] for node in layer["onnx"]} >= {"conv0", "conv1", "conv2", "fc"}


def test_fp32_file_stays_float_and_each_node_says_why(engines: Mapping[str, Compiled]) -> None:
    coverage = engines["fp32"].coverage
    assert coverage is not None
    assert (coverage.quantized, coverage.total) == (0, 4)
    assert [fact.name for fact in coverage.left_float] == ["conv0", "conv1", "conv2", "fc"]
    assert all("in Float" in fact.reason for fact in coverage.left_float)


def test_memory_figures_are_the_builders_estimates(engines: Mapping[str, Compiled]) -> None:
    figures = {each.detail["figure"]: each for each in engines["fp32"].estimates}
    assert {"weights", "activation", "scratch"} <= set(figures)
    assert all(each.origin is Origin.ESTIMATED and each.unit == "MiB" for each in figures.values())
    fp32, int8 = (weights_bytes(engines[name]) for name in ("fp32", "weighted-only"))
    assert fp32 >= 4 * 14_634
    assert int8 < 0.4 * fp32


def test_manifest_tells_what_the_engine_is(rtx: str, engines: Mapping[str, Compiled]) -> None:
    compiled = engines["weighted-only"]
    manifest = json.loads(compiled.extra_files[0].read_text())
    assert manifest["schema"] == 1
    assert manifest["engine"] == compiled.path.name
    assert manifest["targets"] == ["SM89"]
    assert manifest["onnx_digest"] == file_digest(compiled.artifact.path)
    assert manifest["shapes"] == {"x": [[1, 3, 32, 32], [1, 3, 32, 32], [8, 3, 32, 32]]}
    assert manifest["validity"] == f"valid only with TensorRT-RTX {rtx}"
    assert manifest["validity"] in compiled.notes
    assert manifest["header"]["normalised_digest"] == normalised_digest(compiled.path)
    assert compiled.compile_seconds > 0


def test_two_builds_are_the_same_but_for_symbol_counters(
    engines: Mapping[str, Compiled], make_profile: MakeProfile, tmp_path: Path
) -> None:
    first = engines["weighted-only"]
    second = TensorRt().compile(first.artifact, make_profile(max_batch=8), tmp_path)
    assert second.path.stat().st_size == first.path.stat().st_size
    assert normalised_digest(second.path) == normalised_digest(first.path)
    tables = [json.loads(each.extra_files[0].read_text())["precision_counts"] for each in (first, second)]
    assert tables[0] == tables[1]


def test_nodes_without_a_name_are_still_found_in_the_table(
    rtx: str, models: Mapping[str, Path], make_artifact: MakeArtifact, make_profile: MakeProfile, tmp_path: Path
) -> None:
    model = onnx.load(models["fp32"])
    for node in model.graph.node:
        node.name = ""
    onnx.save(model, tmp_path / "unnamed.onnx")
    compiled = TensorRt().compile(make_artifact(tmp_path / "unnamed.onnx"), make_profile(), tmp_path / "out")
    assert compiled.coverage is not None
    assert "node_of_c0" in {fact.name for fact in compiled.coverage.left_float}
    assert all("in Float" in fact.reason for fact in compiled.coverage.left_float)


def test_too_small_a_workspace_is_the_builders_refusal(
    rtx: str, models: Mapping[str, Path], make_artifact: MakeArtifact, make_profile: MakeProfile, tmp_path: Path
) -> None:
    with pytest.raises(CompileError, match="workspace limit") as caught:
        TensorRt().compile(make_artifact(models["fp32"]), make_profile(workspace_mib=1), tmp_path)
    assert "workspace_mib" in caught.value.hint
    assert "catchCudaError" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_time_limit_stops_the_child(
    rtx: str, models: Mapping[str, Path], make_artifact: MakeArtifact, make_profile: MakeProfile, tmp_path: Path
) -> None:
    started = time.monotonic()
    with pytest.raises(CompileError, match=r"longer than the limit of 0\.05 s"):
        TensorRt().compile(make_artifact(models["fp32"]), make_profile(timeout_s=0.05), tmp_path)
    assert time.monotonic() - started < 10
    assert list(tmp_path.iterdir()) == []
    children = psutil.Process().children(recursive=True)
    assert not [child for child in children if "build_worker" in " ".join(child.cmdline())]


def test_memory_limit_stops_the_child(
    rtx: str, models: Mapping[str, Path], make_artifact: MakeArtifact, make_profile: MakeProfile, tmp_path: Path
) -> None:
    with pytest.raises(CompileError, match="more than the limit of 64 MiB") as caught:
        TensorRt().compile(make_artifact(models["fp32"]), make_profile(memory_limit_mib=64), tmp_path)
    assert "memory_limit_mib" in caught.value.hint


def test_worker_reports_the_parsers_findings_by_node(rtx: str, models: Mapping[str, Path]) -> None:
    request = {"do": "build", "flavour": "rtx", "onnx": str(models["default"]), "engine": ""}
    reply = call_worker(request | {"workspace_mib": 64, "shapes": {}}, Limits(60, 4096))
    assert reply["ok"] is False
    assert reply["stage"] == "parse"
    assert reply["nodes"][0]["name"] == "b0_DequantizeLinear"
    assert "Int32" in reply["error"]
    assert "catchCudaError" not in reply["error"]


def test_worker_knows_an_empty_network(rtx: str, tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(bytes(range(256)) * 2)
    request = {"do": "build", "flavour": "rtx", "onnx": str(garbage), "engine": "", "workspace_mib": 64, "shapes": {}}
    reply = call_worker(request, Limits(60, 4096))
    assert reply["ok"] is False
    assert reply["stage"] == "parse"


def test_worker_knows_a_missing_shape_range(rtx: str, models: Mapping[str, Path], tmp_path: Path) -> None:
    request = {"do": "build", "flavour": "rtx", "onnx": str(models["fp32"]), "engine": str(tmp_path / "e")}
    reply = call_worker(request | {"workspace_mib": 64, "shapes": {}}, Limits(60, 4096))
    assert reply["stage"] == "shapes"
    assert "`x`" in reply["error"]


def test_crash_of_the_child_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("targets.backends.tensorrt.isolation._COMMAND", ("-c", "import os; os.abort()"))
    with pytest.raises(CompileError, match="ended by SIGABRT"):
        call_worker({}, Limits(60, 4096))
    monkeypatch.setattr("targets.backends.tensorrt.isolation._COMMAND", ("-c", "raise SystemExit('no licence')"))
    with pytest.raises(CompileError, match="code 1: no licence"):
        call_worker({}, Limits(60, 4096))
    monkeypatch.setattr("targets.backends.tensorrt.isolation._COMMAND", ("-c", "print('hello')"))
    with pytest.raises(CompileError, match="no readable reply"):
        call_worker({}, Limits(60, 4096))


def test_open_without_gpu_gives_the_reason(engines: Mapping[str, Compiled], make_profile: MakeProfile) -> None:
    if not isinstance(probe_cuda(), NoGpu):
        pytest.skip("there is a GPU here")
    with pytest.raises(RunError, match="cannot be run here: no NVIDIA driver"):
        TensorRt().open(engines["fp32"], make_profile())


def test_missing_library_is_said_with_the_command(
    monkeypatch: pytest.MonkeyPatch,
    models: Mapping[str, Path],
    make_artifact: MakeArtifact,
    make_profile: MakeProfile,
    tmp_path: Path,
) -> None:
    if not isinstance(probe_cuda(), NoGpu):
        pytest.skip("there is a GPU here")
    monkeypatch.setitem(backend.MODULES, "rtx", ("no_such_module_of_tensorrt",))
    backend.sdk_version.cache_clear()
    try:
        found = TensorRt().probe()
        assert isinstance(found, Missing)
        assert "pip install --only-binary :all: tensorrt-rtx-cu13-libs==1.7.1.116" in found.hint
        with pytest.raises(TargetUnavailable, match="not installed"):
            TensorRt().compile(make_artifact(models["fp32"]), make_profile(), tmp_path / "never")
        assert not (tmp_path / "never").exists()
    finally:
        backend.sdk_version.cache_clear()


def test_importing_the_back_end_loads_no_vendor_library() -> None:
    code = "import json, sys, targets.backends.tensorrt; print(json.dumps(list(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "onnx", "tensorrt_rtx_bindings", "tensorrt"} & set(json.loads(loaded))
