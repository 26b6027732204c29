"""Trackers write real files of their packages; an absent package gives the line that installs it."""

from __future__ import annotations

import importlib.util

import pytest

from compressor.distil import trackers
from compressor.errors import ConfigError

EVENTS = [
    ("stage-start", {"stage": "distil"}),
    ("epoch", {"epoch": 0, "loss": 0.75, "score": 0.5, "term kd": 0.25}),
    ("epoch", {"epoch": 1, "loss": 0.5, "score": 0.75, "term kd": 0.125}),
    ("stage-start", {"stage": "null-twin"}),
    ("epoch", {"epoch": 0, "loss": 1.5}),
]


def told(name, folder):
    seen = []
    with trackers.tracking(name, folder, "toy", lambda kind, data: seen.append(kind)) as listen:
        for kind, data in EVENTS:
            listen(kind, data)
    assert seen == [kind for kind, _ in EVENTS]


@pytest.mark.train
def test_tensorboard(tmp_path):
    pytest.importorskip("accelerate")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    told("tensorboard", tmp_path)
    found = accumulator.EventAccumulator(str(tmp_path / "toy")).Reload()
    assert [(item.step, item.value) for item in found.Scalars("distil/loss")] == [(0, 0.75), (1, 0.5)]
    assert found.Scalars("distil/term/kd")[1].value == 0.125
    assert found.Scalars("null-twin/loss")[0].value == 1.5


@pytest.mark.train
def test_mlflow(tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    told("mlflow", tmp_path)
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.data.metrics["distil/loss"] == 0.5
    assert run.data.metrics["null-twin/loss"] == 1.5


def test_without_a_tracker_events_pass_through(tmp_path):
    told(None, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unknown_and_absent_trackers(monkeypatch):
    with pytest.raises(ConfigError, match="one of mlflow, tensorboard"):
        trackers.check("wandbb")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="not installed") as caught:
        trackers.check("mlflow")
    assert caught.value.hint == "pip install mlflow"
