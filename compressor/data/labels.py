"""Labels of a source in the class numbers of the teacher's head."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from compressor.errors import PlanError, Problem
from compressor.types import Array

EXAMPLES = 5
_GENERIC = re.compile(r"^(LABEL_|class_?)?\d+$", re.IGNORECASE)


def _key(name: object) -> str:
    return re.sub(r"[\s_-]+", " ", str(name)).strip().casefold()


def encode_labels(
    labels: Sequence[Any] | Array, *, teacher: tuple[str, ...], names: tuple[str, ...], classes: int | None, part: str
) -> Array:
    """int64 (N,) class numbers of the teacher.

    Whole numbers are class numbers. Strings are matched with the ``teacher``'s labels by name (case, spaces, dashes and
    underscores do not count); if those are only numbered (``LABEL_0``), by the order of the source's ``names``. Raises
    :class:`PlanError` with examples when a label is out of range (``classes`` outputs), unknown or not a whole number.
    """
    try:
        values = np.asarray(labels)
    except ValueError as error:  # lists of different lengths
        hint = 'Several labels a sample need `teacher.task = "multi-label-..."`, tags of words `token-classification`.'
        raise PlanError.single("data.label", f"labels of {part} are lists of different lengths", hint=hint) from error
    if values.ndim != 1:
        raise PlanError.single(
            "data.label", f"labels of {part} have shape {values.shape}; one class a sample is supported"
        )
    if values.dtype.kind in "OUS":
        numbers = _from_names(
            [str(value) if value is not None else None for value in list(labels)], teacher, names, part
        )
    elif values.dtype.kind == "f":
        bad = values[~np.isfinite(values) | (values != np.rint(values))]
        if len(bad):
            raise _misfit(part, "are not whole numbers", bad, len(bad), "Give a column with classes.")
        numbers = values.astype(np.int64)
    else:
        numbers = values.astype(np.int64)
    if classes is not None:
        bad = numbers[(numbers < 0) | (numbers >= classes)]
        if len(bad):
            what = f"are outside 0..{classes - 1}: the teacher's head has {classes} outputs"
            raise _misfit(
                part, what, bad, len(bad), "Take the teacher that was trained on these classes, or filter the data."
            )
    return numbers


def _from_names(values: list[str | None], teacher: tuple[str, ...], names: tuple[str, ...], part: str) -> Array:
    known = {_key(name): index for index, name in enumerate(teacher)}
    numbered = all(_GENERIC.match(name) for name in teacher)
    order = tuple(names) or tuple(sorted({value for value in values if value is not None}))
    present = {value for value in values if value is not None}
    unknown = sorted(value for value in present if _key(value) not in known)
    if unknown and all(_whole(value) for value in present):
        return np.array([int(float(value or "nan")) for value in _complete(values, part)], np.int64)
    if unknown and numbered and (not teacher or len(order) == len(teacher)):
        known = {_key(name): index for index, name in enumerate(order)}
        unknown = sorted(value for value in present if _key(value) not in known)
    if unknown:
        count = sum(value in set(unknown) for value in values)
        what = f"are not among the teacher's ({', '.join(teacher[:12])}{', ...' if len(teacher) > 12 else ''})"
        raise _misfit(
            part, what, unknown, count, "Give `data.labels`: your class names in the order of the teacher's outputs."
        )
    return np.array([known[_key(value)] for value in _complete(values, part)], np.int64)


def _whole(text: str) -> bool:
    return bool(re.fullmatch(r"\s*-?\d+(\.0*)?\s*", text))


def _complete(values: list[str | None], part: str) -> list[str]:
    missing = [str(row) for row, value in enumerate(values) if value is None]
    if missing:
        raise _misfit(part, "are missing, first in rows", missing, len(missing), "Remove those rows.")
    return [value for value in values if value is not None]


def _misfit(part: str, what: str, examples: Any, count: int, hint: str) -> PlanError:
    shown = list(dict.fromkeys(str(value) for value in examples))[:EXAMPLES]
    return PlanError(
        "the plan", [Problem("data.label", f"{count} labels of {part} {what}: {', '.join(shown)}")], hint=hint
    )
