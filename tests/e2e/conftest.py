"""Runs of the real command in child processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

RECIPE = """
name = "tiny"
profiles = ["this-machine"]
[teacher]
task = "image-classification"
[data]
validation = 80
calibration = 40
[accept]
max_drop = 0.2
[[stage]]
kind = "prune"
ratio = 0.5
[[stage]]
kind = "distil"
epochs = 2
batch = 50
[[stage.objective]]
use = "kd"
[[stage]]
kind = "quantize"
engines = ["onnxruntime"]
samples = 32
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    return path


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def arguments(*words: str) -> list[str]:
    return [sys.executable, "-m", "compressor.cli", *words]


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``compress-for-device WORDS`` in the test's own folder."""

    def run(*words: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            arguments(*words),
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run
