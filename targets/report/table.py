"""The table of a run as plain strings: the terminal and ``report.md`` print the same cells."""

from __future__ import annotations

from compressor.types import Figure, Measurement, Unavailable
from targets.base import UNQUANTIZED, NodeFact
from targets.gate import PAIRED_ERROR
from targets.outcome import ProfileOutcome, Row, RunSummary
from targets.report import figures
from targets.report.compare import drop, size_ratio

FLOATS = frozenset({"fp32", "fp16", "bf16"})
HEADERS = [
    "profile",
    "model",
    "validation",
    "test",
    "to teacher",
    "p50",
    "p95",
    "origin",
    "speed-up",
    "size",
    "size ratio",
    "peak memory",
    "kernels int8",
    "state",
    "reason",
]


OVERVIEW = [
    "profile",
    "ships",
    "test",
    "to teacher",
    "p50",
    "speed-up",
    "size",
    "smaller",
    "peak memory",
    "same class as its ONNX file",
    "worst difference",
    "compile",
    "state",
    "promise",
]


def headers(_summary: RunSummary | None = None) -> list[str]:
    """Column names of :func:`rows`."""
    return list(HEADERS)


def rows(summary: RunSummary) -> list[list[str]]:
    """One list of cells per artifact and profile, in the order of :data:`HEADERS`. No cell is empty."""
    return [cells for outcome in summary.outcomes for cells in profile_rows(outcome, summary.metric)]


def profile_rows(outcome: ProfileOutcome, metric: str) -> list[list[str]]:
    """The rows of one profile; a profile without any row has one that says why."""
    if not outcome.rows:
        why = f"unavailable: {outcome.missing or outcome.verdict or 'nothing was built for this profile'}"
        return [[outcome.profile, "none", *[why] * (len(HEADERS) - 3), outcome.verdict or why]]
    return [_cells(row, outcome, metric) for row in outcome.rows]


def overview_row(outcome: ProfileOutcome, metric: str) -> list[str]:
    """What ships on a profile, in the order of :data:`OVERVIEW`; the test figure with its origin."""
    promise = "target missing" if outcome.missing else "kept" if outcome.kept else "missed"
    row = outcome.shipped
    if row is None:
        why = f"unavailable: {outcome.missing or outcome.verdict or 'nothing was built for this profile'}"
        return [outcome.profile, "nothing", *[why] * (len(OVERVIEW) - 4), "unavailable", promise]
    near, test = row.nearness, figures.say(row.test, lambda value: figures.score(value, metric))
    itself = "unavailable: ONNX Runtime on this machine ran the ONNX file itself, or cannot run it"
    same = f"{100 * near.argmax:.2f} %" if near is not None and near.argmax is not None else itself
    return [
        outcome.profile,
        row.artifact.name,
        f"{test} ({row.test.origin.value})" if isinstance(row.test, Measurement) else test,
        drop_text(row, outcome, metric),
        latency_text(row),
        figures.say(row.speedup, figures.times),
        figures.say(row.file_bytes, figures.mebibytes),
        figures.say(size_ratio(row, outcome), figures.times),
        figures.say(row.peak_memory, lambda value: f"{figures.significant(value)} MiB"),
        "no classes" if near is not None and near.argmax is None else same,
        itself if near is None else f"{figures.small(near.worst)} of {figures.significant(near.reach)}",
        compile_text(row).removeprefix("compiled in ") or "nothing to compile",
        row.state.value,
        promise,
    ]


def _cells(row: Row, outcome: ProfileOutcome, metric: str) -> list[str]:
    return [
        outcome.profile,
        f"{row.artifact.name} (ships)" if row.shipped else row.artifact.name,
        figures.say(row.validation, lambda value: figures.score(value, metric)),
        figures.say(row.test, lambda value: figures.score(value, metric)),
        drop_text(row, outcome, metric),
        latency_text(row),
        p95_text(row),
        origin_text(shown_latency(row)),
        figures.say(row.speedup, figures.times),
        figures.say(row.file_bytes, figures.mebibytes),
        figures.say(size_ratio(row, outcome), figures.times),
        figures.say(row.peak_memory, lambda value: f"{figures.significant(value)} MiB"),
        coverage_text(row),
        row.state.value,
        row.reason or "not stated",
    ]


def drop_text(row: Row, outcome: ProfileOutcome, metric: str) -> str:
    """``−0.38 ± 0.61 (test)``, with the paired 95 % interval where it is known; the teacher is its own reference."""
    if row.artifact.role == "teacher" and row.artifact.precision == "fp32":
        return "reference"
    found = drop(row, outcome)
    if found is None:
        return "unavailable: no split has a figure for both this row and the teacher"
    split, value = found
    error = figures.detail_of(row.test, PAIRED_ERROR) if split == "test" else None
    within = "" if error is None else f" ± {1.96 * 100 * error:.2f}"
    return f"{figures.points(value, metric)}{within} ({split})"


def shown_latency(row: Row) -> Figure:
    """What was measured, or what the compiler estimates where nothing could be."""
    return row.latency if isinstance(row.latency, Measurement) else row.estimate or row.latency


def lower_bound(figure: Figure) -> bool:
    """Does an estimate leave something out?"""
    return isinstance(figure, Measurement) and str(figure.detail.get("counted", "")).startswith("lower bound")


def latency_text(row: Row) -> str:
    """p50, the mean of a file with early exits, or an estimate; the latter two say so."""
    figure = shown_latency(row)
    if isinstance(row.latency, Measurement):
        mean = row.latency.detail.get("statistic") == "mean"
        return figures.say(figure, figures.milliseconds) + (" (mean)" if mean else "")
    if isinstance(figure, Measurement):
        least = ", a lower bound" if lower_bound(figure) else ""
        return f"{figures.milliseconds(figure.value)} ({figure.origin.value}{least})"
    return figures.unavailable(figure)


def p95_text(row: Row) -> str:
    """The 95th percentile of latency."""
    value = figures.detail_of(row.latency, "p95")
    if value is not None:
        return figures.milliseconds(value)
    if isinstance(row.latency, Unavailable):
        return figures.unavailable(row.latency)
    return "unavailable: this origin gives a single figure"


def origin_text(figure: Figure) -> str:
    """``measured on <device>``."""
    if isinstance(figure, Measurement):
        return f"{figure.origin.value} on {figure.device}"
    return figures.unavailable(figure)


def nearness_text(row: Row) -> str:
    """How far the compiled file's answers are from the ONNX file's; empty where there is nothing to compare."""
    near = row.nearness
    if near is None:
        return ""
    same = "" if near.argmax is None else f"same class {100 * near.argmax:.2f} %, "
    return (
        f"beside ONNX Runtime on the same file ({near.samples:,} test samples): {same}"
        f"worst difference {figures.small(near.worst)} of outputs up to {figures.significant(near.reach)}"
    )


def compile_text(row: Row) -> str:
    """How long the compiler took, where there was one."""
    seconds = row.compiled.compile_seconds if row.compiled is not None else 0.0
    return f"compiled in {figures.small(seconds)} s" if seconds else ""


def explained_floats(row: Row) -> tuple[NodeFact, ...]:
    """What stayed float and needs a reason: not the nodes of a file in which nothing was to be quantized."""
    facts = row.coverage.left_float if row.coverage is not None else ()
    if row.artifact.precision in FLOATS:
        return ()
    return tuple(fact for fact in facts if fact.reason != UNQUANTIZED)


def coverage_text(row: Row) -> str:
    """``7 of 8``: of the Conv, Gemm and MatMul that the runtime really runs, how many run quantized."""
    if row.coverage is not None:
        return f"{row.coverage.quantized} of {row.coverage.total}"
    if row.artifact.precision == "fp32":
        return "none (fp32)"
    return "unavailable: the runtime's graph was not read"


def headline(outcome: ProfileOutcome, metric: str) -> str:
    """One sentence for people: what ships for this profile and what it is worth."""
    row = outcome.shipped
    if row is None:
        return f"{outcome.title}: nothing ships. {outcome.verdict or outcome.missing}".strip()
    split, figure = ("test", row.test) if isinstance(row.test, Measurement) else ("validation", row.validation)
    accuracy = figures.say(figure, lambda value: f"{figures.score(value, metric)} {metric}")
    if isinstance(figure, Measurement):
        accuracy += f" ({split}, {figure.origin.value})"
    else:
        accuracy = f"{metric} {accuracy}"
    latency = latency_text(row)
    faster = figures.say(row.speedup, lambda value: f"{figures.times(value)} the teacher's speed")
    smaller = figures.say(size_ratio(row, outcome), lambda value: f"{figures.times(value)} smaller")
    size = figures.say(row.file_bytes, figures.mebibytes)
    kind = "mean" if latency.endswith("(mean)") else "p50"
    speed = f"{kind} {latency.removesuffix(' (mean)')} ({faster})"
    speed = speed if isinstance(row.latency, Measurement) else f"latency {latency}"
    return (
        f"{outcome.title}: {row.artifact.name} ships with {accuracy}, {speed}, {size} ({smaller}). {outcome.verdict}"
    ).strip()
