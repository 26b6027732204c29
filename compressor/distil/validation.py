"""The score by which epochs are chosen when the caller brings none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from compressor.data.types import Split
from compressor.distil.precision import Numerics
from compressor.distil.result import OnEvent
from compressor.distil.stream import UNLABELLED, TrainingSet

PLAIN = Numerics("fp32", channels_last=False)
Score = Callable[[nn.Module], float]


def validation_accuracy(split: Split | None, device: Any, on_event: OnEvent) -> Score | None:
    """Share of labelled validation samples the module gets right; None when there are no labels to judge by."""
    if split is None or split.labels is None or len(split) == 0:
        on_event("note", {"text": "patience needs a score or labelled validation samples; training all epochs"})
        return None
    held = TrainingSet([split])

    def accuracy(module: nn.Module) -> float:
        with torch.no_grad():
            right = 0
            for start in range(0, len(held), 256):
                positions = np.arange(start, min(start + 256, len(held)))
                guess = module(**PLAIN.place(held.batch(positions), device)).argmax(-1).cpu().numpy()
                right += int((guess == held.labels[positions]).sum())
            return right / int((held.labels != UNLABELLED).sum())

    return accuracy


__all__ = ["PLAIN", "Score", "validation_accuracy"]
