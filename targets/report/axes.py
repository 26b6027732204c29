"""Axes of the picture: a range mapped to pixels, with ticks people expect. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Tick:
    """A labelled position on an axis, in pixels."""

    position: float
    text: str


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels, linearly or by their logarithm. ``start`` may lie right of (below) ``end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def place(self, value: float) -> float:
        """Pixel of ``value``."""
        low, high, at = (math.log10(part) if self.log else part for part in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self, render: Callable[[float], str], most: int = 7) -> tuple[Tick, ...]:
        """At most about ``most`` round values inside the range."""
        values = _log_values(self.low, self.high, most) if self.log else _linear_values(self.low, self.high, most)
        return tuple(Tick(round(self.place(value), 1), render(value)) for value in values)


def axis(values: Sequence[float], start: float, end: float, *, log: bool, margin: float) -> Axis:
    """An axis that shows all values with ``margin`` pixels free at both ends."""
    scaled = [math.log10(value) if log else value for value in values]
    low, high = min(scaled), max(scaled)
    smallest = 0.2 if log else 0.01  # at least a fifth of a decade, or one point: noise must not fill the picture
    if high - low < smallest:
        middle = (low + high) / 2
        low, high = middle - smallest / 2, middle + smallest / 2
    per_pixel = (high - low) / (abs(end - start) - 2 * margin)
    low, high = low - margin * per_pixel, high + margin * per_pixel
    return Axis(10**low, 10**high, start, end, True) if log else Axis(low, high, start, end, False)


def _linear_values(low: float, high: float, most: int) -> list[float]:
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step)
    return [index * step for index in range(first, math.floor(high / step) + 1)]


def _log_values(low: float, high: float, most: int) -> list[float]:
    """Powers of ten, with 2 and 5 between them while there is room; linear steps inside a narrow range."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        values = [factor * 10.0**power for power in exponents for factor in factors]
        inside = [value for value in values if low <= value <= high]
        if len(inside) <= most:
            return inside if len(inside) > 1 else _linear_values(low, high, 4)
    return inside[:: math.ceil(len(inside) / most)]
