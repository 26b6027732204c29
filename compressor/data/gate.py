"""The contamination gate between everything that shapes a student and every test set: near duplicates, declared data.

Exact duplicates are looked for in :mod:`compressor.data.contamination`, before anything else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from compressor.data import near
from compressor.data.images import PictureStore, decode, resized, with_channels
from compressor.data.raw import RawData, RawPart
from compressor.data.read import read_source
from compressor.data.types import NearDuplicates
from compressor.errors import PlanError, Problem
from compressor.recipe import DataConfig
from compressor.types import Array

TEST_SIDE = ("test", "fresh")
HASHED_SIDE = 64  # compressed pictures of any size are compared at this side
BLOCK = 1024
DECODE_LIMIT = 50_000  # pictures that stay compressed: decoding more of them before a run takes minutes
Rows = Mapping[str, tuple[str, Array]]


def check_near(raw: RawData, rows: Rows, config: DataConfig, stores: Mapping[str, Any]) -> tuple[Rows, Findings]:
    """Compare every part of the training side with every test part, as ``data.near_duplicates`` says.

    ``stores`` are the decoded pictures by raw part, where there are such. Returns the rows that stay, and the findings.

    Raises:
        PlanError: ``refuse``, and a sample of the training side is nearly one of a test part.
    """
    if config.near_duplicates == "off":
        return rows, ()
    homes = {home for home, _ in rows.values()}
    hashed = {home: _hashes(raw.parts[home], stores.get(home)) for home in sorted(homes)}
    found: list[NearDuplicates] = []
    kept = dict(rows)
    for against in TEST_SIDE:
        if against not in rows:
            continue
        hashes = {
            name: own.take(index)
            for name, (home, index) in rows.items()
            if (own := hashed[home]) is not None and (name == against or name not in TEST_SIDE)
        }
        if against not in hashes:
            continue
        for part, (finding, mask) in near.near_duplicates(hashes, against, _describer(raw, rows)).items():
            found.append(finding)
            if config.near_duplicates == "drop" and mask.any():
                kept[part] = (kept[part][0], np.setdiff1d(kept[part][1], rows[part][1][mask], assume_unique=True))
    if config.near_duplicates == "refuse":
        _refuse(found)
    return kept, tuple(found)


Findings = tuple[NearDuplicates, ...]


def _describer(raw: RawData, rows: Rows) -> Any:
    return lambda part, row: raw.parts[rows[part][0]].show(int(rows[part][1][row]))


def _refuse(found: Sequence[NearDuplicates]) -> None:
    problems = [
        Problem("data", f"{item.count} of {item.samples} samples of {item.part} are nearly samples of {item.against}")
        for item in found
        if item.count
    ]
    if problems:
        problems += [Problem("data", text) for item in found for text in item.examples]
        hint = 'Set `near_duplicates = "drop"` in [data] to leave them out of training, or "report" to keep them.'
        raise PlanError("the data", problems, hint=hint)


def _hashes(part: RawPart, store: Any) -> near.Hashes | None:
    """None for plain arrays (what is near there, only their owner knows) and for too many compressed pictures."""
    if part.kind == "texts":
        return near.text_hashes(part.samples)
    if part.kind not in {"pictures", "files"} or len(part) == 0:
        return None
    decoded = store.samples if isinstance(store, PictureStore) else part.samples
    if not isinstance(decoded, np.ndarray) and len(part) > DECODE_LIMIT:
        return None
    return near.picture_hashes(_pictures(part, store))


def _pictures(part: RawPart, store: Any) -> Iterator[Array]:
    decoded = store.samples if isinstance(store, PictureStore) else part.samples
    for start in range(0, len(part), BLOCK):
        if isinstance(decoded, np.ndarray):
            yield decoded[start : start + BLOCK]
        else:
            batch = [with_channels(decode(sample), 1) for sample in decoded[start : start + BLOCK]]
            yield np.stack([resized(picture, (HASHED_SIDE, HASHED_SIDE), "bilinear") for picture in batch])


def check_declared(name: str, sources: Sequence[str], config: DataConfig, raw: RawData, test: Rows) -> Findings:
    """Does data that a teacher was trained on, as its owner declares, hold test samples? Exact and nearly.

    ``name`` is the teacher's; ``test`` the rows of the test parts. The teacher cannot be untrained, so that this is a
    finding for the report, never a refusal.
    """
    found: list[NearDuplicates] = []
    for source in sources:
        parts, _ = read_source(source, config, labelled=False)
        part = parts.get("train") or next(iter(parts.values()))
        label = f"data of teacher {name} ({source})"
        own = _hashes(part, None)
        for against, (home, index) in test.items():
            keys = raw.parts[home].digests(normalised=True)[index]
            equal = np.isin(part.digests(normalised=True), keys)
            found.append(NearDuplicates(label, against, int(equal.sum()), len(part), (), "equal samples"))
            other = _hashes(raw.parts[home], None)
            if own is not None and other is not None:
                rows, _ = near.near(own, other.take(index))
                more = int(np.setdiff1d(rows, np.flatnonzero(equal)).size)
                found.append(NearDuplicates(label, against, more, len(part), (), near.how(own, other)))
    return tuple(found)
