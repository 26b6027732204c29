"""What is compared: an arm (one way to train one student), and rows that set one arm against another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

RATES = 3e-3, 1e-2  # each arm's learning rate is the better of the two on validation
VERSION = 1  # raise it when data, networks or the loop of the bench change: older scores are not read then

Bench = Literal["vision", "text"]


@dataclass(frozen=True)
class Arm:
    """How one student is made and trained.

    ``labelled`` and ``transfer`` count samples; ``stage`` holds keys of a distil stage; ``teacher`` names the one that
    teaches (empty: labels alone). ``start`` is where the student's weights come from, ``after`` an arm whose trained
    student goes on.
    """

    labelled: int
    stage: Mapping[str, Any]
    teacher: str = ""
    transfer: int = 0
    data: str = "ten"
    network: str = "student"
    start: str = "random"
    after: Arm | None = None
    steps: int = 400
    rates: tuple[float, ...] = RATES
    bench: Bench = "vision"

    @property
    def key(self) -> str:
        """Digest of everything that the scores depend on."""
        text = json.dumps([VERSION, asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Row:
    """A claim: ``ours`` is better than ``theirs`` in ``metric``, by more than ``margin``.

    A side may be a pair of arms: then it is the gain of the first over the second.
    """

    claim: str
    ours: Arm | tuple[Arm, Arm]
    theirs: Arm | tuple[Arm, Arm]
    metric: str = "accuracy"
    margin: float = 0.0
    robust: bool = False  # methods.md counts on it; the others are proposals that were never tested
    ids: str = ""  # rows of the methods catalogue
    note: str = field(default="", compare=False)

    @property
    def arms(self) -> tuple[Arm, ...]:
        """All arms that it needs."""
        sides = (side if isinstance(side, tuple) else (side,) for side in (self.ours, self.theirs))
        return tuple(arm for side in sides for arm in side)


def objective(use: str, weight: float = 1.0, match: Mapping[str, str] | None = None, **options: Any) -> dict[str, Any]:
    """One objective of a stage."""
    return {"use": use, "weight": weight, "options": options} | ({"match": dict(match)} if match else {})


def stage(labels: float, *objectives: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Keys of a distil stage."""
    return {"labels": labels, "objective": list(objectives), **more}


def kd(temperature: float, weight: float) -> dict[str, Any]:
    """Soft labels with ``weight`` beside the labels with the rest."""
    return stage(round(1 - weight, 3), objective("kd", weight, temperature=temperature))


LABELS = stage(1.0)
