"""Order statistics for latencies: no assumption about their distribution, the same answer every time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

NORMAL_95 = 1.96  # two-sided 95 % quantile of the normal distribution


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % confidence interval of the median from order statistics (normal approximation of the binomial ranks).

    David & Nagaraja, Order Statistics, section 7.1. Fewer than six values give their whole range.

    >>> median_interval([1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    (2.0, 9.0)
    """
    ordered = sorted(float(value) for value in values)
    count = len(ordered)
    if not count:
        raise ValueError("no values")
    rank = max(0, math.floor((count - NORMAL_95 * math.sqrt(count)) / 2)) if count >= 6 else 0
    return ordered[rank], ordered[count - 1 - rank]


def relative_half_width(values: Sequence[float]) -> float:
    """Half the width of :func:`median_interval` over the median."""
    low, high = median_interval(values)
    middle = float(np.median(values))
    return (high - low) / 2 / middle if middle > 0 else math.inf


def percentiles(values: Sequence[float], points: Sequence[int]) -> list[float]:
    """Linear-interpolated percentiles."""
    return [float(value) for value in np.percentile(np.asarray(values, dtype=np.float64), list(points))]
