"""The table of paired seeds and its verdict in words. Pure."""

from __future__ import annotations

from compressor.evaluate import PERPLEXITY, quality
from compressor.types import Figure, Measurement
from targets.outcome import PairedSeeds, RunSummary, SeedRow
from targets.report.figures import MINUS, is_percentage, points, say, score, value_of

SEED_HEADERS = ("seed", "student, validation", "twin, validation", "student, test", "twin, test", "difference")


def seed_rows(summary: RunSummary) -> list[list[str]]:
    """A line a seed, and the means where every seed has the figure."""
    found = summary.paired_seeds
    if found is None:
        return []

    def cell(figure: Figure) -> str:
        return say(figure, lambda value: score(value, summary.metric))

    lines = [[str(row.seed), *map(cell, _figures(row)), _difference(row, found.split, summary.metric)]
             for row in found.rows]  # fmt: skip
    columns = zip(*(map(value_of, _figures(row)) for row in found.rows), strict=True)
    means = [_mean(list(column), summary.metric) for column in columns]
    last = "" if found.mean is None else gain(found.mean, summary.metric)
    return [*lines, ["mean", *means, last]]


def seed_sentences(summary: RunSummary) -> list[str]:
    """What the seeds show: verdict, interval, and what of the teacher is left."""
    found = summary.paired_seeds
    if found is None:
        return []
    head = f"{len(found.rows)} paired seeds, fp32 files in the runtime of {found.profile}, on {found.split}"
    if found.mean is None or found.low is None or found.high is None:
        return [f"{head}: {found.verdict}."]
    metric = "log-likelihood of a token" if summary.metric == PERPLEXITY else summary.metric
    unit = " points" if is_percentage(summary.metric) else ""
    texts = [gain(value, summary.metric) for value in (found.mean, found.low, found.high)]
    half = gain((found.high - found.low) / 2, summary.metric).lstrip("+±")
    sentences = [
        f"{head}: student over null twin {texts[0]}{unit} of {metric} on average (90 % interval {texts[1]} to "
        f"{texts[2]}). Verdict: {_words(found)}.",
        f"With this spread a mean difference of {half}{unit} would have been seen.",
    ]
    return [*sentences, *_kept(found, summary.metric)]


def _words(found: PairedSeeds) -> str:
    if found.verdict == f"{len(found.rows)}/{len(found.rows)}":
        return f"{found.verdict}, better on every seed"
    return f"{found.verdict} ({found.wins} of {len(found.rows)} seeds better)"


def _kept(found: PairedSeeds, metric: str) -> list[str]:
    """The student's mean as a share of the teacher's, for metrics that are shares themselves."""
    teacher = value_of(getattr(found, f"teacher_{found.split}"))
    values = [value_of(getattr(row, f"student_{found.split}")) for row in found.rows]
    known = [value for value in values if value is not None]
    if teacher is None or teacher <= 0 or len(known) < len(values) or not is_percentage(metric):
        return []
    share = sum(known) / len(known) / teacher
    return [f"The student keeps {100 * share:.2f} % of its teacher's {metric} ({score(teacher, metric)}) on average."]


def gain(difference: float, metric: str) -> str:
    """A signed difference of qualities: points of a percentage, otherwise four decimals."""
    if metric == PERPLEXITY:
        return f"{difference:+.4f}".replace("-", MINUS)
    return points(difference, metric)


def _figures(row: SeedRow) -> tuple[Figure, Figure, Figure, Figure]:
    return row.student_validation, row.twin_validation, row.student_test, row.twin_test


def _difference(row: SeedRow, split: str, metric: str) -> str:
    student, twin = getattr(row, f"student_{split}"), getattr(row, f"twin_{split}")
    if not isinstance(student, Measurement) or not isinstance(twin, Measurement):
        return "none"
    return gain(quality(student.value, student.unit) - quality(twin.value, twin.unit), metric)


def _mean(values: list[float | None], metric: str) -> str:
    known = [value for value in values if value is not None]
    return score(sum(known) / len(known), metric) if known and len(known) == len(values) else "none"
