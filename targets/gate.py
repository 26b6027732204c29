"""The never-worse gate: of all candidates of a profile, the fastest that keeps the promise ships, and every other row
says why not.

Rules, in this order:

1. The baseline of accuracy, speed and size is the teacher's fp32 export (the student's fp32 file where there is no
   teacher).
2. A candidate is **feasible** when it ran, its validation metric lies at most ``max_drop`` below the baseline's, it
   meets the size, latency and speed-up limits, and it is not measurably slower than what went in. A quantized variant
   that is measurably slower than the same student's fp32 file is rejected: then quantization bought nothing.
   *Measurably*: the 95 % intervals do not overlap. Of a file with early exits the mean over real samples counts, where
   p50 is said here: its median would hide the samples that go on. Against a file that does not fit into
   ``max_size_mib`` no candidate that fits is too slow: the size was asked for, and the verdict says what it costs.
3. Among the feasible the smallest p50 wins. Candidates within ``TIE`` of it, or with overlapping intervals, are
   equally fast: then the smaller file wins, and among files within ``TIE`` of the smallest, the more accurate one.
4. Where latency cannot be measured (the device is not here) the feasible are ranked by the compiler's latency estimate
   if all have one, otherwise by file size; a quantized variant of which less than ``LEAST_COVERAGE`` of the Conv, Gemm
   and MatMul nodes would run quantized is rejected, because such files are slower than fp32. The verdict says that
   speed is unknown.
5. When nothing is feasible, the best so far ships all the same, ``kept`` is False and the verdict names the gap: among
   those that keep the accuracy the one that misses the other limits by least; if none does, the one whose misses, each
   relative to its limit, add up to least.
6. Validation chooses, test judges: when what ships lies more than ``max_drop`` below the baseline on the test set,
   the promise is not kept (:func:`confirmed`). Nothing else is chosen then: the test set is touched once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from compressor.evaluate import PERPLEXITY, quality
from compressor.types import Figure, Measurement
from targets.coverage import explain
from targets.exits import STATISTIC, leaves_early
from targets.outcome import Promise, Row, State

TIE = 0.05  # what two measurements of the same file may differ by on a shared machine (tools/repeatability.py)
LEAST_COVERAGE = 0.5
HALVES = ("fp16", "bf16")  # float files: no kernel of theirs counts as quantized
MIB = 2**20
PAIRED_ERROR = "paired_standard_error"  # detail of a test figure: of its difference to the teacher's, same samples
ROUNDING = 1e-9  # a drop of exactly the limit is inside it


@dataclass(frozen=True)
class Decision:
    """All rows with ``shipped`` and ``reason`` filled in, whether the promise is kept, and one sentence for people."""

    rows: tuple[Row, ...]
    kept: bool
    verdict: str


@dataclass(frozen=True)
class Miss:
    """One limit that a candidate misses. ``gap`` is relative to the limit, so that misses of several kinds add up."""

    what: str
    gap: float
    accuracy: bool = False


def decide(rows: Sequence[Row], promise: Promise) -> Decision:
    """Choose what ships. ``rows`` hold one teacher row (or none), perhaps a null twin, and the student's rows."""
    students = [row for row in rows if row.artifact.role == "student"]
    plain = _plain(rows)
    baseline = _baseline(rows)
    usable = [row for row in students if row.state not in (State.FAILED, State.UNAVAILABLE)]
    if not usable:
        reasons = "; ".join(f"{row.artifact.name}: {row.reason}" for row in students)
        return Decision(tuple(rows), False, f"nothing ships: no candidate could be compiled ({reasons})")
    misses = {row.artifact.name: tuple(misses_of(row, baseline, plain, promise)) for row in usable}
    feasible = [row for row in usable if not misses[row.artifact.name]]
    timed = [row for row in feasible if value_of(row.latency) is not None]
    chosen, why = _choose(feasible, timed) if feasible else _nearest(usable, misses)
    for miss, other in _slowness(chosen, baseline, plain):
        if _only_fits(chosen, other, promise):
            why += f"; it is {miss.what}, whose file has {(value_of(other.file_bytes) or 0.0) / MIB:.2f} MiB"
            why += f" where {promise.max_size_mib:g} are allowed"
    final = tuple(_mark(row, chosen, why, misses) for row in rows)
    if not feasible:
        told = ", ".join(miss.what for miss in misses[chosen.artifact.name])
        verdict = f"the promise is not kept: {chosen.artifact.name} ships as the best so far, but {told}"
        return Decision(final, False, verdict)
    rejected = [row for row in usable if row.artifact.precision != "fp32" and misses[row.artifact.name]]
    return Decision(final, True, _verdict(chosen, why, promise, [misses[row.artifact.name] for row in rejected]))


def confirmed(decision: Decision, promise: Promise) -> Decision:
    """The decision in the light of the test figures, which ``decision.rows`` now hold."""
    chosen, baseline = next((row for row in decision.rows if row.shipped), None), _baseline(decision.rows)
    if not decision.kept or chosen is None or baseline is None or promise.max_drop is None:
        return decision
    if not isinstance(chosen.test, Measurement) or not isinstance(baseline.test, Measurement):
        return decision
    told = _loss(chosen.test, baseline.test, promise.max_drop, "on test")
    if not told:
        return decision
    error = chosen.test.detail.get(PAIRED_ERROR)
    if error is not None and baseline.artifact.role == "teacher":
        told += f" (the loss is known to within {1.96 * 100 * float(error):.2f} points at 95 %)"
    verdict = f"the promise is kept on validation and not on the test set: {told}. {decision.verdict}"
    return replace(decision, kept=False, verdict=verdict)


def _plain(rows: Sequence[Row]) -> Row | None:
    """The student's fp32 file."""
    return next((row for row in rows if row.artifact.role == "student" and row.artifact.precision == "fp32"), None)


def _baseline(rows: Sequence[Row]) -> Row | None:
    """Whose accuracy, speed and size count: the teacher's, or the student's fp32 file's where it has no accuracy."""
    teacher = next((row for row in rows if row.artifact.role == "teacher"), None)
    return teacher if teacher is not None and value_of(teacher.validation) is not None else _plain(rows)


def value_of(figure: Figure) -> float | None:
    """The number, if there is one."""
    return figure.value if isinstance(figure, Measurement) else None


def statistic_of(figure: Figure) -> str:
    """What a latency is: ``p50``, or ``mean`` of a file that takes longer for some samples."""
    return str(figure.detail.get(STATISTIC, "p50")) if isinstance(figure, Measurement) else "p50"


def quality_of(figure: Figure) -> float:
    """The score as a number that grows with quality: minus the logarithm of a perplexity, otherwise itself."""
    return quality(figure.value, figure.unit) if isinstance(figure, Measurement) else -math.inf


def misses_of(row: Row, baseline: Row | None, plain: Row | None, promise: Promise) -> list[Miss]:
    """Every limit that ``row`` misses, most important first."""
    found = [*_accuracy_misses(row, baseline, promise), *_limit_misses(row, promise)]
    found += [Miss(item.what, item.gap) for item in (row.compiled.over if row.compiled is not None else ())]
    found += [miss for miss, other in _slowness(row, baseline, plain) if not _only_fits(row, other, promise)]
    if plain is not None and plain is not row and value_of(row.latency) is None:
        unknown = Miss("what leaving early saves is not known without a measurement", 1.0)
        found += [unknown] if leaves_early(row.artifact) else _thin_coverage(row)
    return found


def _slowness(row: Row, baseline: Row | None, plain: Row | None) -> list[tuple[Miss, Row]]:
    """What the candidate is slower than: the student's fp32 file, otherwise what went in."""
    for other, words in ((plain, "slower than fp32"), (baseline, "slower than what went in")):
        if other is not None and other is not row:
            named = words if other is plain else f"{words} ({other.artifact.name})"
            if slow := _slower(row, other, named):
                return [(miss, other) for miss in slow]
    return []


def _only_fits(row: Row, other: Row, promise: Promise) -> bool:
    """Is ``other`` too large for the limit that the candidate keeps?"""
    mine, theirs = value_of(row.file_bytes), value_of(other.file_bytes)
    if promise.max_size_mib is None or mine is None or theirs is None:
        return False
    return mine <= promise.max_size_mib * MIB < theirs


def _accuracy_misses(row: Row, baseline: Row | None, promise: Promise) -> list[Miss]:
    if promise.max_drop is None or baseline is None:
        return []
    wanted, got = value_of(baseline.validation), value_of(row.validation)
    if wanted is None or got is None:
        reason = getattr(row.validation, "reason", "") or "no figure"
        return [Miss(f"its accuracy is unknown ({reason})", 1.0, accuracy=True)]
    told = _loss(row.validation, baseline.validation, promise.max_drop, "on validation")
    if not told:
        return []
    gap = quality_of(baseline.validation) - quality_of(row.validation) - promise.max_drop
    return [Miss(told, gap, accuracy=True)]


def _loss(mine: Figure, theirs: Figure, most: float, where: str) -> str:
    """What a figure loses to another, if that is more than ``most``; otherwise empty."""
    drop = quality_of(theirs) - quality_of(mine)
    if drop <= most + ROUNDING:
        return ""
    if getattr(mine, "unit", "1") == PERPLEXITY:
        return f"its perplexity is {math.expm1(drop):.1%} higher {where}, {math.expm1(most):.1%} is allowed"
    digits = 2 if f"{100 * drop:.2f}" != f"{100 * most:.2f}" else 3  # a miss by a hair must not read as a hit
    return f"it loses {100 * drop:.{digits}f} points {where}, {100 * most:.{digits}f} are allowed"


def _limit_misses(row: Row, promise: Promise) -> list[Miss]:
    found = []
    size, latency, speedup = value_of(row.file_bytes), value_of(row.latency), value_of(row.speedup)
    if promise.max_size_mib is not None and size is not None and size > promise.max_size_mib * MIB:
        gap = size / MIB / promise.max_size_mib - 1
        found.append(Miss(f"its file has {size / MIB:.2f} MiB, the limit is {promise.max_size_mib:g}", gap))
    if promise.max_latency_ms is not None and latency is not None and latency > promise.max_latency_ms:
        gap = latency / promise.max_latency_ms - 1
        found.append(
            Miss(
                f"its {statistic_of(row.latency)} is {latency:.3f} ms, the limit is {promise.max_latency_ms:g} ms", gap
            )
        )
    if promise.min_speedup is not None and speedup is not None and speedup < promise.min_speedup:
        gap = promise.min_speedup / max(speedup, ROUNDING) - 1
        found.append(Miss(f"it is {speedup:.2f}x as fast as the teacher, {promise.min_speedup:g}x is wanted", gap))
    return found


def _slower(row: Row, other: Row, words: str) -> list[Miss]:
    mine, theirs = value_of(row.latency), value_of(other.latency)
    if mine is None or theirs is None or mine <= theirs or _overlap(row, other):
        return []
    why = explain(row.coverage) if row.coverage is not None and row.artifact.precision != "fp32" else ""
    return [
        Miss(
            f"{words}: {mine / theirs:.2f}x its {statistic_of(other.latency)}" + (f"; {why}" if why else ""),
            mine / theirs - 1,
        )
    ]


def _thin_coverage(row: Row) -> list[Miss]:
    coverage = row.coverage
    if (
        row.artifact.precision in HALVES
        or coverage is None
        or not coverage.total
        or coverage.quantized / coverage.total >= LEAST_COVERAGE
    ):
        return []
    return [
        Miss(f"likely slower than fp32 (not measured): {explain(coverage)}", 1 - coverage.quantized / coverage.total)
    ]


def _overlap(row: Row, other: Row) -> bool:
    """Do the 95 % intervals overlap? Those of the paired ratios to the teacher where there are, else of the p50."""
    for first, second in ((row.speedup, other.speedup), (row.latency, other.latency)):
        mine, theirs = _interval(first), _interval(second)
        if mine is not None and theirs is not None:
            return mine[0] <= theirs[1] and theirs[0] <= mine[1]
    return False


def _interval(figure: Figure) -> tuple[float, float] | None:
    if not isinstance(figure, Measurement) or "ci95_low" not in figure.detail:
        return None
    return float(figure.detail["ci95_low"]), float(figure.detail["ci95_high"])


def _choose(feasible: list[Row], timed: list[Row]) -> tuple[Row, str]:
    if not timed:
        return _choose_untimed(feasible)
    fastest = min(timed, key=lambda row: value_of(row.latency) or 0.0)
    limit = (value_of(fastest.latency) or 0.0) * (1 + TIE)
    tied = [row for row in timed if (value_of(row.latency) or 0.0) <= limit or _overlap(row, fastest)]
    chosen = _smallest(tied)
    if len(tied) == 1:
        return chosen, "the fastest that keeps the promise"
    others = ", ".join(row.artifact.name for row in tied if row is not chosen)
    return chosen, f"as fast as {others} (within {TIE:.0%} or the confidence interval), and smaller or more accurate"


def _choose_untimed(feasible: list[Row]) -> tuple[Row, str]:
    estimates = {row.artifact.name: row.estimate.value for row in feasible if row.estimate is not None}
    if len(estimates) == len(feasible):
        chosen = min(feasible, key=lambda row: estimates[row.artifact.name])
        return chosen, "the lowest latency estimate that keeps the accuracy; latency is not measured here"
    return _smallest(feasible), "the smallest file that keeps the accuracy; latency cannot be measured here"


def _smallest(rows: list[Row]) -> Row:
    """The smallest file; among files within ``TIE`` of it the most accurate; then the first by name."""
    least = min(value_of(row.file_bytes) or 0.0 for row in rows)
    near = [row for row in rows if (value_of(row.file_bytes) or 0.0) <= least * (1 + TIE)]
    return min(near, key=lambda row: (-quality_of(row.validation), value_of(row.file_bytes) or 0.0, row.artifact.name))


def _nearest(usable: list[Row], misses: dict[str, tuple[Miss, ...]]) -> tuple[Row, str]:
    accurate = [row for row in usable if not any(miss.accuracy for miss in misses[row.artifact.name])]
    gaps = {name: sum(miss.gap for miss in found) for name, found in misses.items()}
    nearest = min(accurate or usable, key=lambda row: (gaps[row.artifact.name], -quality_of(row.validation)))
    return nearest, "misses the limits by least"


def _mark(row: Row, chosen: Row, why: str, misses: dict[str, tuple[Miss, ...]]) -> Row:
    if row.artifact.role != "student" or row.artifact.name not in misses:
        return row
    told = "; ".join(miss.what for miss in misses[row.artifact.name])
    if row is chosen:
        return replace(row, shipped=True, reason="; ".join(part for part in (f"ships: {why}", told) if part))
    return replace(row, shipped=False, reason=f"rejected: {told}" if told else f"rejected: {_outrun(row, chosen)}")


def _outrun(row: Row, chosen: Row) -> str:
    mine, best = value_of(row.latency), value_of(chosen.latency)
    if mine is not None and best is not None and mine > best * (1 + TIE) and not _overlap(row, chosen):
        return f"keeps the promise, but {chosen.artifact.name} is {mine / best:.2f}x as fast"
    if mine is not None and best is not None:
        return f"as fast as {chosen.artifact.name}, which is smaller or more accurate"
    return f"keeps the accuracy, but {chosen.artifact.name} is preferred (smaller file or lower estimate)"


def _verdict(chosen: Row, why: str, promise: Promise, rejected: list[tuple[Miss, ...]]) -> str:
    told = f"{chosen.artifact.name} ships: {why}"
    speedup = value_of(chosen.speedup)
    if speedup is not None:
        told += f"; {speedup:.2f}x as fast as the teacher"
    if chosen.artifact.precision == "fp32" and rejected:
        slowed = all(any("slower than" in miss.what for miss in misses) for misses in rejected)
        told += (
            "; quantization only slows this model down" if slowed else "; see why the quantized variants are rejected"
        )
    if value_of(chosen.latency) is None and (promise.max_latency_ms is not None or promise.min_speedup is not None):
        told += "; the limits on latency are not verified"
    return told
