"""What the report says about rows relative to each other: drops, ratios, what distillation bought. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from compressor.evaluate import PERPLEXITY
from compressor.types import Figure, Measurement, Unavailable
from targets.outcome import ProfileOutcome, Row, RunSummary
from targets.report.figures import is_percentage, points, score, value_of


def teacher_of(outcome: ProfileOutcome) -> Row | None:
    """The teacher's fp32 row, that every ratio and drop refers to."""
    teachers = [row for row in outcome.rows if row.artifact.role == "teacher"]
    return next((row for row in teachers if row.artifact.precision == "fp32"), teachers[0] if teachers else None)


def best_split(row: Row) -> tuple[str, Figure]:
    """The split whose figure speaks for this row: test where it was touched, otherwise validation."""
    return ("test", row.test) if isinstance(row.test, Measurement) else ("validation", row.validation)


def drop(row: Row, outcome: ProfileOutcome) -> tuple[str, float] | None:
    """Split and signed difference (row minus teacher), on test when both have it, otherwise on validation."""
    teacher = teacher_of(outcome)
    if teacher is None:
        return None
    return difference(row, teacher)


def difference(row: Row, other: Row) -> tuple[str, float] | None:
    """Split and ``row - other`` of the task's metric (a perplexity: their ratio - 1); None when no split has both."""
    for split, mine, theirs in (("test", row.test, other.test), ("validation", row.validation, other.validation)):
        if isinstance(mine, Measurement) and isinstance(theirs, Measurement):
            if mine.unit == PERPLEXITY:
                return split, mine.value / theirs.value - 1
            return split, mine.value - theirs.value
    return None


def size_ratio(row: Row, outcome: ProfileOutcome) -> Figure:
    """Bytes of the teacher's fp32 file / bytes of this one."""
    teacher = teacher_of(outcome)
    if teacher is None:
        return Unavailable("the profile has no teacher row")
    mine, theirs = row.file_bytes, teacher.file_bytes
    if isinstance(mine, Unavailable):
        return mine
    if isinstance(theirs, Unavailable) or mine.value <= 0:
        return Unavailable("the teacher's file size is not known" if mine.value > 0 else "the file is empty")
    return Measurement(theirs.value / mine.value, "x", mine.origin, mine.device)


@dataclass(frozen=True)
class TwinVerdict:
    """Student against null twin on one profile."""

    profile: str
    sentence: str


def twin_verdicts(summary: RunSummary) -> tuple[TwinVerdict, ...]:
    """One sentence per profile that has both a null twin and a student of the same precision."""
    found = []
    for outcome in summary.outcomes:
        sentence = _twin_sentence(outcome, summary)
        if sentence:
            found.append(TwinVerdict(outcome.title, sentence))
    return tuple(found)


def _twin_sentence(outcome: ProfileOutcome, summary: RunSummary) -> str:
    twin = next((row for row in outcome.rows if row.artifact.role == "null-twin"), None)
    if twin is None:
        return ""
    precision = twin.artifact.precision
    students = [row for row in outcome.rows if row.artifact.role == "student" and row.artifact.precision == precision]
    if not students:
        return ""
    student = students[0]
    found = difference(student, twin)
    if found is None:
        return "The null twin and the student cannot be compared here: no split has a figure for both."
    split, bought = found
    unit = " points" if is_percentage(summary.metric) else ""
    scores = " against ".join(
        score(value, summary.metric)
        for value in (value_of(getattr(row, split)) for row in (student, twin))
        if value is not None
    )
    head = f"Distillation bought {points(bought, summary.metric)}{unit} of {summary.metric} on {split} ({scores})"
    if summary.metric == PERPLEXITY:
        return (
            f"Distillation changed {PERPLEXITY} by {points(bought, PERPLEXITY)} on {split} ({scores}; lower is better)."
        )
    return head + _noise(bought, student, twin, split, summary)


def _noise(bought: float, student: Row, twin: Row, split: str, summary: RunSummary) -> str:
    """How the difference compares with sampling noise: normal 95 % interval of two independent proportions, or of two
    figures that bring a standard error of their own.

    Both were scored on the same samples, so the true interval is narrower: the statement is conservative.
    """
    count = summary.data.sizes.get(split, 0)
    variances = [_variance(getattr(row, split), count) for row in (student, twin)]
    if count < 1 or not is_percentage(summary.metric) or None in variances:
        return "."
    half = 1.96 * math.sqrt(sum(variance for variance in variances if variance is not None))
    verdict = "more than" if abs(bought) > half else "no more than"
    runs = "one seed" if summary.paired_seeds is None else f"seed {summary.seed} alone"
    return f"; that is {verdict} the sampling noise of {count:,} samples (±{100 * half:.2f} points at 95 %), on {runs}."


def _variance(figure: Figure, count: int) -> float | None:
    """Of a figure over ``count`` samples: of a share, unless it says how uncertain it is."""
    if not isinstance(figure, Measurement) or count < 1:
        return None
    error = figure.detail.get("standard_error")
    return float(error) ** 2 if error is not None else figure.value * (1 - figure.value) / count
