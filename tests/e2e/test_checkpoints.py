"""Hugging Face checkpoints of the three tasks through the one-line form: small real ones with random weights."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.models.conftest import bert_folder, encoder_folder, vit_folder  # noqa: F401  (fixtures)

pytestmark = [pytest.mark.train, pytest.mark.slow]
Command = Callable[..., "subprocess.CompletedProcess[str]"]
WORDS = ["quiet", "wonder", "dull", "noisy", "film", "actors", "wonderful", "story", "heart", "laugh", "good", "bad"]


def sentences(path: Path, count: int, labelled: bool) -> Path:
    random = np.random.default_rng(3)
    texts = {" ".join(random.choice(WORDS, random.integers(3, 12))) for _ in range(count)}
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label"] if labelled else ["text"])
        for text in sorted(texts):
            writer.writerow([text, "good" if "wonderful" in text or "good" in text else "bad"] if labelled else [text])
    return path


def run(command: Command, *words: str) -> dict[str, Any]:
    result = command("run", *words, "--profile", "this-machine", "--max-drop", "90%", "--json")
    assert result.returncode in (0, 3), result.stdout[-3000:] + result.stderr[-3000:]  # 3: too small to be faster
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def rows(found: dict[str, Any]) -> dict[str, Any]:
    return {row["artifact"]: row for row in found["report"]["outcomes"][0]["rows"]}


def self_check(found: dict[str, Any], folder: Path) -> None:
    package = (folder / found["packages"]["this-machine"]).with_suffix("")
    check = subprocess.run(
        [sys.executable, "infer.py", "--self-check"], cwd=package, capture_output=True, text=True, check=False
    )
    assert check.returncode == 0, check.stdout + check.stderr


def test_text_classification(command: Command, bert_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    data = sentences(tmp_path / "reviews.csv", 400, labelled=True)
    found = run(command, "--model", str(bert_folder), "--data", str(data))
    made = rows(found)
    assert {"teacher/fp32", "null-twin/fp32", "student/fp32"} <= set(made)
    assert any("int8-dynamic" in name for name in made)
    assert found["report"]["teacher"]["licence"] == "apache-2.0"
    artifacts = found["report"]["artifacts"]
    assert artifacts["student/fp32"]["parameters"] < artifacts["teacher/fp32"]["parameters"]
    self_check(found, tmp_path)
    assert Path(tmp_path / found["run"] / "recipe.toml").is_file()


def test_sentence_embedding(command: Command, encoder_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    data = sentences(tmp_path / "texts.csv", 300, labelled=False)
    found = run(command, "--model", str(encoder_folder), "--data", str(data), "--task", "sentence-embedding")
    teacher = rows(found)["teacher/fp32"]
    assert teacher["validation"]["value"] == pytest.approx(1.0)  # against itself
    assert found["report"]["metric"] == "Spearman against teacher"
    self_check(found, tmp_path)


def test_image_classification_from_folders(command: Command, vit_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    from PIL import Image

    random = np.random.default_rng(0)
    for number in range(180):
        name = ("cat", "dog", "owl")[number % 3]
        folder = tmp_path / "pictures" / name
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 120, (20, 20, 3)) + np.array([[100, 0, 0], [0, 100, 0], [0, 0, 100]])[number % 3]
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    found = run(command, "--model", str(vit_folder), "--data", str(tmp_path / "pictures"))
    assert found["report"]["task"] == "image-classification"
    assert found["report"]["data"]["sizes"]["train"] > 100
    self_check(found, tmp_path)
