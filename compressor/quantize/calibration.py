"""Which samples calibrate: as many as the recipe asks for, balanced over the classes, and on record."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compressor.types import Array


@dataclass(frozen=True)
class Chosen:
    """Positions in the calibration split, and in words how they were chosen."""

    index: Array
    rule: str


def choose(labels: Array | None, total: int, size: int) -> Chosen:
    """At most ``size`` of ``total`` samples. With labels one class after the other gives a sample, so that rare classes
    widen the ranges as well; the split itself is random, so that without one class a sample its first samples do.

    >>> choose(np.array([0, 0, 0, 1, 0]), 5, 2).index.tolist()
    [0, 3]
    """
    size = min(size, total)
    if labels is None or labels.ndim != 1 or size == total or len(np.unique(labels)) < 2:
        return Chosen(np.arange(size), f"{size} of {total} samples")
    turn = np.empty(total, np.int64)  # the how-manieth of its class each sample is
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        turn[places] = np.arange(len(places))
    order = np.lexsort((np.arange(total), turn))
    return Chosen(np.sort(order[:size]), f"{size} of {total} samples, balanced over {len(np.unique(labels))} classes")
