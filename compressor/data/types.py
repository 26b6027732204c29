"""Data as the rest of the tool sees it. Memory holds raw samples once; model inputs are made per batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from compressor.types import Array, Inputs


class Split(Protocol):
    """One part of the data."""

    name: str  # train, validation, calibration, test, transfer
    labels: Array | None  # int64 (N,); None when there are none
    digests: Array  # "S16" (N,): digest of each raw sample, for duplicates and cache keys

    def __len__(self) -> int: ...

    def batch(self, index: Array) -> Inputs:
        """Preprocessed, stacked model inputs by name for these positions (text padded to the batch's longest)."""
        ...

    # A split may also have ``fields(index) -> Inputs``: fields of ``compressor.distil.objectives.base.Batch`` by name,
    # a row a sample (see ``compressor.data.alignment``).


def labelled(data: DataBundle) -> bool:
    """Has the train part something to learn from without a teacher: labels, or texts that answer others?"""
    train = data.splits["train"]
    return train.labels is not None or bool(getattr(getattr(train, "groups", None), "answers", False))


@dataclass(frozen=True)
class NearDuplicates:
    """Samples of one part that are almost a sample of a test part (other than exact duplicates)."""

    part: str
    against: str
    count: int
    samples: int  # of the part
    examples: tuple[str, ...]  # a few, in words
    how: str  # what was compared, with which threshold


@dataclass(frozen=True)
class DataBundle:
    """All parts: ``train validation calibration test`` and perhaps ``transfer``. Disjoint; duplicates are checked."""

    splits: Mapping[str, Split]
    labels: tuple[str, ...]
    source: str
    digests: Mapping[str, str]  # per split
    duplicates_dropped: int = 0
    notes: tuple[str, ...] = field(default=())
    examples: tuple[Any, ...] = ()  # the first validation samples before pre-processing: a string or a uint8 picture
    rows: Mapping[str, tuple[str, Array]] = field(default_factory=dict)  # part -> raw part it is taken from, positions
    domains: Mapping[str, Array] = field(default_factory=dict)  # train, transfer -> int64 (N,): `data.domain`
    near: tuple[NearDuplicates, ...] = ()  # what the search for near duplicates found, per part and test set
