"""Pairs of texts for an encoder that takes one text at a time: two samples a pair, and what people say of the pair."""

from __future__ import annotations

from typing import Any

import numpy as np

from compressor.data.raw import RawPart
from compressor.errors import PlanError
from compressor.types import Array, Task


def is_paired(part: RawPart) -> bool:
    """Are the samples pairs of texts?"""
    return part.kind == "texts" and len(part) > 0 and isinstance(part.samples[0], tuple)


def single_texts(part: RawPart) -> RawPart:
    """The texts of the pairs, neighbours standing beside each other; no labels."""
    return RawPart("texts", [text for pair in part.samples for text in pair], None)


def single_rows(rows: Array) -> Array:
    """Positions of both texts of these pairs."""
    return np.stack([2 * rows, 2 * rows + 1], axis=1).reshape(-1)


def judgements(part: RawPart, rows: Array, task: Task, name: str) -> Array:
    """What :func:`compressor.evaluate.score` needs of these pairs, one row a text.

    ``sentence-similarity``: float64 (2n, 2), number and human score of the pair. ``retrieval``: int64 (2n, 2), number
    of the query's text and 0 for a query, number of the query's text and 1 + number of the passage's for a passage;
    equal texts have equal numbers.
    """
    if not is_paired(part):
        hint = "Give `data.text` and `data.text_pair`: query and passage, or the two sentences."
        raise PlanError.single("data.text_pair", f"{task} needs pairs of texts, {name} has none", hint=hint)
    if task == "sentence-similarity":
        scores = _scores(part.labels, rows, name)
        return np.stack([np.arange(len(rows), dtype=np.float64), scores], axis=1).repeat(2, axis=0)
    pairs = [part.samples[row] for row in rows]
    queries, passages = (_numbers([pair[side] for pair in pairs]) for side in (0, 1))
    made = np.empty((2 * len(rows), 2), np.int64)
    made[:, 0] = np.repeat(queries, 2)
    made[0::2, 1], made[1::2, 1] = 0, passages + 1
    return made


def _numbers(texts: list[str]) -> Array:
    known: dict[str, int] = {}
    return np.array([known.setdefault(text, len(known)) for text in texts], np.int64)


def _scores(labels: Any, rows: Array, name: str) -> Array:
    if labels is None:
        raise PlanError.single("data.label", f"{name} has no scores of its pairs", hint="Give `data.label`.")
    try:
        found = np.asarray([float(labels[row]) for row in rows])
    except (TypeError, ValueError) as error:
        raise PlanError.single("data.label", f"a score of {name} is no number: {error}") from error
    if not np.isfinite(found).all():
        raise PlanError.single("data.label", f"a score of {name} is missing")
    return found
