"""The accuracy-latency-size picture of one profile, as geometry that the template draws in SVG. Pure.

Bubble area is file size, the x axis is p50 latency (logarithmic), the y axis the task's metric. A profile without any
latency gets accuracy over size instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from compressor.evaluate import PERPLEXITY
from targets.outcome import ProfileOutcome, Row
from targets.report import figures
from targets.report.axes import Axis, Tick, axis
from targets.report.compare import teacher_of
from targets.report.labels import Box, Label, Spot, place_labels, text_width

Kind = Literal["teacher", "null-twin", "student", "variant"]
_LARGEST_PX, _SMALLEST_PX, _PLAIN_PX = 30.0, 3.5, 7.0
_NARROW_PX = 500.0  # below this width there is no room for figures beside the names
_MARGIN_PX = 40.0


@dataclass(frozen=True)
class Point:
    """A row that has both coordinates. ``x`` is ms or MiB, ``y`` the metric (0..1)."""

    row: Row
    x: float
    y: float
    size_bytes: float | None


@dataclass(frozen=True)
class Mark:
    """One bubble: an SVG path of the kind's shape, its label and what hovering tells."""

    name: str
    kind: Kind
    x: float
    y: float
    radius: float
    outline: str
    title: str
    lines: tuple[str, ...]
    label: Label
    front: bool
    shipped: bool
    whisker: float | None  # x of p95


@dataclass(frozen=True)
class Limit:
    """A line of the promise, with its words."""

    position: float
    text: str


@dataclass(frozen=True)
class Canvas:
    """Where and how the points are drawn."""

    plot: Box
    across: Axis
    up: Axis
    by_latency: bool
    narrow: bool


@dataclass(frozen=True)
class Picture:
    """Everything the template needs; all positions in pixels of the view box."""

    width: float
    height: float
    plot: Box
    by_latency: bool
    split: str
    x_title: str
    y_title: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marks: tuple[Mark, ...]
    front: str  # SVG path
    floor: Limit | None  # lowest accepted accuracy
    ceiling: Limit | None  # largest accepted latency
    absent: tuple[tuple[str, str], ...]  # rows that have no place in the picture, and why
    caption: str


def draw(outcome: ProfileOutcome, metric: str, width: float, height: float) -> Picture | None:
    """The picture for a view box of this size, or None when not one row has both coordinates."""
    split = _split(outcome)
    by_latency = any(figures.value_of(row.latency) for row in outcome.rows)
    points = [point for row in outcome.rows if (point := _point(row, split, by_latency)) is not None]
    if not points:
        return None
    plot = Box(78.0, 14.0, width - 14.0, height - 52.0)
    across = axis([point.x for point in points], plot.left, plot.right, log=True, margin=_MARGIN_PX)
    floor_value = _floor_value(outcome, split)
    heights = [point.y for point in points] + ([floor_value] if floor_value is not None else [])
    up = axis(heights, plot.bottom, plot.top, log=False, margin=_MARGIN_PX)
    front = pareto_front(points, falling=metric == PERPLEXITY)
    floor, ceiling = _floor(floor_value, up, outcome, metric), _ceiling(outcome, across, plot) if by_latency else None
    canvas = Canvas(plot, across, up, by_latency, width < _NARROW_PX)
    return Picture(
        width=width,
        height=height,
        plot=plot,
        by_latency=by_latency,
        split=split,
        x_title="\N{LEFTWARDS ARROW} faster: p50 latency in ms, log scale"
        if by_latency
        else "\N{LEFTWARDS ARROW} smaller: file size in MiB, log scale",
        y_title=f"{metric} ({split})",
        x_ticks=across.ticks(lambda value: f"{value:.4g}", 5 if canvas.narrow else 9),
        y_ticks=up.ticks(lambda value: _tick_score(value, metric, up), 6),
        marks=_marks(points, front, canvas, metric, _limit_boxes(floor, ceiling, plot)),
        front=_front_path([points[index] for index in front], across, up),
        floor=floor,
        ceiling=ceiling,
        absent=tuple(_absent(outcome, points, split, by_latency)),
        caption=_caption(by_latency),
    )


def pareto_front(points: list[Point], *, falling: bool = False) -> list[int]:
    """Indices of points that no other beats in both coordinates, from the cheapest on (smaller x, larger y).

    ``falling``: smaller y is better.
    """
    best, sign, found = -math.inf, -1 if falling else 1, []
    for index in sorted(range(len(points)), key=lambda at: (points[at].x, -sign * points[at].y)):
        if sign * points[index].y > best:
            best = sign * points[index].y
            found.append(index)
    return found


def kind_of(row: Row) -> Kind:
    """How the row is drawn."""
    if row.artifact.role == "teacher" and row.artifact.precision == "fp32":
        return "teacher"
    if row.artifact.role == "null-twin":
        return "null-twin"
    return "student" if row.artifact.precision == "fp32" else "variant"


def _split(outcome: ProfileOutcome) -> str:
    """The split that places most rows: test is touched only by what was chosen, so that it is often validation."""
    counts = {
        split: sum(figures.value_of(getattr(row, split)) is not None for row in outcome.rows)
        for split in ("test", "validation")
    }
    return "test" if counts["test"] >= counts["validation"] else "validation"


def _point(row: Row, split: str, by_latency: bool) -> Point | None:
    size, y = figures.value_of(row.file_bytes), figures.value_of(getattr(row, split))
    x = figures.value_of(row.latency) if by_latency else (size / figures.MIB if size else None)
    return Point(row, x, y, size) if x and x > 0 and y is not None else None


def _absent(outcome: ProfileOutcome, points: list[Point], split: str, by_latency: bool) -> list[tuple[str, str]]:
    shown = {point.row.artifact.name for point in points}
    found = []
    for row in outcome.rows:
        if row.artifact.name not in shown:
            missing = (getattr(row, split), row.latency if by_latency else row.file_bytes)
            reasons = [figures.say(figure, str) for figure in missing if figures.value_of(figure) is None]
            found.append((row.artifact.name, "; ".join(reasons) or "no positive latency"))
    return found


def _floor_value(outcome: ProfileOutcome, split: str) -> float | None:
    teacher, limit = teacher_of(outcome), outcome.promise.max_drop
    reference = figures.value_of(getattr(teacher, split)) if teacher is not None else None
    if reference is None or limit is None:
        return None
    figure = getattr(teacher, split)
    return reference * math.exp(limit) if figure.unit == PERPLEXITY else reference - limit


def _floor(value: float | None, up: Axis, outcome: ProfileOutcome, metric: str) -> Limit | None:
    if value is None:
        return None
    unit = " points" if figures.is_percentage(metric) else ""
    drop = outcome.promise.max_drop or 0.0
    allowed = figures.points(math.expm1(drop) if metric == PERPLEXITY else drop, metric).lstrip("+±")
    side = "above" if metric == PERPLEXITY else "below"
    return Limit(round(up.place(value), 1), f"accepted: {allowed}{unit} {side} the teacher")


def _ceiling(outcome: ProfileOutcome, across: Axis, plot: Box) -> Limit | None:
    limit = outcome.promise.max_latency_ms
    if limit is None or not plot.left < across.place(limit) < plot.right:
        return None
    return Limit(round(across.place(limit), 1), f"accepted: {figures.milliseconds(limit)}")


def _limit_boxes(floor: Limit | None, ceiling: Limit | None, plot: Box) -> list[Box]:
    """Where the words of the promise stand."""
    boxes = []
    if floor is not None:
        boxes.append(
            Box(plot.right - 6 - text_width(floor.text, 11.5), floor.position, plot.right, floor.position + 18)
        )
    if ceiling is not None:
        right = ceiling.position + 5 + text_width(ceiling.text, 11.5)
        boxes.append(Box(ceiling.position, plot.bottom - 20, right, plot.bottom))
    return boxes


def _tick_score(value: float, metric: str, up: Axis) -> str:
    if not figures.is_percentage(metric):
        return f"{value:.3f}".replace("-", figures.MINUS)
    return f"{100 * value:.{1 if up.high - up.low < 0.06 else 0}f} %"


def _marks(points: list[Point], front: list[int], canvas: Canvas, metric: str, taken: list[Box]) -> tuple[Mark, ...]:
    """Large bubbles first, so that small ones stay on top; what ships chooses its label place first."""
    across, up, by_latency = canvas.across, canvas.up, canvas.by_latency
    largest = max((point.size_bytes or 0.0 for point in points), default=0.0)
    importance = {"teacher": 1, "null-twin": 2, "student": 2, "variant": 3}
    order = sorted(range(len(points)), key=lambda at: (not points[at].row.shipped, importance[kind_of(points[at].row)]))
    spots = [_spot(points[at], canvas, largest) for at in order]
    lines = _strokes(points, front, across, up) + taken
    labels = dict(zip(order, place_labels(spots, canvas.plot, lines), strict=True))
    drawn = []
    for at, spot in sorted(zip(order, spots, strict=True), key=lambda pair: -pair[1].radius):
        point = points[at]
        p95 = figures.detail_of(point.row.latency, "p95") if by_latency else None
        drawn.append(
            Mark(
                name=point.row.artifact.name,
                kind=kind_of(point.row),
                x=spot.x,
                y=spot.y,
                radius=round(spot.radius, 1),
                outline=_outline(kind_of(point.row), spot.x, spot.y, spot.radius),
                title=_title(point, metric),
                lines=spot.lines,
                label=labels[at],
                front=at in front,
                shipped=point.row.shipped,
                whisker=round(min(across.place(p95), canvas.plot.right), 1) if p95 and p95 > point.x else None,
            )
        )
    return tuple(drawn)


def _spot(point: Point, canvas: Canvas, largest: float) -> Spot:
    radius, most = _PLAIN_PX, _LARGEST_PX * (0.7 if canvas.narrow else 1.0)
    if canvas.by_latency and point.size_bytes and largest:
        radius = max(_SMALLEST_PX, most * math.sqrt(point.size_bytes / largest))
    name = figures.short_name(point.row.artifact)
    size = figures.say(point.row.file_bytes, figures.mebibytes)
    head = f"{name}, ships" if point.row.shipped else name
    lines = (head, f"{figures.milliseconds(point.x)}, {size}" if canvas.by_latency else size)
    x, y = round(canvas.across.place(point.x), 1), round(canvas.up.place(point.y), 1)
    return Spot(x, y, radius, lines[:1] if canvas.narrow else lines)


def _strokes(points: list[Point], front: list[int], across: Axis, up: Axis) -> list[Box]:
    """The staircase and the whiskers as thin boxes, for labels to keep clear of."""
    places = [(across.place(points[at].x), up.place(points[at].y)) for at in front]
    boxes = []
    for (x, y), (next_x, next_y) in pairwise(places):
        boxes += [Box(x, y - 1.5, next_x, y + 1.5), Box(next_x - 1.5, next_y, next_x + 1.5, y)]
    for point in points:
        p95 = figures.detail_of(point.row.latency, "p95")
        if p95 and p95 > point.x:
            y = up.place(point.y)
            boxes.append(Box(across.place(point.x), y - 4, across.place(p95), y + 4))
    return boxes


def _title(point: Point, metric: str) -> str:
    row = point.row
    return (
        f"{row.artifact.name}: {figures.score(point.y, metric)} {metric}, "
        f"p50 {figures.say(row.latency, figures.milliseconds)}, {figures.say(row.file_bytes, figures.mebibytes)}. "
        f"{row.reason}"
    ).strip()


def _outline(kind: Kind, x: float, y: float, radius: float) -> str:
    """Square, diamond, circle or triangle of the same area as a circle of ``radius``."""
    if kind == "teacher":
        half = radius * math.sqrt(math.pi) / 2
        return f"M{x - half:.1f} {y - half:.1f}h{2 * half:.1f}v{2 * half:.1f}h{-2 * half:.1f}z"
    if kind == "null-twin":
        half = radius * math.sqrt(math.pi / 2)
        return f"M{x:.1f} {y - half:.1f}l{half:.1f} {half:.1f}l{-half:.1f} {half:.1f}l{-half:.1f} {-half:.1f}z"
    if kind == "variant":
        side = radius * math.sqrt(4 * math.pi / math.sqrt(3))
        height = side * math.sqrt(3) / 2
        return f"M{x:.1f} {y - 2 * height / 3:.1f}l{side / 2:.1f} {height:.1f}h{-side:.1f}z"
    arc = f"a{radius:.1f} {radius:.1f} 0 1 0"
    return f"M{x - radius:.1f} {y:.1f}{arc} {2 * radius:.1f} 0{arc} {-2 * radius:.1f} 0z"


def _front_path(front: list[Point], across: Axis, up: Axis) -> str:
    """A staircase: between two points of the front, the cheaper one is still the best there is."""
    if len(front) < 2:
        return ""
    start = front[0]
    steps = [f"M{across.place(start.x):.1f} {up.place(start.y):.1f}"]
    steps += [f"H{across.place(point.x):.1f}V{up.place(point.y):.1f}" for point in front[1:]]
    return "".join(steps)


def _caption(by_latency: bool) -> str:
    if by_latency:
        return (
            "Up and to the left is better. The area of a mark is its file size; a thin line runs from p50 to p95. "
            "The staircase is the Pareto front: no other file is both faster and more accurate than one on it."
        )
    return (
        "No latency is available here, so that accuracy stands over file size. Up and to the left is better. "
        "The staircase is the Pareto front: no other file is both smaller and more accurate than one on it."
    )
