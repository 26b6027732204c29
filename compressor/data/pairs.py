"""Pairs of texts for an encoder that takes one text at a time: which texts a part holds, what is said of them, and
which belong together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from compressor.data.raw import RawPart
from compressor.errors import PlanError
from compressor.types import Array, Task

ALONE = -1  # number of the query of a passage that answers none


@dataclass(frozen=True)
class Groups:
    """Which texts of a split belong together, by position in the split.

    A group is a first text (the query), a second one (its right passage) and any number of wrong passages:
    ``members[starts[g]:starts[g + 1]]``. ``scores``: float32 (N,), what the data say of each text beside its query
    (a human's or a teacher's score), NaN where they say nothing; None where no text has a score. ``answers``: the
    second text is a right answer to the first, so that the pair itself is a label.
    """

    members: Array  # int64
    starts: Array  # int64 (G + 1,)
    scores: Array | None = None
    answers: bool = False

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def sizes(self) -> Array:
        """Texts of each group, int64 (G,)."""
        return np.diff(self.starts)

    def of(self, number: int) -> Array:
        """Positions of one group's texts."""
        return self.members[self.starts[number] : self.starts[number + 1]]

    def among(self, kept: Array, total: int) -> Groups:
        """The groups of a selection of the texts, ``kept`` (positions in order) of ``total``: those whose first two
        texts are in it, with what is left of their wrong passages."""
        place = np.full(total, ALONE, np.int64)
        place[kept] = np.arange(len(kept))
        found = [place[self.of(number)] for number in range(len(self))]
        whole = [group[group != ALONE] for group in found if (group[:2] != ALONE).all()]
        return groups_of(whole, None if self.scores is None else self.scores[kept], answers=self.answers)


def groups_of(groups: list[Array], scores: Array | None = None, *, answers: bool = False) -> Groups:
    """Groups from a list of positions each."""
    starts = np.concatenate([[0], np.cumsum([len(group) for group in groups])]).astype(np.int64)
    members = np.concatenate([np.asarray(group, np.int64) for group in groups] or [np.empty(0, np.int64)])
    return Groups(members, starts, scores, answers)


def together(part: RawPart) -> Array | None:
    """A number for each pair, equal where the first text is; None where no first text repeats (or is empty)."""
    if not is_paired(part):
        return None
    known: dict[str, int] = {}
    found = np.array([known.setdefault(pair[0].strip(), len(known)) for pair in part.samples], np.int64)
    empty = found == known.get("", ALONE)
    found[empty] = len(known) + np.arange(int(empty.sum()))
    return None if len(np.unique(found)) == len(found) else found


@dataclass(frozen=True)
class Arranged:
    """The texts of a part (rows of :func:`single_texts`), what :func:`compressor.evaluate.score` needs of them, and
    their groups."""

    rows: Array
    judgements: Array | None
    groups: Groups


def is_paired(part: RawPart) -> bool:
    """Are the samples pairs of texts?"""
    return part.kind == "texts" and len(part) > 0 and isinstance(part.samples[0], tuple)


def single_texts(part: RawPart) -> RawPart:
    """The texts of the pairs, neighbours standing beside each other; no labels."""
    return RawPart("texts", [text for pair in part.samples for text in pair], None)


def single_rows(rows: Array) -> Array:
    """Positions of both texts of these pairs."""
    return np.stack([2 * rows, 2 * rows + 1], axis=1).reshape(-1)


def arranged(part: RawPart, rows: Array, task: Task, name: str) -> Arranged:
    """The texts of these pairs as a task wants them.

    - ``retrieval``: each different query once, then the passages. A row with an empty query is a passage that answers
      none; a row whose label is not above 0 is a wrong passage of its query. Judgements int64 (N, 2): number of the
      query and 0 for a query, number of the query it answers (-1: none) and 1 + number of the passage for a passage;
      equal passages have equal numbers. A group is a query, a right passage, and the wrong ones of the query.
    - ``sentence-similarity``: both texts of a pair side by side. Judgements float64 (N, 2): number and score of the
      pair. A group is a pair.
    - ``sentence-embedding``: as above, without judgements.

    Raises:
        PlanError: no pairs where the task needs them, scores that are no numbers, no query with a right passage.
    """
    if not is_paired(part):
        hint = "Give `data.text` and `data.text_pair`: query and passage, or the two sentences."
        raise PlanError.single("data.text_pair", f"{task} needs pairs of texts, {name} has none", hint=hint)
    if task == "retrieval":
        return _searched(part, rows, name)
    members = np.arange(2 * len(rows)).reshape(-1, 2)
    column, key = (part.labels, "label") if task == "sentence-similarity" else (part.scores, "score")
    if task == "sentence-embedding" and column is None:
        return Arranged(single_rows(rows), None, groups_of(list(members)))
    scores = _numbers_in(column, rows, name, key)
    judged = np.stack([np.arange(len(rows), dtype=np.float64), scores], axis=1).repeat(2, axis=0)
    groups = groups_of(list(members), _beside(scores, np.arange(len(rows)) * 2 + 1, 2 * len(rows)))
    return Arranged(single_rows(rows), judged if task == "sentence-similarity" else None, groups)


def text_rows(part: RawPart, rows: Array, task: Task, name: str) -> Array:
    """Rows of :func:`single_texts` in the order of the split ``name``; the rows themselves where there are no pairs."""
    if not is_paired(part):
        return rows
    return single_rows(rows) if name == "transfer" else arranged(part, rows, task, name).rows


def _searched(part: RawPart, rows: Array, name: str) -> Arranged:
    asked = [part.samples[row][0].strip() for row in rows]
    nothing = np.array([text == "" for text in asked], dtype=bool)
    labels = part.labels if part.labels is not None and any(_is_number(part.labels[row]) for row in rows) else None
    right = ~nothing
    if labels is not None:
        right &= _numbers_in(labels, rows, name, "label", empty=nothing) > 0
    if not right.any() and name != "calibration":
        what = f"no row of {name} has a query and a passage that answers it"
        raise PlanError.single("data.text_pair", what, hint="A label above 0, or none, is a right passage.")
    number: dict[str, int] = {}
    queries = np.array([number.setdefault(text, len(number)) if text else ALONE for text in asked], np.int64)
    _, first = np.unique(queries[queries != ALONE], return_index=True)
    first = np.flatnonzero(queries != ALONE)[first]  # the row of each query, by number
    known: dict[str, int] = {}
    passages = np.array([known.setdefault(part.samples[row][1], len(known)) for row in rows], np.int64)
    judged = np.empty((len(first) + len(rows), 2), np.int64)
    judged[: len(first)] = np.stack([np.arange(len(first)), np.zeros(len(first), np.int64)], axis=1)
    judged[len(first) :] = np.stack([np.where(right, queries, ALONE), passages + 1], axis=1)
    place = len(first) + np.arange(len(rows))
    scores = None
    if part.scores is not None:
        scores = _beside(_numbers_in(part.scores, rows, name, "score", empty=nothing), place, len(judged))
    found = groups_of(_lists(queries, right, place), scores, answers=True)
    return Arranged(np.concatenate([2 * rows[first], 2 * rows + 1]), judged, found)


def _lists(queries: Array, right: Array, place: Array) -> list[Array]:
    """A group for every right passage: its query, itself, the query's wrong passages."""
    wrong: dict[int, list[int]] = {}
    for query, where in zip(queries[~right].tolist(), place[~right].tolist(), strict=True):
        wrong.setdefault(query, []).append(where)
    wrong.pop(ALONE, None)
    return [
        np.array([query, where, *wrong.get(query, [])], np.int64)
        for query, where in zip(queries[right].tolist(), place[right].tolist(), strict=True)
    ]


def _beside(scores: Array, place: Array, total: int) -> Array:
    """The scores of the second texts, NaN for the first."""
    found = np.full(total, np.nan, np.float32)
    found[place] = scores
    return found


def _is_number(cell: Any) -> bool:
    """A column of words (a topic, a language) says nothing of passages."""
    try:
        float(cell)
    except (TypeError, ValueError):
        return False
    return True


def _numbers_in(column: Any, rows: Array, name: str, key: str, empty: Array | None = None) -> Array:
    """Numbers of a column; where ``empty`` an empty cell is NaN."""
    if column is None:
        raise PlanError.single(f"data.{key}", f"{name} has no scores of its pairs", hint=f"Give `data.{key}`.")
    may = np.zeros(len(rows), bool) if empty is None else empty
    try:
        found = np.asarray(
            [np.nan if blank and column[row] in ("", None) else float(column[row])
             for row, blank in zip(rows, may, strict=True)]
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise PlanError.single(f"data.{key}", f"a score of {name} is no number: {error}") from error
    if not (np.isfinite(found) | may).all():
        raise PlanError.single(f"data.{key}", f"a score of {name} is missing")
    return found
