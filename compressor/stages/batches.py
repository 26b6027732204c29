"""A part of the data as tensors, one batch in memory at a time. Needs torch when it is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from compressor.data.types import Split
from compressor.types import Inputs


def tensors(inputs: Inputs) -> dict[str, Any]:
    """Arrays as torch tensors."""
    import torch

    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()}


@dataclass(frozen=True)
class Batches:
    """The first ``count`` samples of a part in batches of ``size``; every reading makes them anew."""

    part: Split
    count: int
    size: int = 32

    def __iter__(self) -> Iterator[dict[str, Any]]:
        last = min(self.count, len(self.part))
        for start in range(0, last, self.size):
            yield tensors(self.part.batch(np.arange(start, min(start + self.size, last))))
