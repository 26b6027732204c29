"""The core installs without torch in under 350 MB and does everything that needs no training on an ONNX file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.conftest import ROOT
from tests.onnx_models import cnn

pytestmark = pytest.mark.slow
LIMIT_MB = 350


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh venv with the core only."""
    folder = tmp_path_factory.mktemp("core") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "-c", str(ROOT / "constraints.txt"), str(ROOT)], capture_output=True, text=True, check=False
    )
    if done.returncode and "connection" in done.stderr.lower():
        pytest.skip(f"no package index: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return folder


def run(core: Path, folder: Path, *words: str) -> Any:
    command = [str(core / "bin" / "compress-for-device"), *words, "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def installed_bytes(core: Path) -> int:
    """What the installation added: everything but pip and setuptools, which every venv has."""
    site = next(core.glob("lib/python3*/site-packages"))
    files = [path for path in site.rglob("*") if path.is_file() and not path.is_symlink()]
    return sum(path.stat().st_size for path in files if path.relative_to(site).parts[0] not in {"pip", "setuptools"})


def test_the_core_is_light_and_has_no_torch(core: Path) -> None:
    site = next(core.glob("lib/python3*/site-packages"))
    assert not (site / "torch").exists()
    size = installed_bytes(core) / 1e6
    assert size < LIMIT_MB, f"{size:.0f} MB"


def test_profiles_targets_and_doctor(core: Path, tmp_path: Path) -> None:
    run(core, tmp_path, "doctor")
    run(core, tmp_path, "targets")
    listed = run(core, tmp_path, "profiles", "list")
    assert "this-machine" in {item["name"] for item in listed}
    assert run(core, tmp_path, "methods", "show", "kd")["name"] == "kd"


def test_an_onnx_file_is_profiled_quantized_measured_and_packaged(core: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    cnn(tmp_path / "net.onnx")
    shape = (160, 3, 16, 16)
    np.savez(
        tmp_path / "data.npz",
        image=generator.standard_normal(shape).astype(np.float32),
        label=generator.integers(0, 10, 160),
    )
    assert run(core, tmp_path, "profile", "net.onnx")
    words = ["--model", "net.onnx", "--data", "data.npz", "--profile", "this-machine", "--max-drop", "20%"]
    run(core, tmp_path, "plan", *words)
    found = run(core, tmp_path, "run", *words)
    package = Path(str(found["packages"]["this-machine"]))
    assert (tmp_path / package).is_file()
    folder = (tmp_path / package).with_suffix("")
    check = subprocess.run(
        [str(core / "bin" / "python"), "infer.py", "--self-check"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert check.returncode == 0, check.stdout + check.stderr
