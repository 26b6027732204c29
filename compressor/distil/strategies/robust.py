"""Which samples to ask the teacher about when some of its answers will be wrong (methods T12).

Source: Baykal et al., "Robust Active Distillation", ICLR 2023.
"""

from __future__ import annotations

import numpy as np

from compressor.types import Array


def robust_probabilities(gains: Array, budget: float, wrong: float) -> Array:
    """Inclusion probabilities p that maximise the gain left after an adversary takes the ``wrong`` best answers away.

        max over p in [0, 1]^n with sum p = budget of  sum_i p_i g_i - (sum of the `wrong` largest p_i g_i)

    The optimum caps every product at one level t: p_i = min(1, t / g_i) over the largest gains until the budget is
    spent; t maximises the concave, piecewise linear ``sum_i min(p_i g_i, t) - wrong * t`` and is found at one of its
    corners. Without caps that is p_i proportional to 1 / g_i over the top k.

    Args:
        gains: float (N,), at least 0.
        budget: at most N.
        wrong: how many answers may be wrong, less than the budget.
    """
    order = np.argsort(-gains, kind="stable")
    sorted_gains = np.maximum(gains[order], 1e-12)
    low, high = 0.0, float(sorted_gains[0])
    for _ in range(200):  # golden-free ternary search: the interval shrinks by a third each time, below one ulp
        left, right = low + (high - low) / 3, high - (high - low) / 3
        if _value(sorted_gains, budget, wrong, left) < _value(sorted_gains, budget, wrong, right):
            low = left
        else:
            high = right
    found = np.zeros(len(gains))
    found[order] = _fill(sorted_gains, budget, (low + high) / 2)
    return found


def _fill(gains: Array, budget: float, level: float) -> Array:
    """Spend the budget on the largest gains, ``min(1, level / gain)`` each; what is left goes to the largest again."""
    wanted = np.minimum(1.0, level / gains)
    before = np.cumsum(wanted) - wanted
    taken = np.clip(budget - before, 0.0, wanted)
    rest = budget - taken.sum()
    if rest > 1e-12:  # the level is too low for the budget: the products above it gain nothing, but are allowed
        room = 1.0 - taken
        taken = taken + np.clip(rest - (np.cumsum(room) - room), 0.0, room)
    found: Array = taken
    return found


def _value(gains: Array, budget: float, wrong: float, level: float) -> float:
    taken = _fill(gains, budget, level)
    return float(np.minimum(taken * gains, level).sum() - wrong * level)


def draw_exactly(probabilities: Array, random: np.random.Generator) -> Array:
    """A sample of exactly round(sum p) different indices with these inclusion probabilities (systematic sampling)."""
    order = random.permutation(len(probabilities))
    count = round(float(probabilities.sum()))
    edges = np.cumsum(probabilities[order])
    ticks = random.random() + np.arange(count)
    chosen = np.minimum(np.searchsorted(edges, ticks * edges[-1] / max(count, 1), side="right"), len(order) - 1)
    return np.sort(np.unique(order[chosen]))
