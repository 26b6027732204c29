"""Experiment trackers (TensorBoard, MLflow) through accelerate: they listen to the events of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compressor.errors import ConfigError

PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow"}  # tracker -> what `pip install` takes
Event = Callable[[str, Mapping[str, Any]], None]


def check(name: str) -> None:
    """Refuse an unknown tracker, or one whose package is absent, before anything is computed.

    Raises:
        ConfigError: with the line that installs it.
    """
    if name not in PACKAGES:
        known = ", ".join(sorted(PACKAGES))
        raise ConfigError.single("the command line", "--tracker", f"unknown tracker `{name}`; one of {known}")
    if find_spec(name) is None:
        raise ConfigError.single(
            "the command line", "--tracker", f"the package `{name}` is not installed",
            hint=f"pip install {PACKAGES[name]}",
        )  # fmt: skip


@contextmanager
def tracking(name: str | None, folder: Path, run_name: str, forward: Event) -> Iterator[Event]:
    """A listener that hands every event to ``forward`` and the figures of every epoch to the tracker.

    Curves are called ``<stage>/<figure>`` (``distil/loss``, ``null-twin/score``); the second distil stage is
    ``distil-2``.
    Files lie in ``folder``; MLflow follows ``MLFLOW_TRACKING_URI`` instead where it is set.
    """
    if name is None:
        yield forward
        return
    check(name)
    tracker = _opened(name, folder, run_name)
    stages: dict[str, int] = {}
    now = ""

    def listen(kind: str, data: Mapping[str, Any]) -> None:
        nonlocal now
        forward(kind, data)
        if kind == "stage-start":
            stage = str(data["stage"])
            stages[stage] = stages.get(stage, 0) + 1
            now = stage if stages[stage] == 1 else f"{stage}-{stages[stage]}"
        elif kind == "epoch":
            figures = {key: float(value) for key, value in data.items() if key != "epoch"}
            tracker.log({f"{now}/{key.replace(' ', '/')}": value for key, value in figures.items()}, int(data["epoch"]))

    try:
        yield listen
    finally:
        tracker.finish()


def _opened(name: str, folder: Path, run_name: str) -> Any:
    import torch
    from accelerate import PartialState
    from accelerate.tracking import MLflowTracker, TensorBoardTracker

    PartialState(cpu=not torch.cuda.is_available())
    folder.mkdir(parents=True, exist_ok=True)
    if name == "tensorboard":
        tracker = TensorBoardTracker(run_name, str(folder))
    else:
        _mlflow_store(folder.resolve())
        tracker = MLflowTracker(run_name, (folder / "artifacts").resolve().as_uri())
    tracker.start()
    return tracker


def _mlflow_store(folder: Path) -> None:
    """Where MLflow keeps its runs: what the user set, else a database in ``folder``, or files without SQLAlchemy."""
    import mlflow

    if "MLFLOW_TRACKING_URI" in os.environ:
        return
    if find_spec("sqlalchemy") and find_spec("alembic"):
        mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
    else:  # the skinny package has no database; it writes plain files only when it is told to
        os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
        mlflow.set_tracking_uri(folder.as_uri())
