"""A pass over a whole set for objectives that must see it before they can teach: batch by batch, nothing kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from compressor.distil.objectives.base import Batch, Seen
from compressor.distil.stream import TrainingSet
from compressor.distil.teachers import NoTeacher, TeacherSource
from compressor.models.signals import output_mask
from compressor.types import Array

PASS_BATCH = 128  # samples in memory at once


@dataclass(frozen=True)
class SetPass:
    """``passes(student=False)`` gives :class:`Seen` values in the order of the set (view 0 of an augmented one).

    The teacher's signals come from its source: from the bank when they are cached there, else from the teacher itself,
    which is run again by every pass. The student is run in evaluation mode, and only when asked for.
    """

    data: TrainingSet
    load: Callable[[Array, int], dict[str, Tensor]]
    teacher: TeacherSource
    student: nn.Module
    tap: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]

    def __call__(self, student: bool = False) -> Iterator[Seen]:
        self.teacher.prepare(0)
        training = [part for part in self.student.modules() if part.training]
        try:
            self.student.eval()
            for start in range(0, len(self.data), PASS_BATCH):
                yield self._seen(np.arange(start, min(start + PASS_BATCH, len(self.data))), student)
        finally:
            for part in training:
                part.training = True

    def _seen(self, positions: Array, student: bool) -> Seen:
        with torch.no_grad():
            inputs = self.load(positions, 0)
            taught = self.teacher.signals(positions, inputs, 0)
            own = self.tap(inputs) if student else {}
            labels = torch.from_numpy(self.data.labels[positions]).to(next(iter(inputs.values())).device)
            return Seen(taught, own, Batch(labels, output_mask(inputs)), positions)


def over(
    data: TrainingSet,
    load: Callable[[Array, int], dict[str, Tensor]],
    student: nn.Module,
    tap: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
) -> SetPass:
    """A pass that shows the student alone, over held-out samples for example."""
    return SetPass(data, load, NoTeacher(), student, tap)
