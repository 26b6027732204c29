"""A package runs an update of its model from a delta, with numpy and onnxruntime alone, and stays as it is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from targets.outcome import ProfileOutcome, RunSummary
from targets.package import PackageInfo

Case = tuple[ProfileOutcome, RunSummary, PackageInfo]
Build = Callable[[Case], Path]


def run(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """`infer.py` alone; it says whether a module of the host was imported."""
    code = "import runpy, sys; sys.argv = sys.argv[1:]\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "finally: assert not {'onnx', 'compressor'} & set(sys.modules)"
    call = [sys.executable, "-I", "-c", code, str(folder / "infer.py"), *map(str, words)]
    return subprocess.run(call, capture_output=True, text=True, timeout=120, cwd=folder.parent)


@pytest.fixture
def update(pictures: Case, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, Path]:
    """A package, the new model, and the delta that the command makes of the two."""
    from compressor.cli import main

    folder = build(pictures).with_suffix("")
    model = onnx.load(folder / "model.onnx")
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[::-1].copy(), tensor.name))
    onnx.save(model, tmp_path / "new.onnx")
    words = ["delta", "make", folder, tmp_path / "new.onnx", "--exact", "--out", tmp_path / "update.delta"]
    monkeypatch.setattr(sys, "argv", ["compress-for-device", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    return folder, tmp_path / "new.onnx", tmp_path / "update.delta"


def test_the_package_answers_like_the_new_model_and_stays_as_it_is(
    update: tuple[Path, Path, Path], pictures: Case, tmp_path: Path
) -> None:
    folder, new, delta = update
    before = (folder / "model.onnx").read_bytes()
    sample = dict(pictures[2].samples[0])
    np.save(tmp_path / "input.npy", sample["image"])
    done = run(folder, tmp_path / "input.npy", "--delta", delta, "--out", tmp_path / "out.npz", "--json")
    assert done.returncode == 0, done.stderr
    wanted = onnxruntime.InferenceSession(new, providers=["CPUExecutionProvider"]).run(None, sample)[0]
    assert np.array_equal(np.load(tmp_path / "out.npz")["logits"], wanted)
    checked = run(folder, "--self-check", "--delta", delta, "--json")
    assert checked.returncode == 0, checked.stdout
    assert json.loads(checked.stdout) == {"passed": True, "samples": 3, "worst": 0.0, "tolerance": 1e-4, "problems": []}
    assert (folder / "model.onnx").read_bytes() == before


def test_another_model_is_refused(update: tuple[Path, Path, Path], tmp_path: Path) -> None:
    folder, new, delta = update
    (folder / "model.onnx").write_bytes(new.read_bytes())
    refused = run(folder, "--delta", delta, "--self-check")
    assert refused.returncode in (1, 2)
    np.save(tmp_path / "input.npy", np.zeros((1, 3, 12, 10), np.float32))
    refused = run(folder, tmp_path / "input.npy", "--delta", delta)
    assert refused.returncode == 2
    assert "not the file that this delta was made against" in refused.stderr
    refused = run(folder, tmp_path / "input.npy", "--delta", folder / "README.md")
    assert refused.returncode == 2
    assert "is not a delta" in refused.stderr


def test_delta_py_writes_the_updated_file(update: tuple[Path, Path, Path], tmp_path: Path) -> None:
    folder, new, delta = update
    words = [sys.executable, "-I", folder / "delta.py", folder / "model.onnx", delta, tmp_path / "out.onnx"]
    subprocess.run(list(map(str, words)), check=True, capture_output=True)
    made, wanted = (onnx.load(path).graph.initializer for path in (tmp_path / "out.onnx", new))
    assert all(
        np.array_equal(numpy_helper.to_array(a), numpy_helper.to_array(b)) for a, b in zip(made, wanted, strict=True)
    )
