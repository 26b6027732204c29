"""Exact duplicates between the parts of a data set: a test sample that was trained on proves nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from compressor.errors import PlanError, Problem
from compressor.types import Array

LISTED = 5
Describe = Callable[[str, int], str]  # part and position in it -> what to call the sample
TRAINING_SIDE = ("train", "validation", "calibration", "transfer")
TEST_SIDE = ("test", "fresh")


@dataclass(frozen=True)
class Clean:
    """Which samples of each part stay (boolean masks), how many went because they stand in test, and what to note."""

    keep: Mapping[str, Array]
    dropped: int
    notes: tuple[str, ...]


def check_duplicates(
    keys: Mapping[str, Array], policy: Literal["refuse", "drop"], describe: Describe | None = None
) -> Clean:
    """Compare the parts by their samples' digests (``S16``), labels left aside.

    A sample of the training side that also stands in ``test`` is refused (:class:`PlanError`, with up to five examples)
    or dropped, as ``policy`` says. A train or transfer sample that also stands in ``validation`` is dropped and noted:
    it would make choices by validation too bright. ``describe`` may name samples for the message.
    """
    keep = {part: np.ones(len(values), bool) for part, values in keys.items()}
    tests = [keys[part] for part in TEST_SIDE if part in keys]
    found = {
        part: np.isin(keys[part], np.concatenate([keys[part][:0], *tests])) for part in TRAINING_SIDE if part in keys
    }
    dropped = int(sum(mask.sum() for mask in found.values()))
    notes: list[str] = []
    if dropped and policy == "refuse":
        raise _refusal(keys, found, dropped, describe or _plain)
    for part, mask in found.items():
        keep[part] &= ~mask
        if mask.any():
            notes.append(f"{int(mask.sum())} samples of {part} dropped: they also stand in test")
    for part in ("train", "transfer"):
        if part not in keys or "validation" not in keys:
            continue
        twice = np.isin(keys[part], keys["validation"]) & keep[part]
        keep[part] &= ~twice
        if twice.any():
            notes.append(f"{int(twice.sum())} samples of {part} dropped: they also stand in validation")
    return Clean(keep, dropped, tuple(notes))


def _refusal(keys: Mapping[str, Array], found: Mapping[str, Array], dropped: int, describe: Describe) -> PlanError:
    problems = [
        Problem("data", f"{int(mask.sum())} of {len(mask)} samples of {part} also stand in test")
        for part, mask in found.items()
        if mask.any()
    ]
    places = [(part, int(row)) for part, mask in found.items() for row in np.flatnonzero(mask)[:LISTED]]
    for part, row in places[:LISTED]:
        test = next(name for name in TEST_SIDE if name in keys and keys[part][row] in keys[name])
        twin = int(np.flatnonzero(keys[test] == keys[part][row])[0])
        what = f"{describe(part, row)} is the same as {test}[{twin}], {describe(test, twin)}"
        problems.append(Problem(f"{part}[{row}]", what))
    hint = f'Set `duplicates = "drop"` in [data] to leave these {dropped} out of training.'
    return PlanError("the data", problems, hint=hint)


def _plain(part: str, row: int) -> str:
    return f"{part} sample {row}"
