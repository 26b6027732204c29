"""Several labels a sample: lists, or one cell with separators, as 0 or 1 per class of the teacher's head."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from compressor.data.labels import encode_labels
from compressor.errors import PlanError
from compressor.types import Array

SEPARATOR = re.compile(r"\s*[;|]\s*")  # a comma would split csv cells and class names


def encode_multi_labels(
    labels: Sequence[Any] | Array, *, teacher: tuple[str, ...], names: tuple[str, ...], classes: int | None, part: str
) -> Array:
    """float32 (N, C), 1 where a class is true.

    A cell is a list of names or class numbers, a string such as ``cat;dog`` (empty: none), or a row of zeros and ones.
    :class:`PlanError` when a name is unknown, a number out of range, or the number of classes is not known.
    """
    count = classes or len(teacher) or len(names)
    if not count:
        raise PlanError.single("data.labels", "the number of classes is not known", hint="Give `data.labels`.")
    if isinstance(labels, np.ndarray) and labels.ndim == 2:
        return _matrix(labels, count, part)
    cells = [_items(cell, row, part) for row, cell in enumerate(labels)]
    flat = [item for cell in cells for item in cell]
    made = np.zeros((len(cells), count), np.float32)
    if flat:
        numbers = encode_labels(flat, teacher=teacher, names=names, classes=count, part=part)
        made[np.repeat(np.arange(len(cells)), [len(cell) for cell in cells]), numbers] = 1
    return made


def _matrix(labels: Array, count: int, part: str) -> Array:
    if labels.shape[1] != count or not np.isin(labels, (0, 1)).all():
        what = f"labels of {part} are a table of {labels.shape[1]} columns, not zeros and ones for {count} classes"
        raise PlanError.single("data.label", what)
    return labels.astype(np.float32)


def _items(cell: Any, row: int, part: str) -> list[Any]:
    if isinstance(cell, list | tuple | np.ndarray):
        return list(cell)
    if isinstance(cell, str):
        return [item for item in SEPARATOR.split(cell.strip()) if item]
    if isinstance(cell, int | np.integer):
        return [int(cell)]
    raise PlanError.single(
        "data.label",
        f"sample {row} of {part} has {cell!r} for labels",
        hint="Give lists, or one cell with `;` between the labels; a sample without any has an empty cell.",
    )
