"""Several distil stages, each with its own settings, trained by two processes through the real command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import environment

pytestmark = [pytest.mark.train, pytest.mark.slow]
WORDS = ["--model", "tests.e2e.nets:teacher", "--data", "tests.e2e.nets:load"]
RECIPE = """
name = "stages"
profiles = ["this-machine"]
[teacher]
task = "image-classification"
[data]
validation = 80
calibration = 40
[accept]
max_drop = 0.9
[[stage]]
kind = "prune"
ratio = 0.5
[[stage]]
kind = "distil"
epochs = 2
batch = 50
labels = 0.0
accumulate = 2
freeze = ["head.*"]
[[stage.objective]]
use = "soft-ce"
[[stage]]
kind = "distil"
epochs = 2
batch = 50
optimiser = "sgd"
labels = { kind = "linear", from = 0.0, to = 1.0 }
unfreeze = ["head.*", "*"]
strategy = [{ use = "subset", fraction = 0.5 }, { use = "mixup" }]
[[stage.objective]]
use = "soft-ce"
weight = { kind = "linear", from = 1.0, to = 0.0 }
"""


def run(recipe: Path, out: Path, launcher: list[str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, "-m", "compressor.cli", "run", str(recipe), *WORDS, "--out", str(out), *words]
    process = subprocess.Popen(
        command, cwd=recipe.parent, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    try:
        stdout, stderr = process.communicate(timeout=900)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the launcher's children too
        raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def test_two_processes_and_two_stages_through_the_command(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    recipe, out = tmp_path / "stages.toml", tmp_path / "out"
    recipe.write_text(RECIPE)
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = run(recipe, out, two, "--tracker", "tensorboard")
    assert done.returncode in (0, 1), done.stderr  # 1: the launcher's word for a promise that was missed
    (folder,) = (out / "runs").iterdir()
    assert (folder / "report.html").is_file(), done.stderr
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events].count("run-start") == 1  # the second process wrote nothing
    stages = [event["stage"] for event in events if event["event"] == "stage-done"]
    assert stages[:6] == ["export-teacher", "prune", "distil", "null-twin", "distil", "null-twin"]
    assert not list(out.glob("store/*.partial"))
    keys = [event["key"] for event in events if event["event"] == "stage-done" and event["stage"] == "distil"]
    first, second = (json.loads((out / "store" / f"distil-{key}" / "history.json").read_text()) for key in keys)
    assert set(first[0]["terms"]) == {"soft-ce"}
    assert second[-1]["values"] == {"labels.weight": 1.0, "soft-ce.weight": 0.0}
    assert second[0]["steps"] * 2 <= first[0]["steps"] + 1
    assert list((folder / "trackers").rglob("events.out.tfevents*"))
    again = run(recipe, out, [])
    assert "distil: reused" in again.stderr  # one process finds what two have done
