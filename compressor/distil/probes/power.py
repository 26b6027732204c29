"""What difference could have been seen at all: a statement of power for an accuracy on a test set."""

from __future__ import annotations

import math

Z_ALPHA = 1.959964  # two-sided 95 %
Z_POWER = 0.841621  # 80 %
PAIRED_SEEDS = 5  # the fewest seeds where winning on all is rarer than 1 in 20 under a fair coin (1/32)


def smallest_difference(samples: int, discordant: float) -> float:
    """The smallest true difference in accuracy between two models that a paired test finds (95 %, power 80 %).

    McNemar's test on the same samples (Connor 1987): delta solves
    delta sqrt(n) = z_a sqrt(d) + z_b sqrt(d - delta^2), with d the share of samples that exactly one model gets right.

    Args:
        samples: test samples n.
        discordant: d, between 0 and 1. An upper bound is the share of samples where the two models disagree.

    Returns:
        delta as a fraction of 1; 1.0 when the set is too small to see anything less.

    >>> round(smallest_difference(10_000, 0.10), 4)
    0.0089
    """
    if samples < 1 or not 0 <= discordant <= 1:
        raise ValueError("samples must be positive and discordant within 0..1")
    d = max(discordant, 1 / samples)
    low, high = 0.0, d
    if high * math.sqrt(samples) < Z_ALPHA * math.sqrt(d):
        return 1.0
    for _ in range(60):
        middle = (low + high) / 2
        needed = Z_ALPHA * math.sqrt(d) + Z_POWER * math.sqrt(max(0.0, d - middle**2))
        low, high = (middle, high) if middle * math.sqrt(samples) < needed else (low, middle)
    return high


def power_statement(samples: int, discordant: float, *, estimated: bool, seeds: int = 1) -> str:
    """One sentence for the report.

    Args:
        samples: of the test set.
        discordant: share of samples that one model gets right and the other wrong, or a bound of it.
        estimated: the share is 2 p (1 - p), two independent models, because no other one was known.
        seeds: how many times the student was trained.
    """
    found = smallest_difference(samples, discordant)
    basis = "if both models err independently" if estimated else f"with {discordant:.1%} of the answers differing"
    seen = (
        f"{samples:,} test samples show a difference in accuracy of {100 * found:.2f} points or more "
        f"(95 % confidence, 80 % power, {basis})"
    )
    if found >= 1:
        seen = f"{samples:,} test samples with {discordant:.1%} of the answers differing cannot show any difference"
    runs = "one seed: nothing is known of other seeds" if seeds == 1 else f"{seeds} seeds"
    more = f"; {PAIRED_SEEDS} paired seeds, all won, would be the least evidence that a method helps"
    return f"{seen}; {runs}{more if seeds < PAIRED_SEEDS else ''}"
