"""The canary: is the score on the benchmark better than on samples that nobody can have seen? (methods I1)"""

from __future__ import annotations

import math
from dataclasses import dataclass

SIGMAS = 3.0  # one false alarm in about 740 clean runs


@dataclass(frozen=True)
class Canary:
    """The gap between two accuracies in units of its standard error."""

    gap: float  # benchmark minus fresh, fraction of 1
    error: float  # standard error of the gap
    alarm: bool

    @property
    def sigmas(self) -> float:
        return self.gap / self.error


def canary(benchmark: float, samples: int, fresh: float, fresh_samples: int, sigmas: float = SIGMAS) -> Canary:
    """Compare accuracies on two independent sets; alarm when the benchmark's is higher by more than ``sigmas`` SE.

    SE = sqrt(p (1 - p) (1 / n + 1 / m)) with the pooled accuracy p, at least as for half a wrong answer.
    """
    if samples < 1 or fresh_samples < 1:
        raise ValueError("both sets need samples")
    total = samples + fresh_samples
    right = min(max(benchmark * samples + fresh * fresh_samples, 0.5), total - 0.5)
    pooled = right / total
    error = math.sqrt(pooled * (1 - pooled) * (1 / samples + 1 / fresh_samples))
    gap = benchmark - fresh
    return Canary(gap, error, gap > sigmas * error)
