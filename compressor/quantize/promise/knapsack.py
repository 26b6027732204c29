"""Which precision each layer is stored in: the multiple-choice knapsack, exactly where the budget is small.

One option is taken of every item, their bytes add up to at most the budget, and their noise is least. Dynamic
programming over bytes (Kellerer, Pferschy and Pisinger, *Knapsack Problems*, 2004, section 11.5); a budget of more than
``UNITS`` bytes is counted in coarser units, each step rounded up so that the result always fits, and what the rounding
left over is spent on single steps afterwards (their section 11.4, the greedy upgrade).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compressor.types import Array

UNITS = 1 << 15  # columns of the table: a few megabytes for hundreds of layers


@dataclass(frozen=True)
class Option:
    """One form of one layer: bytes in the file, and error energy at the outputs relative to their energy."""

    precision: str
    cost: int
    noise: float


def allocate(items: Sequence[Sequence[Option]], budget: int) -> tuple[int, ...] | None:
    """The position of the option that each item takes; None when not even the smallest ones fit.

    Exact as long as what may be spent beyond the smallest options is at most ``UNITS`` bytes; above that at most
    ``len(items)`` units are lost to rounding.

    >>> small, large = Option("int4", 1, 5.0), Option("int8", 2, 1.0)
    >>> allocate([[small, large], [small, large]], 3)
    (0, 1)
    """
    least = [min(option.cost for option in options) for options in items]
    rest = budget - sum(least)
    if rest < 0:
        return None
    unit = max(1, -(-rest // UNITS))
    columns = rest // unit + 1
    table, taken = np.zeros(columns), []
    for options, floor in zip(items, least, strict=True):
        rows = [_shifted(table, -(-(option.cost - floor) // unit)) + option.noise for option in options]
        choice = np.argmin(rows, axis=0)
        table = np.take_along_axis(np.array(rows), choice[None], axis=0)[0]
        taken.append(choice.astype(np.uint8))
    place, found = columns - 1, []
    for options, floor, choice in zip(reversed(items), reversed(least), reversed(taken), strict=True):
        best = int(choice[place])
        found.append(best)
        place -= -(-(options[best].cost - floor) // unit)
    return _filled(items, found[::-1], budget)


def _shifted(table: Array, steps: int) -> Array:
    """The table when ``steps`` units are gone; infinite where they are not there."""
    made = np.full(len(table), np.inf)
    if steps < len(table):
        made[steps:] = table[: len(table) - steps]
    return made


def _filled(items: Sequence[Sequence[Option]], chosen: list[int], budget: int) -> tuple[int, ...]:
    """Single steps that still fit, the one that takes most noise away first."""
    while True:
        left = budget - sum(options[at].cost for options, at in zip(items, chosen, strict=True))
        steps = [
            (options[at].noise - option.noise, number, place)
            for number, (options, at) in enumerate(zip(items, chosen, strict=True))
            for place, option in enumerate(options)
            if option.cost - options[at].cost <= left and option.noise < options[at].noise
        ]
        if not steps:
            return tuple(chosen)
        _, number, place = max(steps)
        chosen[number] = place
