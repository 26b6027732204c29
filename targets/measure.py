"""The one timing loop. Every back end is timed by it, so that figures compare.

Rules:

1. **Warm-up until steady**: rounds of about ``warm_round_ms`` on the first input until the medians of ``warm_window``
   consecutive rounds lie within ``steady`` of each other, at most ``warm_budget_s``; then every input once.
2. **Many short rounds, interleaved**: in each round every candidate gets one turn of about ``turn_ms`` (at least
   ``min_runs`` runs, the same number in every round, after one untimed run). All turns of a round use the same input;
   the order rotates and alternates in direction. Rounds go on, over all inputs equally often, until the interval of
   every ratio is narrower than ``precision``, within ``min_rounds``, ``max_rounds`` and ``budget_s``.
3. **Preempted runs do not count**: a run during which a thread of this process lost its core says something about the
   other processes of the machine. Turns run with real-time priority where that is permitted; runs in which the process
   was still preempted are left out of the figures, and their share is reported. A turn without any clean run counts
   with its fastest run.
4. **The ratio** of a candidate is the median over *quiet* rounds of (reference's median / candidate's median) in the
   same round: what slows a whole round cancels out. What slows the candidates unequally does not: a busy neighbour on
   the same physical core (on a virtual machine, another customer) takes more from an int8 student than from its fp32
   teacher, for seconds on end and unseen by the guest. A round is quiet for a pair when the turns of both were within
   ``quiet`` of undisturbed: the 5th percentile over turns of a turn's fastest run, on inputs of that kind. Rounds go
   on until ``min_quiet`` of them were, within the budget. The share of quiet rounds and the ratio over all rounds
   (``ratio_all``) stand beside the ratio; where the two differ by more than a few per cent, the machine was not quiet.
   Latencies are over all rounds.

Garbage collection is off during a turn. Intervals are 95 %, from order statistics.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Protocol, runtime_checkable

import numpy as np

from targets.clock import Clock, Priority, SystemClock, available_priority, real_time

NORMAL_95 = 1.96  # two-sided 95 % quantile of the normal distribution

Run = Callable[[int], object]  # runs the model once on input number i
Kinds = Sequence[Hashable]  # of each input


@runtime_checkable
class Elsewhere(Protocol):
    """A :data:`Run` whose model is not in this process (a browser, a board): each run is timed beside the model.

    What lies between, a network or a pipe, is not in the figures; preemptions over there are not seen.
    """

    def times_ns(self, index: int, count: int) -> Sequence[int]:
        """Run the model ``count`` times on input number ``index``; how long each run took, in ns."""
        ...


@dataclass(frozen=True)
class Settings:
    """How long and how often; see the module's rules."""

    turn_ms: float = 15.0
    min_runs: int = 3
    min_rounds: int = 96
    max_rounds: int = 768
    min_s: float = 8.0  # when candidates are compared: a busy neighbour must have the time to go away
    budget_s: float = 24.0
    precision: float = 0.02  # half width of a ratio's interval, relative
    quiet: float = 1.25  # a turn whose median is within this factor of undisturbed runs counts for the ratio
    min_quiet: int = 32  # quiet rounds wanted for every ratio
    steady: float = 0.05
    warm_window: int = 3
    warm_round_ms: float = 10.0
    warm_budget_s: float = 2.0
    priority: Priority | None = None  # None: the best that is permitted


@dataclass(frozen=True)
class Timing:
    """Latency of one candidate. ``p50_ms`` is the median over rounds of each turn's median."""

    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    mean_ms: float
    ci95_low_ms: float
    ci95_high_ms: float
    rounds: int
    samples: int
    preempted_share: float  # of all runs; these are not in the figures above
    p99_all_ms: float  # with the preempted runs: what a user of this busy machine would see
    ratio: float  # reference / this over quiet rounds: how many times as fast as the reference
    ratio_low: float
    ratio_high: float
    ratio_all: float  # the same over all rounds
    quiet_share: float  # of the rounds
    fastest_ms: float  # 1st percentile: the model while nothing else used the processor's shared parts
    fastest_ratio: float  # reference's fastest / this one's
    mean_interval_ms: tuple[float, float] = (0.0, 0.0)  # of the mean over inputs, 95 %
    mean_ratio: float = 0.0  # reference's mean over inputs / this one's: for models that take longer for some inputs
    mean_ratio_interval: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Contention:
    """How busy the machine was while measuring."""

    load: float
    preempted_share: float
    cpu_share: float  # CPU time of the process over wall time of its turns; below 1 x threads: something made it wait
    priority: Priority

    def describe(self) -> str:
        return (
            f"load {self.load:.1f}, {self.preempted_share:.0%} of runs preempted and left out, "
            f"{self.cpu_share:.2f} cores used, {self.priority} priority"
        )


@dataclass(frozen=True)
class Measured:
    """A whole group, measured together."""

    timings: Mapping[str, Timing]
    reference: str
    contention: Contention

    def to_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass
class _Track:
    """What one candidate collected."""

    count: int  # runs a turn
    levels: list[float] = field(default_factory=list)  # ns, median of each turn
    fastest: list[float] = field(default_factory=list)  # ns, fastest run of each turn
    clean: list[int] = field(default_factory=list)
    every: list[int] = field(default_factory=list)


def measure(
    runs: Mapping[str, Run],
    reference: str,
    inputs: int = 1,
    settings: Settings | None = None,
    clock: Clock | None = None,
    kinds: Kinds | None = None,
) -> Measured:
    """Time all ``runs`` against ``reference`` over ``inputs`` different inputs.

    Inputs of one of the ``kinds`` (equal shapes) take equal time; without it every input is of its own kind.

    Raises ValueError when ``reference`` is not among them; what a run raises passes through.
    """
    if reference not in runs:
        raise ValueError(f"the reference `{reference}` is not measured: {', '.join(runs)}")
    settings, clock, kinds = settings or Settings(), clock or SystemClock(), kinds or range(inputs)
    priority = settings.priority or available_priority()
    tracks = {name: _Track(_warm_up(run, inputs, settings, clock)) for name, run in runs.items()}
    started, wall, cpu, done = clock.now_ns(), 0, 0, 0  # ns, ns, ns, rounds
    while not _enough(tracks, reference, kinds, (clock.now_ns() - started) / 1e9, settings):
        for name in _order(list(runs), done):
            turn_wall, turn_cpu = _turn(runs[name], tracks[name], done % inputs, priority, clock)
            wall, cpu = wall + turn_wall, cpu + turn_cpu
        done += 1
    preempted = 1 - sum(len(track.clean) for track in tracks.values()) / sum(
        len(track.every) for track in tracks.values()
    )
    contention = Contention(clock.load(), preempted, cpu / max(wall, 1), priority)
    timings = {name: _timing(track, tracks[reference], kinds, settings) for name, track in tracks.items()}
    return Measured(timings, reference, contention)


def _warm_up(run: Run, inputs: int, settings: Settings, clock: Clock) -> int:
    """Run until steady; returns how many runs make a turn."""
    started = clock.now_ns()
    medians: list[float] = []
    while True:
        medians.append(_warm_round(run, settings, clock))
        window = medians[-settings.warm_window :]
        steady = len(window) == settings.warm_window and max(window) <= min(window) * (1 + settings.steady)
        if steady or clock.now_ns() - started > settings.warm_budget_s * 1e9:
            break
    for index in range(1, inputs):
        run(index)
    return max(settings.min_runs, round(settings.turn_ms * 1e6 / max(min(medians), 1)))


def _warm_round(run: Run, settings: Settings, clock: Clock) -> float:
    """Median of about ``warm_round_ms`` of runs, in ns."""
    if isinstance(run, Elsewhere):
        first = max(run.times_ns(0, 1)[0], 1)
        return median([first, *run.times_ns(0, max(1, round(settings.warm_round_ms * 1e6 / first)))])
    times: list[int] = []
    started = clock.now_ns()
    while not times or clock.now_ns() - started < settings.warm_round_ms * 1e6:
        before = clock.now_ns()
        run(0)
        times.append(clock.now_ns() - before)
    return median(times)


def _order(names: list[str], round_number: int) -> Sequence[str]:
    """Rotated by one each round, and every second round backwards: nobody always follows the same neighbour."""
    shift = round_number % len(names)
    rotated = names[shift:] + names[:shift]
    return rotated[::-1] if round_number % 2 else rotated


def _turn(run: Run, track: _Track, index: int, priority: Priority, clock: Clock) -> tuple[int, int]:
    """One turn; returns its wall and CPU time in ns."""
    if isinstance(run, Elsewhere):
        wall, cpu = clock.now_ns(), clock.cpu_ns()
        times = list(run.times_ns(index, track.count + 1))[1:]  # the first is untimed, as below
        _book(track, times, times)
        return clock.now_ns() - wall, clock.cpu_ns() - cpu
    clean: list[int] = []
    every: list[int] = []
    gc_was_on = gc.isenabled()
    gc.disable()
    try:
        with real_time(priority):
            run(index)  # untimed: brings the model back into the caches
            wall, cpu = clock.now_ns(), clock.cpu_ns()
            for _ in range(track.count):
                lost = clock.preemptions()
                before = clock.now_ns()
                run(index)
                taken = clock.now_ns() - before
                every.append(taken)
                if clock.preemptions() == lost:
                    clean.append(taken)
            wall, cpu = clock.now_ns() - wall, clock.cpu_ns() - cpu
    finally:
        if gc_was_on:
            gc.enable()
    _book(track, clean, every)
    return wall, cpu


def _book(track: _Track, clean: list[int], every: list[int]) -> None:
    track.levels.append(float(median(clean)) if clean else float(min(every)))
    track.fastest.append(float(min(clean or every)))
    track.clean += clean
    track.every += every


def _enough(tracks: Mapping[str, _Track], reference: str, kinds: Kinds, seconds: float, settings: Settings) -> bool:
    base = tracks[reference]
    done = len(base.levels)
    if seconds > settings.budget_s:
        return done > 5  # what an order statistic needs at least
    if done >= settings.max_rounds:
        return True
    if done < settings.min_rounds or done % len(kinds):
        return False
    if len(tracks) == 1:
        return relative_half_width(base.levels) <= settings.precision
    if seconds < settings.min_s:
        return False
    found = [_quiet_ratios(base, track, kinds, settings) for track in tracks.values() if track is not base]
    return all(
        len(ratios) >= min(settings.min_quiet, settings.min_rounds) and _settled(ratios, settings) for ratios in found
    )


def _settled(ratios: Sequence[float], settings: Settings) -> bool:
    return relative_half_width(ratios) <= settings.precision


def _ratios(reference: _Track, track: _Track) -> list[float]:
    return [base / max(own, 1) for base, own in zip(reference.levels, track.levels, strict=True)]


def _quiet_ratios(reference: _Track, track: _Track, kinds: Kinds, settings: Settings) -> list[float]:
    """Ratios of the rounds in which neither turn was disturbed; all of them when there is no such round."""
    floors = [_undisturbed(each, kinds) for each in (reference, track)]
    kept = []
    for number, ratio in enumerate(_ratios(reference, track)):
        kind = kinds[number % len(kinds)]
        levels = (reference.levels[number], track.levels[number])
        if all(level <= floor[kind] * settings.quiet for level, floor in zip(levels, floors, strict=True)):
            kept.append(ratio)
    return kept or _ratios(reference, track)


def _undisturbed(track: _Track, kinds: Kinds) -> dict[Hashable, float]:
    """What a candidate takes on each kind of input while nothing disturbs it, in ns."""
    turns: dict[Hashable, list[float]] = {}
    for number, fastest in enumerate(track.fastest):
        turns.setdefault(kinds[number % len(kinds)], []).append(fastest)
    return {kind: percentiles(levels, (5,))[0] for kind, levels in turns.items()}


def _counted(track: _Track) -> list[float]:
    """Single runs in ms: those that nothing preempted, or all where fewer than one a round went undisturbed."""
    return [value / 1e6 for value in (track.clean if len(track.clean) >= len(track.levels) else track.every)]


def _fastest_ms(track: _Track) -> float:
    return percentiles([value / 1e6 for value in track.clean or track.every], (1,))[0]


def _timing(track: _Track, reference: _Track, kinds: Kinds, settings: Settings) -> Timing:
    counted = _counted(track)
    levels = [value / 1e6 for value in track.levels]
    ratios = _quiet_ratios(reference, track, kinds, settings)
    low, high = median_interval(levels)
    ratio_low, ratio_high = median_interval(ratios)
    p90, p95, p99 = percentiles(counted, (90, 95, 99))
    fastest = _fastest_ms(track)
    return Timing(
        p50_ms=median(levels),
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99,
        mean_ms=sum(counted) / len(counted),
        ci95_low_ms=low,
        ci95_high_ms=high,
        rounds=len(levels),
        samples=len(counted),
        preempted_share=1 - len(track.clean) / len(track.every),
        p99_all_ms=percentiles([value / 1e6 for value in track.every], (99,))[0],
        ratio=median(ratios),
        ratio_low=ratio_low,
        ratio_high=ratio_high,
        ratio_all=median(_ratios(reference, track)),
        quiet_share=len(ratios) / len(levels),
        fastest_ms=fastest,
        fastest_ratio=_fastest_ms(reference) / max(fastest, 1e-9),
        mean_interval_ms=_around(float(np.mean(levels)), float(np.std(levels)), len(levels)),
        mean_ratio=float(np.mean(reference.levels)) / max(float(np.mean(track.levels)), 1.0),
        mean_ratio_interval=mean_ratio_interval(reference.levels, track.levels),
    )


def mean_ratio_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """95 % interval of mean(first) / mean(second) of paired values (delta method; Cochran, Sampling Techniques, 6.3).

    The choice of inputs is part of the uncertainty, where they differ.
    """
    above, below = np.asarray(first, np.float64), np.asarray(second, np.float64)
    ratio = float(above.mean() / max(below.mean(), 1.0))
    return _around(ratio, float(np.std(above - ratio * below) / max(below.mean(), 1.0)), len(above))


def _around(middle: float, deviation: float, count: int) -> tuple[float, float]:
    half = NORMAL_95 * deviation / math.sqrt(max(count, 1))
    return middle - half, middle + half


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % confidence interval of the median from order statistics (normal approximation of the binomial ranks).

    David & Nagaraja, Order Statistics, section 7.1. Fewer than six values give their whole range.

    >>> median_interval([1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    (2.0, 9.0)
    """
    ordered = sorted(float(value) for value in values)
    count = len(ordered)
    if not count:
        raise ValueError("no values")
    rank = max(0, math.floor((count - NORMAL_95 * math.sqrt(count)) / 2)) if count >= 6 else 0
    return ordered[rank], ordered[count - 1 - rank]


def relative_half_width(values: Sequence[float]) -> float:
    """Half the width of :func:`median_interval` over the median."""
    low, high = median_interval(values)
    middle = float(np.median(values))
    return (high - low) / 2 / middle if middle > 0 else math.inf


def percentiles(values: Sequence[float], points: Sequence[int]) -> list[float]:
    """Linear-interpolated percentiles."""
    return [float(value) for value in np.percentile(np.asarray(values, dtype=np.float64), list(points))]
