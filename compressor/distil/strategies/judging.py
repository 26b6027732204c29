"""What the two models say of samples, for strategies that choose: evaluation mode, no gradients, no augmentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.distil.stream import UNLABELLED, TrainingSet
from compressor.models.signals import output_mask
from compressor.types import Array

CHUNK = 256  # samples of one call
Taught = Callable[[Array, Mapping[str, Tensor]], Tensor]  # positions, inputs -> the teacher's logits


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every part is put back as it was."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True


class Judges:
    """The student and the teacher on the training samples."""

    def __init__(self, student: nn.Module, taught: Taught, load: Callable[[Array], dict[str, Tensor]]) -> None:
        self._student, self._taught, self._load = student, taught, load
        self.tried = 0  # samples the student was run on

    def student(self, positions: Array) -> tuple[Tensor, Tensor | None]:
        """Logits (B, C) or (B, T, C) and mask (B, T)."""
        inputs = self._load(positions)
        self.tried += len(positions)
        with evaluating(self._student):
            return self._student(**inputs).float().cpu(), _mask(inputs)

    def teacher(self, positions: Array) -> tuple[Tensor, Tensor | None]:
        """Logits (B, C) or (B, T, C) and mask (B, T)."""
        inputs = self._load(positions)
        with torch.no_grad():
            return self._taught(positions, inputs).float().cpu(), _mask(inputs)

    def losses(self, data: TrainingSet, positions: Array) -> tuple[Array, Array]:
        """Loss of both models, float64 (B,): against the label, or against the teacher where there is none."""
        found = []
        for start in range(0, len(positions), CHUNK):
            chunk = positions[start : start + CHUNK]
            own, mask = self.student(chunk)
            taught, _ = self.teacher(chunk)
            labels = torch.from_numpy(data.labels[chunk])
            found.append([_losses(logits, taught, labels, mask).double().numpy() for logits in (own, taught)])
        student, teacher = (np.concatenate(part) for part in zip(*found, strict=True))
        return student, teacher


def _mask(inputs: Mapping[str, Tensor]) -> Tensor | None:
    mask = output_mask(inputs)
    return None if mask is None else mask.cpu()


def _losses(logits: Tensor, taught: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
    soft = -(torch.softmax(taught, -1) * torch.log_softmax(logits, -1)).sum(-1)
    if soft.dim() == 2:
        keep = torch.ones_like(soft) if mask is None else mask.to(soft.dtype)
        return (soft * keep).sum(1) / keep.sum(1).clamp_min(1)
    if labels.dim() != 1 or labels.is_floating_point():
        return soft
    hard = F.cross_entropy(logits, labels.clamp_min(0), reduction="none")
    return torch.where(labels != UNLABELLED, hard, soft)
