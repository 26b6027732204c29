"""Geometry of the picture: front, areas, axes, labels."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.types import Unavailable
from targets.outcome import RunSummary
from targets.report.axes import axis
from targets.report.figures import points, significant
from targets.report.labels import Box, Spot, place_labels
from targets.report.picture import Picture, draw


def picture_of(summary: RunSummary, index: int, width: float = 920, height: float = 470) -> Picture:
    picture = draw(summary.outcomes[index], summary.metric, width, height)
    assert picture is not None
    return picture


def test_front_holds_exactly_what_nothing_beats(summary: RunSummary) -> None:
    front = {mark.name for mark in picture_of(summary, 0).marks if mark.front}
    assert front == {
        "student/int8-static-per-tensor",
        "student/int8-static-per-channel",
        "student/fp32",
        "teacher/fp32",
    }


def test_bubble_area_is_proportional_to_file_size(summary: RunSummary) -> None:
    marks = {mark.name: mark for mark in picture_of(summary, 0).marks}
    ratio = marks["teacher/fp32"].radius ** 2 / marks["student/fp32"].radius ** 2
    assert ratio == pytest.approx(4_421_310 / 405_120, rel=0.03)


def test_faster_is_left_and_better_is_up(summary: RunSummary) -> None:
    marks = {mark.name: mark for mark in picture_of(summary, 0).marks}
    assert marks["student/int8-static-per-tensor"].x < marks["student/fp32"].x < marks["teacher/fp32"].x
    assert marks["teacher/fp32"].y < marks["student/fp32"].y < marks["null-twin/fp32"].y
    decade = math.log10(4.02 / 0.486) / math.log10(0.731 / 0.262)
    pixels = (marks["teacher/fp32"].x - marks["student/fp32"].x) / (
        marks["student/int8-dynamic"].x - marks["student/int8-static-per-tensor"].x
    )
    assert pixels == pytest.approx(decade, rel=0.01)


@pytest.mark.parametrize(("index", "size"), [(0, (920, 470)), (0, (380, 440)), (1, (920, 470)), (1, (380, 440))])
def test_labels_stay_inside_and_apart(summary: RunSummary, index: int, size: tuple[float, float]) -> None:
    picture = picture_of(summary, index, *size)
    boxes = [mark.label.box for mark in picture.marks]
    assert all(box.overlap(picture.plot) == pytest.approx(box.area) for box in boxes)
    overlaps = [a.overlap(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :]]
    assert max(overlaps) == 0


def test_without_latency_size_takes_its_place(summary: RunSummary) -> None:
    picture = picture_of(summary, 1)
    assert not picture.by_latency
    assert picture.ceiling is None
    assert all(mark.whisker is None for mark in picture.marks)
    assert draw(summary.outcomes[2], summary.metric, 920, 470) is None
    assert draw(summary.outcomes[3], summary.metric, 920, 470) is None


def test_rows_without_a_place_are_named(summary: RunSummary) -> None:
    first = summary.outcomes[0]
    late = dataclasses.replace(first.rows[-1], latency=Unavailable("it crashed"))
    picture = draw(dataclasses.replace(first, rows=(*first.rows[:-1], late)), "accuracy", 920, 470)
    assert picture is not None
    assert picture.absent == (("student/int8-dynamic", "unavailable: it crashed"),)


@given(st.lists(st.floats(1e-4, 1e6), min_size=1, max_size=9), st.booleans())
def test_axis_keeps_values_inside_its_margin(values: list[float], log: bool) -> None:
    scale = axis(values, 64, 906, log=log, margin=40)
    assert all(64 + 39.9 <= scale.place(value) <= 906 - 39.9 for value in values)
    ticks = scale.ticks(str, 7)
    assert 1 <= len(ticks) <= 9
    assert all(64 - 0.1 <= tick.position <= 906.1 for tick in ticks)


def test_crowded_labels_do_not_cover_each_other() -> None:
    spots = [Spot(300 + 3 * i, 200 + 2 * i, 5, (f"candidate {i}", "0.27 ms, 0.1 MiB")) for i in range(7)]
    boxes = [label.box for label in place_labels(spots, Box(60, 10, 900, 420))]
    assert sum(a.overlap(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :]) == 0


@given(st.floats(1e-6, 1e9))
def test_significant_keeps_three_digits(value: float) -> None:
    assert float(significant(value)) == pytest.approx(value, rel=0.006)
    assert "e" not in significant(value)


def test_points_never_show_a_hyphen_or_a_signed_zero() -> None:
    assert points(-0.00001, "accuracy") == "±0.00"
    assert points(0.0049, "accuracy") == "+0.49"
    assert points(-0.01, "accuracy") == "−1.00"
