"""Runs of tokens that teacher-made text shares with test text."""

from __future__ import annotations

import numpy as np

from compressor.data.overlap import sharing


def slow(written: np.ndarray, tests: np.ndarray, run: int) -> int:
    def rows(table: np.ndarray) -> list[list[int]]:
        return [[int(x) for x in row if x >= 0] for row in table]

    def windows(row: list[int], length: int) -> set[tuple[int, ...]]:
        return {tuple(row[at : at + length]) for at in range(len(row) - length + 1)}

    count = 0
    for row in rows(written):
        length = min(len(row), run)
        known = set().union(*(windows(test, length) for test in rows(tests)))
        count += bool(length and windows(row, length) & known)
    return count


def test_shared_runs_are_those_found_the_slow_way() -> None:
    random = np.random.default_rng(0)
    for run in (2, 3, 5):
        for _ in range(20):
            written, tests = random.integers(0, 4, (8, 10)), random.integers(0, 4, (3, 12))
            for table in (written, tests):
                for row in table:
                    row[random.integers(0, len(row) + 1) :] = -100
            assert sharing(written, tests, run) == slow(written, tests, run)


def test_other_text_shares_nothing_and_copied_text_everything() -> None:
    random = np.random.default_rng(1)
    tests = random.integers(0, 1000, (50, 64))
    assert sharing(random.integers(0, 1000, (50, 64)), tests) == 0
    assert sharing(tests[:, 10:50], tests) == 50
