"""``--help`` is light: no torch, half a second."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

HEAVY = ("torch", "transformers", "nncf", "datasets", "onnxruntime", "onnx")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['compress-for-device', '--help']\n"
        "from compressor.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        f"print([name for name in {HEAVY} if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    assert "Make a trained network small" in result.stdout
    for command in ("run", "plan", "profile", "targets", "profiles", "methods", "report", "package", "delta", "doctor"):
        assert command in result.stdout


def test_help_costs_little_more_than_its_argument_parser() -> None:
    """Measured as a ratio of processor times in one run: importing the command against importing typer alone."""

    def seconds(code: str) -> float:
        timed = f"import time; began = time.process_time()\n{code}\nprint(time.process_time() - began)"
        runs = [
            subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True, check=True) for _ in range(5)
        ]
        return min(float(run.stdout) for run in runs)

    assert seconds("import compressor.cli.app") < 2 * seconds("import typer")


def test_the_version_is_told() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "compressor.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == f"compress-for-device {version('compress-for-device')}"
