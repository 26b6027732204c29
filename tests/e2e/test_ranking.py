"""Objectives on queries and passages train from files, and the student that ships gives shorter vectors."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.test_tasks import Command, answer, package, rows, texts
from tests.unit.models.conftest import bert_folder, encoder_folder  # noqa: F401  (fixtures)

pytestmark = [pytest.mark.train, pytest.mark.slow]
RECIPE = """
name = "ranking"
profiles = ["this-machine"]
[teacher]
model = "{model}"
task = "retrieval"
[data]
source = "{source}"
text = "question"
text_pair = "passage"
label = "right"
score = "teacher"
validation = 24
calibration = 16
near_duplicates = "off"
[accept]
max_drop = 0.9
[[stage]]
kind = "student"
keep_layers = 2
[[stage]]
kind = "distil"
epochs = 2
batch = 24
learning_rate = 3e-3
labels = 0.5
negatives = {{ count = 2 }}
{objectives}
[[stage]]
kind = "quantize"
engines = ["onnxruntime"]
schemes = ["dynamic"]
samples = 16
"""
OBJECTIVES = """
[[stage.objective]]
use = "homomorphic-projection"
options = { size = 8 }
[[stage.objective]]
use = "margin-mse"
options = { student = "dot", teacher = "offline" }
[[stage.objective]]
use = "score-mse"
options = { student = "cosine", teacher = "offline" }
[[stage.objective]]
use = "list-kl"
options = { student = "cosine", teacher = "cosine" }
[[stage.objective]]
use = "additive-margin"
[[stage.objective]]
use = "adaptive-margin"
"""


def search(path: Path) -> Path:
    """Queries with a right passage and three wrong ones, each with a score; one passage answers nothing."""
    random = np.random.default_rng(0)
    with path.open("w", newline="") as stream:
        lines = csv.writer(stream)
        lines.writerow(["question", "passage", "right", "teacher"])
        for text in texts(60):
            wrong = [" ".join(random.permutation(text.split())) + f" {word}" for word in ("bad", "dull", "noisy")]
            for place, passage in enumerate([text, *wrong]):
                lines.writerow([text.split()[0] + " " + text, passage, int(place == 0), round(1 - place / 4, 2)])
        lines.writerow(["", "a film that nothing asks for", "", ""])
    return path


def test_ranking_objectives_train_from_files(command: Command, encoder_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    recipe = tmp_path / "ranking.toml"
    source = search(tmp_path / "search.csv")
    recipe.write_text(RECIPE.format(model=encoder_folder, source=source, objectives=OBJECTIVES))
    result = command("run", str(recipe), "--json", timeout=600)
    assert result.returncode in (0, 3), result.stdout[-3000:] + result.stderr[-3000:]
    found = json.loads(result.stdout)
    measured = rows(found)
    assert found["report"]["metric"] == "nDCG@10"
    assert 0 < measured["null-twin/fp32"]["test"]["value"] <= 1
    assert len(answer(package(found, tmp_path), "a good film")["embedding"]) == 8
    (history,) = (tmp_path / "build" / "store").glob("distil-*/history.json")
    first, last = (json.loads(history.read_text())[at]["terms"] for at in (0, -1))
    assert set(first) == {"labels", "homomorphic-projection", "margin-mse", "score-mse", "list-kl", "additive-margin",
                          "adaptive-margin"}  # fmt: skip
    assert all(np.isfinite(value) and value > 0 for value in first.values())
    assert last["margin-mse"] < first["margin-mse"]
    assert last["labels"] < first["labels"]
