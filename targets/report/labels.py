"""Place labels beside their marks so that they do not cover each other or a mark. Deterministic and greedy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LINE_PX = 15.0
_DIRECTIONS = [(1, 0), (-1, 0), (1, -1), (1, 1), (-1, -1), (-1, 1), (0, -1), (0, 1)]
_GAPS_PX = (5.0, 16.0, 32.0, 52.0, 76.0, 104.0)


@dataclass(frozen=True)
class Box:
    """An axis-parallel rectangle in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """Shared area in square pixels."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)

    @property
    def area(self) -> float:
        return (self.right - self.left) * (self.bottom - self.top)


@dataclass(frozen=True)
class Spot:
    """A mark that wants a label: centre, radius, and the lines to write."""

    x: float
    y: float
    radius: float
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Label:
    """Where the lines go. ``leader`` joins label and mark when they stand apart."""

    box: Box
    anchor: str  # start, middle, end
    x: float
    baselines: tuple[float, ...]
    leader: tuple[float, float, float, float] | None


def text_width(text: str, size_px: float = 12.0) -> float:
    """An upper estimate of the width in a common sans-serif face (DejaVu Sans is the widest of them)."""
    narrow = sum(character in "iljtfrI.,:;'|! " for character in text)
    return size_px * (0.66 * (len(text) - narrow) + 0.4 * narrow)


def place_labels(spots: Sequence[Spot], area: Box, lines: Sequence[Box] = ()) -> tuple[Label, ...]:
    """One label per spot, the earlier ones choosing first. ``lines`` are thin boxes that text should not cross."""
    hearts = [_around(spot, min(spot.radius, 9.0) + 2) for spot in spots]
    bodies = [_around(spot, spot.radius) for spot in spots]
    placed: list[Label] = []
    for index, spot in enumerate(spots):
        taken = [label.box for label in placed]
        others = hearts[:index] + hearts[index + 1 :]
        wide = bodies[:index] + bodies[index + 1 :]
        candidates = [_candidate(spot, gap, direction) for gap in _GAPS_PX for direction in _DIRECTIONS]
        costs = [
            _cost(label.box, taken, others, wide, area) + 20 * sum(label.box.overlap(line) for line in lines)
            for label in candidates
        ]
        rank = [cost + order * 2.0 for order, cost in enumerate(costs)]
        placed.append(candidates[rank.index(min(rank))])
    return tuple(placed)


def _around(spot: Spot, radius: float) -> Box:
    return Box(spot.x - radius, spot.y - radius, spot.x + radius, spot.y + radius)


def _cost(box: Box, taken: list[Box], hearts: list[Box], bodies: list[Box], area: Box) -> float:
    outside = box.area - box.overlap(area)
    return (
        40 * outside
        + 30 * sum(box.overlap(other) for other in taken)
        + 20 * sum(box.overlap(other) for other in hearts)
        + 0.2 * sum(box.overlap(other) for other in bodies)
    )


def _candidate(spot: Spot, gap: float, direction: tuple[int, int]) -> Label:
    across, down = direction
    width, height = max(map(text_width, spot.lines)), LINE_PX * len(spot.lines)
    reach = spot.radius + gap
    diagonal = reach / math.sqrt(2) if across and down else reach
    edge_x, edge_y = spot.x + across * diagonal, spot.y + down * diagonal
    left = edge_x - width * (1 - across) / 2
    top = edge_y - height * (1 - down) / 2
    box = Box(left, top, left + width, top + height)
    anchor = {1: "start", 0: "middle", -1: "end"}[across]
    x = {1: box.left, 0: (box.left + box.right) / 2, -1: box.right}[across]
    baselines = tuple(round(top + LINE_PX * (line + 0.8), 1) for line in range(len(spot.lines)))
    return Label(box, anchor, round(x, 1), baselines, _leader(spot, box) if gap > _GAPS_PX[0] else None)


def _leader(spot: Spot, box: Box) -> tuple[float, float, float, float]:
    """From the rim of the mark to the nearest point of the label."""
    near_x = min(max(spot.x, box.left), box.right)
    near_y = min(max(spot.y, box.top), box.bottom)
    distance = math.hypot(near_x - spot.x, near_y - spot.y) or 1.0
    inner = min(spot.radius, distance) / distance
    start_x, start_y = spot.x + (near_x - spot.x) * inner, spot.y + (near_y - spot.y) * inner
    return round(start_x, 1), round(start_y, 1), round(near_x, 1), round(near_y, 1)
