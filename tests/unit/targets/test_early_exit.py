"""A file that leaves early on its way through a deployment: shares, mean latency, and the gate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from compressor.evaluate import ArrayEvalSet
from compressor.export.exits import chosen, early_exit
from compressor.profile import load_profile
from compressor.types import Artifact, Format, Measurement, TensorSpec, Unavailable, file_digest
from targets import registry
from targets.deploy import Candidates, EvaluationData, deploy
from targets.exits import sentence, shares
from targets.measure import Settings, mean_ratio_interval
from targets.outcome import Promise
from tests.unit.export.test_exits import EXITS, run, three_exits

SETTINGS = Settings(turn_ms=1, min_rounds=16, max_rounds=16, min_s=0, warm_budget_s=0.1, precision=1.0)
WIDTH, CLASSES = 8, 5


def described(path: Path, name: str, early: bool = False) -> Artifact:
    outputs = (TensorSpec("logits", "float32", ("batch", CLASSES)),)
    more = (TensorSpec("exit", "int64", ("batch",)),) if early else ()
    return Artifact(
        name, "student" if "/" in name else "teacher", path, Format.ONNX, "fp32-early-exit" if early else "fp32",
        (TensorSpec("x", "float32", ("batch", WIDTH)),), (*outputs, *more), file_digest(path), 0,
        {"exit threshold": "0.7"} if early else {},
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exits") / "whole.onnx"
    onnx.save(three_exits(), path)
    return path


def deployed(whole: Path, profile: str, out: Path, promise: Promise) -> tuple[object, np.ndarray]:
    path = out / "early.onnx"
    onnx.save(early_exit(onnx.load(whole), EXITS, 0.7), path)
    x = np.random.default_rng(3).normal(size=(64, WIDTH)).astype(np.float32)
    outputs = run(onnx.load(whole), x)
    answer, number = chosen([outputs[name] for name in EXITS], outputs["logits"], 0.7)
    data = EvaluationData(
        "image-classification", ArrayEvalSet({"x": x}, answer.argmax(1)),
        ArrayEvalSet({"x": x[:40]}, answer[:40].argmax(1)),
        latency_inputs=[{"x": x[i : i + 1]} for i in range(16)],
    )  # fmt: skip
    files = Candidates(
        described(whole, "teacher"), None, described(whole, "student/fp32"), (described(path, "student/early", True),)
    )
    target = load_profile(profile)
    return deploy(target, registry.get(target.target), files, data, promise, out, settings=SETTINGS), number


def test_accuracy_shares_and_mean_latency_of_the_file(whole: Path, tmp_path: Path) -> None:
    outcome, number = deployed(whole, "this-machine", tmp_path, Promise(max_drop=0.5, max_latency_ms=1e-6))
    row = next(row for row in outcome.rows if row.artifact.name == "student/early")
    assert row.validation.value == 1.0, "the file's own answers, measured"
    found = {name: part for name, part in row.validation.detail.items() if name.startswith("left")}
    assert found == pytest.approx(shares(number))
    assert sum(found.values()) == pytest.approx(1.0)
    assert row.latency.detail["statistic"] == "mean"
    assert row.latency.value == row.latency.detail["mean"]
    assert row.latency.detail["ci95_low"] < row.latency.value < row.latency.detail["ci95_high"]
    assert row.speedup.detail["statistic"] == "ratio of means"
    teacher = next(row for row in outcome.rows if row.artifact.role == "teacher")
    assert "statistic" not in teacher.latency.detail
    assert "its mean is" in row.reason
    told = next(note for note in outcome.notes if note.startswith("student/early"))
    assert "left at exit 0" in told
    assert "p95" in told
    assert told == sentence(row)
    assert not sentence(teacher)
    shown = [row.test for row in outcome.rows if isinstance(row.test, Measurement)]
    assert all("left at exit 0" not in figure.detail for figure in shown if figure is not row.test)


def test_without_latency_it_is_not_chosen(whole: Path, tmp_path: Path) -> None:
    outcome, _ = deployed(whole, "raspberry-pi-5", tmp_path, Promise(max_drop=0.9))
    row = next(row for row in outcome.rows if row.artifact.name == "student/early")
    assert isinstance(row.latency, Unavailable)
    assert outcome.shipped.artifact.name == "student/fp32"
    assert "what leaving early saves is not known" in row.reason


def test_interval_of_a_ratio_of_means() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        slow = random.gamma(9.0, 1.0, 128)
        fast = slow * random.choice([0.4, 1.0], 128) * random.normal(1.0, 0.05, 128)
        low, high = mean_ratio_interval(slow.tolist(), fast.tolist())
        covered += low <= 1 / 0.7 <= high
    assert 180 <= covered <= 199
