"""kill -9 at every stage: the next run goes on there and ends with the same bytes as an undisturbed run."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import arguments, environment

pytestmark = [pytest.mark.train, pytest.mark.slow]
WORDS = ["--model", "tests.e2e.nets:teacher", "--data", "tests.e2e.nets:load"]
FINISHED = (0, 3)  # 3: such a small student is not always measurably faster than its teacher
STAGES = ["export-teacher", "prune", "distil", "null-twin", "export-student", "export-null-twin", "quantize", "deploy"]


def start(recipe: Path, out: Path) -> subprocess.Popen[str]:
    command = arguments("run", str(recipe), *WORDS, "--out", str(out), "--json")
    return subprocess.Popen(
        command, cwd=recipe.parent, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def kill_when(process: subprocess.Popen[str], out: Path, stage: str, seconds: float = 90) -> None:
    """SIGKILL as soon as the log says that ``stage`` has begun."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        for log in out.glob("runs/*/log.jsonl"):
            if any(begins(line, stage) for line in log.read_text().splitlines()):
                process.send_signal(signal.SIGKILL)
                process.wait()
                return
        time.sleep(0.02)
    raise AssertionError(f"stage {stage} never began: {process.communicate()[1][-2000:]}")


def begins(line: str, stage: str) -> bool:
    try:
        event = json.loads(line)
    except ValueError:
        return False
    if stage == "deploy":
        return event["event"] == "deploy"
    return event["event"] == "stage-start" and str(event["stage"]).startswith(stage)


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of every student file in the store."""
    found = {}
    for result in sorted(out.glob("store/*/result.json")):
        data = json.loads(result.read_text())
        for name, digest in data["files"].items():
            if name.endswith((".safetensors", ".onnx")):
                found[f"{result.parent.name}/{name}"] = digest
    return found


def test_killed_at_every_stage_the_run_ends_with_the_same_bytes(recipe: Path, tmp_path: Path) -> None:
    undisturbed = start(recipe, tmp_path / "whole")
    stdout, stderr = undisturbed.communicate(timeout=240)
    assert undisturbed.returncode in FINISHED, stderr

    out = tmp_path / "killed"
    for stage in STAGES:
        kill_when(start(recipe, out), out, stage)
        for log in out.glob("runs/*/log.jsonl"):
            log.unlink()
    last = start(recipe, out)
    stdout, stderr = last.communicate(timeout=240)
    assert last.returncode in FINISHED, stderr
    assert digests(out) == digests(tmp_path / "whole")
    assert not list(out.glob("store/*.partial"))

    began = time.monotonic()
    again = start(recipe, out)
    stdout, stderr = again.communicate(timeout=240)
    assert again.returncode in FINISHED, stderr
    stages = json.loads(stdout)["report"]["stages"]
    assert stages
    assert all(stage["reused"] for stage in stages)
    assert time.monotonic() - began < 60


def test_two_runs_at_once_do_each_stage_once(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "both"
    both = [start(recipe, out), start(recipe, out)]
    reports = []
    for process in both:
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode in FINISHED, stderr
        reports.append(json.loads(stdout)["report"])
    made = [{stage["stage"]: stage["reused"] for stage in report["stages"]} for report in reports]
    assert made[0].keys() == made[1].keys()
    for stage in made[0]:
        assert made[0][stage] or made[1][stage], f"{stage} was done twice"
    assert reports[0]["outcomes"] == reports[1]["outcomes"]
