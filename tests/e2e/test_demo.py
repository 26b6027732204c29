"""The demo as a newcomer meets it: one command, a table, a report, packages that give the report's answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.conftest import ROOT, environment

pytestmark = [pytest.mark.train, pytest.mark.slow]
WORDS = ["run", "recipes/digits.toml", "--model", "examples.digits.model:teacher", "--data", "examples.digits:load"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], Path]:
    """What the demo printed for people, and its report."""
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "compressor.cli", *WORDS, "--out", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = next((out / "runs").iterdir())
    return done.stdout, json.loads((run / "report.json").read_text()), run


def test_the_table_names_every_model_and_profile(demo: tuple[str, dict[str, Any], Path]) -> None:
    text, _, run = demo
    for word in (
        "teacher/fp32",
        "null-twin/fp32",
        "student/fp32",
        "this-machine",
        "raspberry-pi-5",
        "geforce-rtx-4070",
        "->",
    ):
        assert word in text
    assert f"{run}/report.html" in text
    assert "nan" not in text.lower().replace("finance", "")


def test_the_student_is_smaller_faster_and_keeps_the_promise(demo: tuple[str, dict[str, Any], Path]) -> None:
    _, report, _ = demo
    here = next(outcome for outcome in report["outcomes"] if outcome["profile"] == "this-machine")
    assert here["kept"]
    teacher = next(row for row in here["rows"] if row["artifact"].startswith("teacher"))
    shipped = next(row for row in here["rows"] if row["shipped"])
    assert shipped["file_bytes"]["value"] * 5 < teacher["file_bytes"]["value"]
    assert shipped["speedup"]["value"] > 1
    assert shipped["latency"]["origin"] == "measured"
    assert teacher["validation"]["value"] - shipped["validation"]["value"] <= 0.01


def test_figures_of_devices_that_are_not_here_say_so(demo: tuple[str, dict[str, Any], Path]) -> None:
    _, report, _ = demo
    for outcome in report["outcomes"]:
        if outcome["profile"] == "this-machine":
            continue
        for row in outcome["rows"]:
            assert "reason" in row["latency"], row
            if row["shipped"] and "origin" in row["test"]:
                assert row["test"]["origin"] == "proxy"


def test_the_package_repeats_the_reported_accuracy(demo: tuple[str, dict[str, Any], Path]) -> None:
    """Through the packaged infer.py alone, on the whole test set."""
    from examples.digits import load

    _, report, run = demo
    package = run / "packages" / "this-machine"
    assert (run / "packages" / "this-machine.zip").is_file()
    pixels, labels = load()["test"]
    files = []
    for number, picture in enumerate(pixels):
        path = run / "pictures" / f"{number}.npy"
        path.parent.mkdir(exist_ok=True)
        np.save(path, picture)
        files.append(str(path))
    done = subprocess.run(
        [sys.executable, "infer.py", "--json", *files], cwd=package, capture_output=True, text=True, check=True
    )
    answers = json.loads(done.stdout)
    guesses = [int(answer["label"]) for answer in answers]
    here = next(outcome for outcome in report["outcomes"] if outcome["profile"] == "this-machine")
    shipped = next(row for row in here["rows"] if row["shipped"])
    assert np.mean(np.array(guesses) == labels) == pytest.approx(shipped["test"]["value"], abs=1e-9)


def test_report_and_package_can_be_made_again(demo: tuple[str, dict[str, Any], Path]) -> None:
    _, _, run = demo
    for words in (["report", str(run)], ["package", str(run), "--profile", "this-machine"]):
        command = [sys.executable, "-m", "compressor.cli", *words]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
