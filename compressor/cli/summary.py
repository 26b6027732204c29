"""The terminal's view of a run: one table a profile, every number with its origin, reasons as footnotes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from compressor.cli.output import table
from compressor.types import Figure, Measurement, Unavailable

if TYPE_CHECKING:
    from targets.outcome import Row, RunSummary
    from targets.report.footnotes import Footnotes

HEADERS = ("", "model", "accuracy", "p50 / p95", "speed-up", "size", "int8 kernels", "state")


def show(summary: RunSummary, paths: Mapping[str, Any]) -> None:
    """The tables, verdicts and paths a person wants to see at the end."""
    from targets.exits import sentence
    from targets.report.footnotes import Footnotes

    for outcome in summary.outcomes:
        notes = Footnotes()
        rows = [_cells(row, summary.metric, notes) for row in outcome.rows]
        print()
        table(list(HEADERS), rows, f"{outcome.profile}: {outcome.target} on {outcome.device}")
        for number, reason in enumerate(notes.reasons, 1):
            print(f"  [{number}] {reason}")
        print(f"  {'kept' if outcome.kept else 'MISSED'}: {outcome.verdict}")
        for told in filter(None, map(sentence, outcome.rows)):
            print(f"  exits: {told}")
        if outcome.missing:
            print(f"  missing: {outcome.missing}")
    _show_seeds(summary)
    for warning in summary.warnings:
        print(f"note: {warning}")
    print(f"\nreport    {paths['report_html']}")
    for name, path in paths["packages"].items():
        print(f"package   {path}  ({name})")


def _show_seeds(summary: RunSummary) -> None:
    from targets.report.seeds import SEED_HEADERS, seed_rows, seed_sentences

    rows = seed_rows(summary)
    if rows:
        print()
        table(list(SEED_HEADERS), rows, f"paired seeds, {summary.metric}")
    for sentence in seed_sentences(summary):
        print(f"  {sentence}")


def _cells(row: Row, metric: str, notes: Footnotes) -> list[str]:
    from targets.report.table import shown_latency

    coverage = row.coverage
    state = row.state.value + (f" [{notes.number(row.reason)}]" if row.reason and not row.shipped else "")
    return [
        "->" if row.shipped else "",
        row.artifact.name,
        _accuracy(row, metric, notes),
        _say(shown_latency(row), _latency, notes),
        _say(row.speedup, lambda figure: f"{figure.value:.2f}x", notes),
        _say(row.file_bytes, lambda figure: _size(figure.value), notes),
        f"{coverage.quantized} of {coverage.total}" if coverage is not None and coverage.total else "none",
        state,
    ]


def _accuracy(row: Row, metric: str, notes: Footnotes) -> str:
    """The test figure; for candidates that were not chosen the validation figure, marked."""
    from targets.report.figures import is_percentage

    percent = is_percentage(metric)

    def say(figure: Measurement, split: str) -> str:
        number = f"{100 * figure.value:.2f}%" if percent else f"{figure.value:.4f}"
        return f"{number} {split}, {figure.origin.value}"

    if isinstance(row.test, Measurement):
        return say(row.test, "test")
    return _say(row.validation, lambda figure: say(figure, "validation"), notes)


def _say(figure: Figure, text: Callable[[Measurement], str], notes: Footnotes) -> str:
    return f"unavailable [{notes.number(figure.reason)}]" if isinstance(figure, Unavailable) else text(figure)


def _latency(figure: Measurement) -> str:
    from targets.report.table import lower_bound

    p95 = figure.detail.get("p95")
    upper = f" / {float(p95):.3g}" if p95 is not None else ""
    mean = "mean " if figure.detail.get("statistic") == "mean" else ""
    bound = ", a lower bound" if lower_bound(figure) else ""
    return f"{mean}{figure.value:.3g}{upper} {figure.unit}, {figure.origin.value}{bound}"


def _size(count: float) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
