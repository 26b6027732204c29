"""Parts of the data as tensors, batch by batch."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from compressor.stages.batches import Batches  # noqa: E402
from compressor.types import Array, Inputs  # noqa: E402

pytestmark = pytest.mark.train


class Counting:
    """A split of the numbers from 0 that remembers what was asked of it."""

    name, labels, digests = "calibration", None, np.zeros(0, "S16")

    def __init__(self, size: int) -> None:
        self.size, self.asked = size, [0][:0]

    def __len__(self) -> int:
        return self.size

    def batch(self, index: Array) -> Inputs:
        self.asked.append(len(index))
        return {"x": index.astype(np.float32)}


def test_batches_are_made_when_they_are_read_and_anew_each_time() -> None:
    split = Counting(10)
    batches = Batches(split, 7, 3)
    assert split.asked == []
    assert [batch["x"].tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    next(iter(batches))
    assert split.asked == [3, 3, 1, 3]


def test_no_more_than_there_are() -> None:
    assert torch.cat([batch["x"] for batch in Batches(Counting(2), 512)]).tolist() == [0, 1]
