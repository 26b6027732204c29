"""Which domain each training sample belongs to, from a column of its table (``data.domain``)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from compressor.data.blocks import BlockSplit
from compressor.data.raw import RawData
from compressor.data.text import TokenStore
from compressor.data.types import Split
from compressor.errors import PlanError
from compressor.types import Array

TRAINING = ("train", "transfer")


def domains_of(
    raw: RawData, rows: Mapping[str, tuple[str, Array]], splits: Mapping[str, Split], stores: Mapping[str, object]
) -> dict[str, Array]:
    """Domain numbers int64 (N,) of the samples of train and transfer, by part; empty without such a column.

    A block of a language model's text belongs to the domain of the document that it begins in. Parts whose source has
    no such column are left out.

    Raises:
        PlanError: the rows of this task are not samples of the source.
    """
    given = {name: raw.parts[rows[name][0]].domains for name in TRAINING if name in rows}
    names = {str(value) for column in given.values() for value in (column or ())}
    numbers = {name: number for number, name in enumerate(sorted(names))}
    found = {}
    for part, column in given.items():
        if column is None:
            continue
        home, index = rows[part]
        own = np.array([numbers[str(column[int(row)])] for row in index], dtype=np.int64)
        split, store = splits[part], stores[home]
        if isinstance(split, BlockSplit) and isinstance(store, TokenStore):
            own = own[_documents(split, store, index)]
        if len(own) != len(split):
            raise PlanError.single("data.domain", f"{part} has {len(split)} samples of {len(own)} rows")
        found[part] = own
    return found


def _documents(split: BlockSplit, store: TokenStore, rows: Array) -> Array:
    """Which document (by its place in ``rows``) each block begins in."""
    end = int(store.preprocess.eos_id is not None)
    lengths = store.offsets[rows + 1] - store.offsets[rows] + end
    starts = np.cumsum(lengths) - lengths
    begin = np.arange(len(split)) * split.ids.shape[1]
    found: Array = np.searchsorted(starts, begin, side="right") - 1
    return found
