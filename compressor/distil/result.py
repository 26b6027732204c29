"""What a distillation leaves behind, and the events it sends while it runs. No torch at import time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from compressor.types import LayerFact

Event = Mapping[str, float | int | str | bool]
OnEvent = Callable[[str, Event], None]
"""``(kind, fields)``: ``resume``, ``precision``, ``teacher``, ``note``, ``progress``, ``epoch``."""


def ignore(kind: str, fields: Event) -> None:
    """An ``OnEvent`` that does nothing."""


@dataclass(frozen=True)
class EpochRecord:
    """One epoch. ``loss`` and ``terms`` are means over its steps; ``terms`` are weighted, so they add up to ``loss``.

    ``seconds`` is training alone, without validation and checkpoints. ``score`` is the validation score, if asked for.
    ``values``: scheduled weights and options at the last step.
    """

    epoch: int
    steps: int
    seconds: float
    loss: float
    learning_rate: float
    score: float | None = None
    terms: Mapping[str, float] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class DistilResult:
    """The student was trained in place; this is how.

    ``best_epoch``: the epoch (from 0) whose weights the student has. ``teacher_forwards``: samples the teacher was run
    on. ``cached``: the teacher's outputs came from the bank, which takes ``cache_bytes``. ``precision``: ``fp32`` or
    ``bf16``. ``record``: steps that add to the student's structure what objectives left in it; ``facts``: as rows.
    ``choosing_forwards``: samples the student was run on by data strategies, beyond those it was trained on.
    """

    history: tuple[EpochRecord, ...]
    best_epoch: int
    seconds: float
    steps: int
    teacher_forwards: int
    cached: bool
    cache_bytes: int
    precision: str
    record: tuple[Mapping[str, Any], ...] = ()
    facts: tuple[LayerFact, ...] = ()
    choosing_forwards: int = 0
