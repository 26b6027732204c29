"""Does text that a teacher wrote repeat the test text? Long equal runs of tokens, by rolling hashes."""

from __future__ import annotations

import numpy as np

from compressor.types import Array

RUN_TOKENS = 32  # an equal run of so many tokens is no chance; shorter texts are compared whole
_BASE = np.uint64(0x9E3779B97F4A7C15)


def sharing(written: Array, tests: Array, run: int = RUN_TOKENS) -> int:
    """How many rows of ``written`` share a run of ``run`` tokens with a row of ``tests``.

    Args:
        written, tests: int (N, L) and (M, K), negative where there is no token. The tokens of a row stand together.
        run: shorter rows share if all their tokens stand, in order and together, in a row of ``tests``.

    >>> test = np.array([[1, 2, 3, 4, 5, 6]])
    >>> sharing(np.array([[9, 3, 4, 5], [3, 5, 4, 9], [4, 5, -1, -1]]), test, run=3)
    2
    """
    found = 0
    lengths = np.minimum((written >= 0).sum(1), run)
    for length in np.unique(lengths[lengths > 0]):
        rows = written[lengths == length]
        known = np.unique(_hashes(tests, int(length))[0])
        hashes, valid = _hashes(rows, int(length), flat=False)
        found += int((np.isin(hashes, known) & valid).any(1).sum())
    return found


def _hashes(rows: Array, length: int, *, flat: bool = True) -> tuple[Array, Array]:
    """Hashes uint64 of all windows (N, L - length + 1) and which hold tokens alone; ``flat``: only those, in a row."""
    width = rows.shape[1] - length + 1
    if width < 1:
        return np.empty(0 if flat else (len(rows), 0), np.uint64), np.empty((len(rows), 0), bool)
    values = rows.astype(np.int64).astype(np.uint64) + np.uint64(1)
    total, power = np.zeros((len(rows), width), np.uint64), np.uint64(1)
    valid = np.ones((len(rows), width), bool)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64
        for place in range(length):
            total += values[:, place : place + width] * power
            valid &= rows[:, place : place + width] >= 0
            power = power * _BASE
        total ^= total >> np.uint64(29)
    return (total[valid], valid) if flat else (total, valid)
