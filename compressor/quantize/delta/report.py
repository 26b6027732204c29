"""What a delta holds and how far the updated model is from the one that was meant: read back from the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compressor.delta_file import Reader, apply, find_tensors, read_delta, updated
from compressor.quantize.delta.changes import Change, Pair
from compressor.quantize.delta.factors import Stored
from compressor.types import Array

UNTOUCHED = "left as in the base"


@dataclass(frozen=True)
class Row:
    """One tensor: its form, and the error of its change relative to the change (Frobenius norms)."""

    name: str
    form: str
    elements: int
    error: float


@dataclass(frozen=True)
class Report:
    """A delta that was made. ``error``: of all changes together, relative to them; ``change``: how large they are
    beside the new weights. Both over what may be approximated, Frobenius norms. ``identical``: the updated tensors are
    the new ones, bit for bit."""

    file_bytes: int
    base_bytes: int
    new_bytes: int
    unchanged: int
    error: float
    change: float
    base_digest: str
    result_digest: str
    identical: bool
    rows: tuple[Row, ...]


def report(pair: Pair, delta: Path) -> Report:
    """Apply the file and hold the result against the new model."""
    found = read_delta(delta)
    result = apply(pair.base, found)
    places, others = find_tensors(result), find_tensors(pair.new)
    forms = {str(entry["name"]): form(entry) for entry in found.header["tensors"]}
    rows, wrong, size, weights = [], 0.0, 0.0, 0.0
    for change in pair.changes:
        error = 0.0
        if change.lossy:
            error = _squared(places[change.name].read(result), change.new)
            wrong, size = wrong + change.unit * error, size + change.unit * change.energy
            weights += change.unit * _squared(change.new, np.zeros_like(change.new))
        relative = (error / change.energy) ** 0.5 if error else 0.0
        rows.append(Row(change.name, forms.get(change.name, UNTOUCHED), change.new.size, relative))
    return Report(
        file_bytes=delta.stat().st_size,
        base_bytes=len(pair.base),
        new_bytes=len(pair.new),
        unchanged=pair.unchanged,
        error=(wrong / size) ** 0.5 if size else 0.0,
        change=(size / weights) ** 0.5 if weights else 0.0,
        base_digest=f"sha256:{found.header['base']['sha256']}",
        result_digest=f"sha256:{found.header['result']['sha256']}",
        identical=all(places[name].read(result).tobytes() == others[name].read(pair.new).tobytes() for name in places),
        rows=tuple(rows),
    )


def form(entry: Mapping[str, Any]) -> str:
    """How a tensor is stored, in words."""
    if entry["kind"] == "low-rank":
        ranks = ", ".join(f"{rank} of {bits} bits" for bits, rank in entry["parts"])
        return f"rank {sum(rank for _, rank in entry['parts'])}: {ranks}"
    if entry["kind"] == "sparse":
        return f"{entry['count']} entries of {entry['bits']} bits"
    return "bit for bit"


def squared_error(change: Change, stored: Stored | None) -> float:
    """Of the updated tensor against the new one, summed over its elements."""
    made = change.base if stored is None else updated(stored.entry, Reader(stored.data), change.base)
    return _squared(made, change.new)


def _squared(one: Array, other: Array) -> float:
    return float(np.sum(np.square(one.astype(np.float64) - other.astype(np.float64))))
