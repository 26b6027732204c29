"""The page of ``compress-for-device diff``: one self-contained HTML file, no scripts, no network. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 920.0, 320.0, 46.0, 904.0, 18.0, 296.0
CEILING_DB = 80.0  # beyond this, files agree to float32's own rounding
STEP_DB = 20


@dataclass(frozen=True)
class LayerRow:
    """One layer as shown."""

    layer: str
    operator: str
    sqnr_db: float
    added: float
    bad: bool

    @property
    def sqnr(self) -> str:
        return decibels(self.sqnr_db)

    @property
    def noise(self) -> str:
        return f"{self.added:.1e}" if self.added else "0"


@dataclass(frozen=True)
class SampleRow:
    """One of the worst samples as shown."""

    index: int
    error: str
    same: str
    first: str
    second: str


@dataclass(frozen=True)
class DifferenceView:
    """Everything that the page shows."""

    first: str
    second: str
    data: str
    samples: int
    verdict: str
    threshold_db: float
    layers: tuple[LayerRow, ...]
    worst: tuple[SampleRow, ...]
    unmatched: int


def decibels(value: float) -> str:
    """``equal`` for 200 dB and more, which is what an exact copy counts as."""
    return "equal" if value >= 200 else f"{value:.1f}"


def difference_page(view: DifferenceView) -> str:
    """The whole page. Every value from outside is escaped by the template engine."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("difference.html").render(view=view, plot=_plot(view.layers, view.threshold_db))


def _plot(layers: Sequence[LayerRow], threshold_db: float) -> dict[str, Any]:
    floor = min(0.0, STEP_DB * (min((row.sqnr_db for row in layers), default=0.0) // STEP_DB))
    floor = max(floor, -40.0)

    def up(value: float) -> float:
        share = (min(max(value, floor), CEILING_DB) - floor) / (CEILING_DB - floor)
        return round(BOTTOM - share * (BOTTOM - TOP), 1)

    span = (RIGHT - LEFT) / max(1, len(layers) - 1)
    marks = [
        {
            "x": round(LEFT + span * place, 1),
            "y": up(row.sqnr_db),
            "bad": row.bad,
            "title": f"{row.layer} ({row.operator}): {row.sqnr} dB",
        }
        for place, row in enumerate(layers)
    ]
    path = "M" + "L".join(f"{mark['x']} {mark['y']}" for mark in marks) if marks else ""
    first = next((place for place, row in enumerate(layers) if row.bad), None)
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": RIGHT,
        "ceiling": int(CEILING_DB),
        "ticks": [{"y": up(level), "text": str(level)} for level in range(int(floor), int(CEILING_DB) + 1, STEP_DB)],
        "limit": up(threshold_db),
        "path": path,
        "marks": marks,
        "named": None if first is None else _label(marks[first], layers[first].layer),
    }


def _label(mark: dict[str, Any], text: str) -> dict[str, Any]:
    right = mark["x"] > (LEFT + RIGHT) / 2
    return {
        "x": mark["x"] + (-8 if right else 8),
        "y": max(TOP + 8, mark["y"] - 8),
        "anchor": "end" if right else "start",
        "text": f"first bad layer: {text}",
    }
