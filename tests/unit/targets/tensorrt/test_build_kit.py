"""Enterprise flavour on a machine without its GPU: a kit that was validated by the sibling."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
import pytest

from compressor.errors import RunError
from compressor.profile import HardwareProfile
from compressor.types import Artifact, file_digest
from targets.backends.tensorrt import TensorRt, builder
from targets.backends.tensorrt.build_kit import trtexec_flags, write_kit
from targets.backends.tensorrt.cuda import NoGpu, probe_cuda
from targets.backends.tensorrt.engine_file import read_header
from targets.base import Compiled

pytestmark = pytest.mark.skipif(not isinstance(probe_cuda(), NoGpu), reason="a GPU is here: engines are built instead")


@pytest.fixture(scope="module")
def kit(
    models: Mapping[str, Path],
    make_artifact: Callable[..., Artifact],
    make_profile: Callable[..., HardwareProfile],
    tmp_path_factory: pytest.TempPathFactory,
) -> Compiled:
    profile = make_profile("8.7", flavour="enterprise", max_batch=8, workspace_mib=256, precision="fp16")
    return TensorRt().compile(make_artifact(models["weighted-only"]), profile, tmp_path_factory.mktemp("kit"))


def test_kit_says_that_no_engine_was_built(rtx: str, kit: Compiled) -> None:
    assert kit.path.name == "manifest.json"
    assert kit.path.parent.name == "student-weighted-only.trtkit"
    assert kit.notes[0].startswith("build kit: engine not built, because no NVIDIA driver")
    assert f"validated: the ONNX parser of TensorRT-RTX {rtx} accepts the model" in kit.notes
    assert any("3 conv Int8, 1 gemm Int8" in note and "SM86" in note for note in kit.notes)
    assert kit.coverage is None
    assert any("changes nothing" in note for note in kit.notes)
    assert {path.name for path in kit.extra_files} == {"build.sh", "build_engine.py", "model.onnx"}
    assert not list(kit.path.parent.parent.glob("*.engine")) + list(kit.path.parent.parent.glob(".*"))


def test_manifest_describes_the_model(kit: Compiled) -> None:
    manifest = json.loads(kit.path.read_text())
    assert manifest["state"] == "engine not built"
    assert manifest["capability"] == "8.7"
    assert manifest["onnx_digest"] == file_digest(kit.path.parent / "model.onnx") == kit.artifact.digest
    assert manifest["request"]["workspace_mib"] == 256
    assert manifest["request"]["shapes"]["x"][2] == [8, 3, 32, 32]


def test_build_sh_is_valid_and_uses_no_removed_flag(kit: Compiled) -> None:
    script = kit.path.parent / "build.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    assert "--minShapes=x:1x3x32x32" in text
    assert "--maxShapes=x:8x3x32x32" in text
    assert "--memPoolSize=workspace:256" in text
    assert not any(flag in text for flag in ("--fp16", "--int8", "--best", "--calib"))  # removed in TensorRT 11


def test_build_sh_passes_the_flags_to_trtexec(kit: Compiled, tmp_path: Path) -> None:
    recorder = tmp_path / "trtexec"
    recorder.write_text('#!/bin/sh\n[ "$1" = --help ] && echo "  --stronglyTyped  x" && exit 0\nprintf "%s\\n" "$@"\n')
    recorder.chmod(0o755)
    command = ["bash", str(kit.path.parent / "build.sh"), "--verbose"]
    done = subprocess.run(
        command, env={"PATH": "/usr/bin:/bin", "TRTEXEC": str(recorder)}, capture_output=True, text=True, check=True
    )
    passed = done.stdout.split()
    assert passed[0] == "--onnx=model.onnx"
    assert passed[-2:] == ["--stronglyTyped", "--verbose"]


def test_build_engine_of_the_kit_really_builds(rtx: str, kit: Compiled) -> None:
    script = kit.path.parent / "build_engine.py"
    assert script.read_bytes() == Path(builder.__file__).read_bytes()
    command = [sys.executable, "-I", str(script), "--flavour", "rtx", "--capability", "SM86"]
    subprocess.run(command, check=True, capture_output=True)
    engine = kit.path.parent / "model.engine"
    try:
        assert read_header(engine).flavour == "rtx"
        assert (kit.path.parent / "layers.txt").read_text().count("LayerType: correlation") == 3
    finally:
        engine.unlink()
        (kit.path.parent / "layers.txt").unlink()


def test_build_engine_refuses_a_changed_model(kit: Compiled, tmp_path: Path) -> None:
    for path in (kit.path, *kit.extra_files):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.onnx").write_bytes(b"other")
    command = [sys.executable, "-I", str(tmp_path / "build_engine.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "not the file the manifest describes" in done.stderr


def test_kit_cannot_be_opened(kit: Compiled, make_profile: Callable[..., HardwareProfile]) -> None:
    with pytest.raises(RunError, match="build kit") as caught:
        TensorRt().open(kit, make_profile("8.7", flavour="enterprise"))
    assert "build.sh" in caught.value.hint


def test_external_weights_travel_with_the_kit(models: Mapping[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "source" / "model.onnx"
    source.parent.mkdir()
    onnx.save_model(onnx.load(models["fp32"]), source, save_as_external_data=True, location="w.bin", size_threshold=0)
    files = write_kit(tmp_path / "k.trtkit", source, {"x": [[1], [1], [1]]}, 64, {})
    assert {path.name for path in files} >= {"model.onnx", "model.onnx.data"}
    assert len(onnx.load(tmp_path / "k.trtkit" / "model.onnx").graph.initializer) == 8


def test_fixed_shapes_need_no_ranges() -> None:
    assert not [flag for flag in trtexec_flags({"x": [[1, 3]] * 3}, 64) if "Shapes" in flag]
