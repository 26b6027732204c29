"""``report.html``: one self-contained page, no scripts, no network. This module prepares, ``template.html`` shows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from compressor.evaluate import PERPLEXITY
from compressor.types import Figure, Measurement, Unavailable
from targets.outcome import ProfileOutcome, Row, RunSummary, State
from targets.report import figures
from targets.report.compare import size_ratio, twin_verdicts
from targets.report.facts import fact_groups
from targets.report.footnotes import Footnotes, full
from targets.report.picture import Picture, draw, kind_of
from targets.report.seeds import SEED_HEADERS, seed_rows, seed_sentences
from targets.report.table import (
    compile_text,
    coverage_text,
    drop_text,
    explained_floats,
    latency_text,
    lower_bound,
    nearness_text,
    shown_latency,
)

WIDE_PX, NARROW_PX = (920.0, 470.0), (380.0, 440.0)


@dataclass(frozen=True)
class Cell:
    """One figure as shown: text, a second line, and either its origin or the number of the reason why it is absent."""

    text: str
    sub: str = ""
    origin: str = ""
    device: str = ""
    note: int = 0


@dataclass(frozen=True)
class Card:
    """The headline of a profile."""

    figures: tuple[tuple[str, Cell], ...]
    reasons: tuple[str, ...]


def to_html(summary: RunSummary) -> str:
    """The whole page. Every value from outside is escaped by the template engine."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["significant"] = figures.small
    return environment.get_template("template.html").render(
        summary=summary,
        profiles=[_profile(index, outcome, summary.metric) for index, outcome in enumerate(summary.outcomes)],
        twins=twin_verdicts(summary),
        seed_headers=SEED_HEADERS,
        seed_rows=seed_rows(summary),
        seed_sentences=seed_sentences(summary),
        groups=fact_groups(summary),
        recipe=json.dumps(summary.recipe, indent=2, ensure_ascii=False, default=str),
    )


def _profile(index: int, outcome: ProfileOutcome, metric: str) -> dict[str, Any]:
    notes = Footnotes()
    rows = [_row(row, outcome, metric, notes) for row in outcome.rows]
    return {
        "id": f"profile-{index}",
        "outcome": outcome,
        "state": "missing" if outcome.missing else "kept" if outcome.kept else "missed",
        "card": _card(outcome, metric),
        "pictures": _pictures(outcome, metric),
        "rows": rows,
        "reasons": notes.reasons,
        "promise": _promise(outcome, metric),
        "floats": [(row.artifact.name, explained_floats(row)) for row in outcome.rows],
        "fallbacks": [
            (row.artifact.name, row.compiled.placed, row.compiled.fallback)
            for row in outcome.rows
            if row.compiled is not None and (row.compiled.fallback or row.compiled.placed)
        ],
        "estimates": [(row.artifact.name, row.compiled.estimates) for row in outcome.rows if row.compiled],
        "compile_notes": [(row.artifact.name, row.compiled.notes) for row in outcome.rows if row.compiled],
    }


def _pictures(outcome: ProfileOutcome, metric: str) -> list[tuple[str, Picture]]:
    """The same picture for a screen and for a telephone: scaled down, its text would not be legible there."""
    found = [(name, draw(outcome, metric, *size)) for name, size in (("wide", WIDE_PX), ("narrow", NARROW_PX))]
    return [(name, picture) for name, picture in found if picture is not None]


def _cell(figure: Figure, render: Callable[[float], str], notes: Footnotes, sub: str = "") -> Cell:
    if isinstance(figure, Measurement):
        return Cell(render(figure.value), sub, figure.origin.value, figure.device)
    return Cell("unavailable", note=notes.number(full(figure)))


def _beside(row: Row) -> str:
    """What stands below a latency: its p95, and that it is a mean where it is one."""
    figure = shown_latency(row)
    if figure is row.estimate:
        return "lower bound" if lower_bound(figure) else ""
    p95 = figures.detail_of(row.latency, "p95")
    mean = ["mean"] if latency_text(row).endswith("(mean)") else []
    return ", ".join([*mean, *([f"p95 {figures.milliseconds(p95)}"] if p95 else [])])


def _row(row: Row, outcome: ProfileOutcome, metric: str, notes: Footnotes) -> dict[str, Any]:
    def as_score(value: float) -> str:
        return figures.score(value, metric)

    kind = kind_of(row)
    ratio = figures.value_of(size_ratio(row, outcome)) if kind != "teacher" else None
    return {
        "row": row,
        "kind": kind,
        "validation": _cell(row.validation, as_score, notes),
        "test": _cell(row.test, as_score, notes),
        "drop": _said(drop_text(row, outcome, metric), notes),
        "latency": _cell(shown_latency(row), figures.milliseconds, notes, _beside(row)),
        "speedup": _cell(row.speedup, figures.times, notes),
        "size": _cell(row.file_bytes, figures.mebibytes, notes, f"{figures.times(ratio)} smaller" if ratio else ""),
        "memory": _cell(row.peak_memory, lambda value: f"{figures.significant(value)} MiB", notes),
        "coverage": _said(coverage_text(row), notes),
        "state": {State.EXECUTED: "good", State.PROXY: "fair", State.COMPILED: "fair"}.get(row.state, "bad"),
        "beside": _comparisons(row),
    }


def _said(text: str, notes: Footnotes) -> Cell:
    """A cell of the plain table: its part in brackets goes to the second line, a reason to the footnotes."""
    if text.startswith("unavailable: "):
        return Cell("unavailable", note=notes.number(full(Unavailable(text.removeprefix("unavailable: ")))))
    number, _, rest = text.partition(" (")
    return Cell(number, rest.rstrip(")"))


def _comparisons(row: Row) -> str:
    """Agreement with the teacher, with the fp32 file and with the ONNX file, where they were measured; compile time."""
    parts = []
    if row.regression_loyalty is not None:
        parts.append(f"regression loyalty {100 * row.regression_loyalty:.2f} %")
    if row.loyalty is not None:
        parts.append(f"label loyalty {100 * row.loyalty.label:.2f} %")
        parts.append(f"probability loyalty {100 * row.loyalty.probability:.2f} %")
    if row.agreement is not None:
        parts.append(f"agreement with its fp32 file {100 * row.agreement:.2f} %")
    return " · ".join(text for text in (", ".join(parts), nearness_text(row), compile_text(row)) if text)


def _card(outcome: ProfileOutcome, metric: str) -> Card | None:
    row = outcome.shipped
    if row is None:
        return None
    notes = Footnotes()
    tested = isinstance(row.test, Measurement)
    accuracy = row.test if tested else row.validation
    split = "test" if tested else "validation"
    drop = drop_text(row, outcome, metric).split(" (")[0]
    against = (
        "" if drop.startswith("unavailable") else f"{drop} to the teacher" if drop != "reference" else "the teacher"
    )
    ratio = figures.value_of(size_ratio(row, outcome))
    cells = (
        (f"{metric}, {split}", _cell(accuracy, lambda value: figures.score(value, metric), notes, against)),
        (
            "p50 latency",
            _cell(shown_latency(row), figures.milliseconds, notes, _beside(row)),
        ),
        (
            "file size",
            _cell(row.file_bytes, figures.mebibytes, notes, f"{figures.times(ratio)} smaller" if ratio else ""),
        ),
        ("speed-up", _cell(row.speedup, figures.times, notes, "against the teacher's fp32 export")),
    )
    return Card(cells, tuple(notes.reasons))


def _promise(outcome: ProfileOutcome, metric: str) -> str:
    """What the user asked for, in words."""
    promise = outcome.promise
    unit = " points" if figures.is_percentage(metric) else ""
    parts = []
    if promise.max_drop is not None:
        lost = figures.points(promise.max_drop, metric).lstrip("+±")
        perplexity = f"{PERPLEXITY} at most {figures.points(math.expm1(promise.max_drop), metric).lstrip('+±')} higher"
        parts.append(perplexity if metric == PERPLEXITY else f"at most {lost}{unit} of {metric} lost")
    if promise.max_latency_ms is not None:
        parts.append(f"p50 at most {figures.milliseconds(promise.max_latency_ms)}")
    if promise.max_size_mib is not None:
        parts.append(f"file at most {figures.significant(promise.max_size_mib)} MiB")
    if promise.min_speedup is not None:
        parts.append(f"at least {figures.times(promise.min_speedup)} the teacher's speed")
    return "; ".join(parts) or "no limit was asked for"
