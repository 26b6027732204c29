"""Files that leave early: how many samples take which exit, and what that makes of their latency."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from compressor.types import Array, Artifact, Figure, Measurement
from targets.measure import Timing
from targets.outcome import Row

EXIT = "exit"  # output: the number of the exit that a sample took
THRESHOLD = "exit threshold"  # in the scheme of such a file
EXITS = "exits"  # in its scheme as well: how many it has
STATISTIC = "statistic"  # in a latency's detail, where it is not the median
LEFT = "left at exit "  # in a score's detail: shares


def leaves_early(artifact: Artifact) -> bool:
    return THRESHOLD in artifact.scheme


def shares(numbers: Array) -> dict[str, float]:
    """Share of the samples by the exit they took: (N,) -> ``{"left at exit 0": 0.7, ...}``."""
    values, counts = np.unique(np.asarray(numbers).astype(np.int64), return_counts=True)
    return {f"{LEFT}{value}": float(count / len(numbers)) for value, count in zip(values, counts, strict=True)}


def mean_latency(timing: Timing) -> tuple[float, dict[str, float | int | str]]:
    """The mean over inputs, and what its detail says instead: the median would hide the samples that go on."""
    low, high = timing.mean_interval_ms
    detail: dict[str, float | int | str] = {STATISTIC: "mean", "p50": timing.p50_ms, "ci95_low": low, "ci95_high": high}
    return timing.mean_ms, detail


def mean_speedup(timing: Timing) -> tuple[float, dict[str, float | int | str]]:
    """The ratio of the means over the same inputs, with its interval."""
    low, high = timing.mean_ratio_interval
    return timing.mean_ratio, {STATISTIC: "ratio of means", "ci95_low": low, "ci95_high": high}


def with_shares(figure: Figure, numbers: Array | None) -> Figure:
    """A score with the shares of the exits in its detail."""
    if numbers is None or not isinstance(figure, Measurement):
        return figure
    detail: Mapping[str, float | int | str] = {**figure.detail, **shares(numbers)}
    return Measurement(figure.value, figure.unit, figure.origin, figure.device, detail)


def sentence(row: Row) -> str:
    """What became of the samples of a row; empty for a file without exits."""
    if not leaves_early(row.artifact):
        return ""
    told = [f"{row.artifact.name} (threshold {row.artifact.scheme[THRESHOLD]})"]
    for split, figure in (("validation", row.validation), ("test", row.test)):
        found = (
            {name: part for name, part in figure.detail.items() if name.startswith(LEFT)}
            if isinstance(figure, Measurement)
            else {}
        )
        if found:
            end = f"{LEFT}{row.artifact.scheme.get(EXITS)}"
            words = {name: "went to the end" if name == end else name for name in sorted(found)}
            told.append(f"{split}: " + ", ".join(f"{100 * float(found[name]):.1f} % {words[name]}" for name in words))
    if isinstance(row.latency, Measurement) and row.latency.detail.get(STATISTIC) == "mean":
        detail = row.latency.detail
        parts = (("mean", row.latency.value), ("p50", detail["p50"]), ("p95", detail["p95"]))
        told.append("latency: " + ", ".join(f"{name} {float(value):.3g} ms" for name, value in parts))
    return "; ".join(told)
