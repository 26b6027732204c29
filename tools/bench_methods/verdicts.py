"""Paired seeds: the mean difference, its interval, and what they allow to say."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

T_95 = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 6: 1.943, 7: 1.895, 8: 1.860, 9: 1.833}  # Student's t


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """90 % t-interval of the mean of paired differences.

    >>> tuple(round(end, 3) for end in interval([1.0, 2.0, 3.0]))
    (0.314, 3.686)
    """
    mean, count = statistics.fmean(differences), len(differences)
    half = T_95[count - 1] * statistics.stdev(differences) / count**0.5
    return mean - half, mean + half


def verdict(differences: Sequence[float]) -> str:
    """What the paired seeds allow to say.

    >>> verdict([1.0, 0.5, 2.0, 0.1, 0.2]), verdict([1.0, -1.0, 0.5, -0.4, 0.1]), verdict([-1.0, -1.1, -0.9, -1.0, 0.1])
    ('5/5', 'no difference shown', 'worse')
    >>> verdict([1.0, 1.1, 0.9, 1.0, -0.1])
    'better'
    """
    low, high = interval(differences)
    wins, losses = (sum(sign * d > 0 for d in differences) for sign in (1, -1))
    if wins == len(differences):
        return f"{wins}/{wins}"
    if losses == len(differences) or high < 0:
        return "worse"
    return "better" if low > 0 else "no difference shown"
