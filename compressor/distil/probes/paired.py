"""What paired seeds allow to say: the same comparison repeated, each pair with a seed of its own."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

FEWEST = 2  # pairs that have a deviation at all
MOST = 31
# Student's t, one-sided 95 % (two-sided 90 %), by degrees of freedom from 1
T_95 = (
    6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782, 1.771, 1.761, 1.753,
    1.746, 1.740, 1.734, 1.729, 1.725, 1.721, 1.717, 1.714, 1.711, 1.708, 1.706, 1.703, 1.701, 1.699, 1.697,
)  # fmt: skip


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """90 % t-interval of the mean of paired differences.

    Raises:
        ValueError: fewer than 2 or more than 31 pairs.

    >>> [round(end, 3) for end in interval([1.0, 2.0, 3.0])]
    [0.314, 3.686]
    """
    count = len(differences)
    if not FEWEST <= count <= MOST:
        raise ValueError(f"an interval needs {FEWEST} to {MOST} pairs, not {count}")
    mean = statistics.fmean(differences)
    half = T_95[count - 2] * statistics.stdev(differences) / count**0.5
    return mean - half, mean + half


def verdict(differences: Sequence[float]) -> str:
    """What the paired seeds allow to say: all won, or on which side of 0 the 90 % interval lies.

    >>> verdict([1.0, 0.5, 2.0, 0.1, 0.2]), verdict([1.0, -1.0, 0.5, -0.4, 0.1]), verdict([-1.0, -1.1, -0.9, -1.0])
    ('5/5', 'no difference shown', 'worse')
    """
    low, high = interval(differences)
    wins = sum(d > 0 for d in differences)
    if wins == len(differences):
        return f"{wins}/{wins}"
    if low > 0:
        return "better"
    return "worse" if high < 0 or all(d < 0 for d in differences) else "no difference shown"


@dataclass(frozen=True)
class Evidence:
    """A summary of paired differences; positive means that the first of each pair is better."""

    mean: float
    low: float  # 90 % t-interval of the mean
    high: float
    wins: int
    pairs: int
    verdict: str


def weigh(differences: Sequence[float]) -> Evidence:
    """All that is told about paired differences.

    Raises:
        ValueError: fewer than 2 or more than 31 pairs.

    >>> weigh([1.0, 2.0, 3.0]).wins, round(weigh([1.0, 2.0, 3.0]).mean, 3)
    (3, 2.0)
    """
    low, high = interval(differences)
    wins = sum(d > 0 for d in differences)
    return Evidence(statistics.fmean(differences), low, high, wins, len(differences), verdict(differences))
