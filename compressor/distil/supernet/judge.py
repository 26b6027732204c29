"""The proxy of a super-net's search: distillation loss of sub-nets on held-out samples, with inherited weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compressor.distil.objectives.base import Batch, Signals, Step, Term
from compressor.distil.step import label_term
from compressor.distil.stream import UNLABELLED, TrainingSet
from compressor.distil.terms import Weighted
from compressor.models.signals import output_mask
from compressor.schedule import Schedule

Inputs = Mapping[str, Tensor]
Student = Callable[[Inputs], Signals]
BATCH = 64  # samples; the teacher sees each batch once, however many sub-nets there are


@dataclass(frozen=True)
class Judge:
    """Everything that the loss of a sub-net is made of; weights that change count with their last value."""

    held: TrainingSet
    samples: int
    place: Callable[[Mapping[str, np.ndarray]], Inputs]
    teacher: Callable[[Inputs], Signals] | None
    objectives: Sequence[Weighted]
    label_weight: float | Schedule

    def __call__(self, students: Sequence[Student]) -> list[dict[str, float]]:
        """The weighted terms of each student by name, means over what each counts; their sum is the loss."""
        totals = [{name: [0.0, 0.0] for name, _ in self._weights()} for _ in students]
        with torch.no_grad():
            for inputs, batch in self._batches():
                taught = self.teacher(inputs) if self.teacher is not None else {}
                for total, student in zip(totals, students, strict=True):
                    for name, term in self._terms(student(inputs), taught, batch):
                        total[name][0] += float(term.sum)
                        total[name][1] += float(term.count)
        weights = dict(self._weights())
        return [
            {name: weights[name] * value / max(count, 1.0) for name, (value, count) in total.items()}
            for total in totals
        ]

    def _weights(self) -> Iterator[tuple[str, float]]:
        if self._labelled:
            yield "labels", last(self.label_weight)
        for number, item in enumerate(self.objectives):
            yield f"{item.name}#{number}", last(item.weight)

    @property
    def _labelled(self) -> bool:
        return bool(self.label_weight) and bool((self.held.labels != UNLABELLED).any())

    def _batches(self) -> Iterator[tuple[Inputs, Batch]]:
        count = min(self.samples, len(self.held))
        for start in range(0, count, BATCH):
            positions = np.arange(start, min(start + BATCH, count))
            inputs = self.place(self.held.batch(positions))
            labels = torch.from_numpy(self.held.labels[positions]).to(next(iter(inputs.values())).device)
            yield inputs, Batch(labels, output_mask(inputs))

    def _terms(self, own: Signals, taught: Signals, batch: Batch) -> Iterator[tuple[str, Term]]:
        if self._labelled:
            yield "labels", label_term(own["logits"], batch)
        for number, item in enumerate(self.objectives):
            yield f"{item.name}#{number}", item.objective(own, taught, batch, Step(0, 1, 0))


def last(weight: float | Schedule) -> float:
    """A weight as it is at the end of the run."""
    return weight.final if isinstance(weight, Schedule) else float(weight)


def shown(terms: Mapping[str, float]) -> str:
    """``loss 0.3128 (soft-ce 0.2811, hidden 0.0317)``."""
    parts = ", ".join(f"{name.partition('#')[0]} {value:.4f}" for name, value in terms.items())
    return f"loss {sum(terms.values()):.4f} ({parts})"


__all__ = ["Judge", "Student", "last", "shown"]
