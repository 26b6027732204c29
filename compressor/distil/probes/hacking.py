"""The teacher-hacking monitor: does the student still come nearer to the truth, or only to its teacher? (methods I2)

Tiapkin et al., "On Teacher Hacking in Language Model Distillation", 2025. Proxy: the divergence from the teacher,
golden: the divergence from the labels, both on validation after every epoch. The sign is a proxy that goes on falling
while the golden one rises; an early sign is a proxy that leaves its power law.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compressor.types import Array, write_atomic

RISES = 3  # epochs in a row
LEAST = 6  # evaluations, below which nothing is said
DEPARTURE = 3.0  # standard deviations of the first half's residuals
FLOOR = 1e-12


@dataclass(frozen=True)
class Curves:
    """Divergences after each epoch, in nats."""

    proxy: tuple[float, ...]  # mean KL(teacher || student)
    golden: tuple[float, ...]  # mean cross-entropy with the labels


@dataclass(frozen=True)
class Verdict:
    """What the curves say. ``epoch`` counts from 1; None without an alarm."""

    alarm: bool
    epoch: int | None
    text: str


def divergences(teacher: Array, student: Array, labels: Array) -> tuple[float, float]:
    """Proxy and golden divergence of (N, C) logits; labels int64 (N,), negative where unknown."""
    log_p, log_q = _log_softmax(teacher), _log_softmax(student)
    proxy = float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=1)))
    known = np.flatnonzero(labels >= 0)
    golden = float(-np.mean(log_q[known, labels[known]])) if len(known) else float("nan")
    return proxy, golden


def _log_softmax(logits: Array) -> Array:
    values = np.asarray(logits, np.float64)
    shifted = values - values.max(axis=1, keepdims=True)
    found: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return found


def judge(curves: Curves, rises: int = RISES) -> Verdict:
    """Alarm when the golden divergence rose for ``rises`` evaluations in a row while the proxy fell over the same."""
    proxy, golden = np.asarray(curves.proxy), np.asarray(curves.golden)
    if len(proxy) < max(LEAST, rises + 1):
        return Verdict(False, None, f"not judged: {len(proxy)} evaluations, at least {LEAST} are needed")
    if not np.isfinite(golden).all():
        return Verdict(False, None, "not judged: no labels to compare with")
    for end in range(rises, len(proxy)):
        part = slice(end - rises, end + 1)
        if (np.diff(golden[part]) > 0).all() and proxy[end] < proxy[end - rises]:
            start = end - rises + 1
            text = (
                f"from epoch {start + 1} on the student came nearer to its teacher (KL {proxy[start - 1]:.4g} to "
                f"{proxy[end]:.4g}) and farther from the labels (cross-entropy {golden[start - 1]:.4g} to "
                f"{golden[end]:.4g}): use more or fresher data, on-policy samples, or stop earlier (`patience`)"
            )
            return Verdict(True, start + 1, text)
    leaves = departure(proxy)
    early = f"; the proxy leaves its power law at epoch {leaves}" if leaves is not None else ""
    return Verdict(False, None, f"no sign in {len(proxy)} evaluations{early}")


def departure(proxy: Sequence[float] | Array) -> int | None:
    """Epoch (from 1) where the proxy first leaves the line that its first half draws in log-log; None if it never does.

    Fit of log D = a + b log epoch on the first half, at least three evaluations.
    """
    values = np.log(np.maximum(np.asarray(proxy, np.float64), FLOOR))
    steps = np.log(np.arange(1, len(values) + 1))
    half = max(3, len(values) // 2)
    if len(values) <= half:
        return None
    slope, start = np.polyfit(steps[:half], values[:half], 1)
    gaps = values - (start + slope * steps)
    spread = max(float(gaps[:half].std()), 0.02)  # two per cent: below, a perfect fit would alarm at rounding
    off = np.flatnonzero(np.abs(gaps[half:]) > DEPARTURE * spread)
    return int(half + off[0] + 1) if len(off) else None


class HackingMonitor:
    """Collects the divergences of a training run, one pair an epoch, in a file that outlives a kill.

    Args:
        path: JSON file of the run's scratch folder.
        teacher: the teacher's logits on validation, (N, C).
        labels: of validation.
    """

    def __init__(self, path: Path, teacher: Array, labels: Array) -> None:
        self._path, self._teacher, self._labels = path, teacher, labels
        self._latest: tuple[float, float] | None = None
        self._seen: dict[int, tuple[float, float]] = {}
        if path.is_file():
            self._seen = {int(epoch): tuple(pair) for epoch, pair in json.loads(path.read_text()).items()}

    def observe(self, student: Array) -> None:
        """The student's logits on validation, in the order of the teacher's."""
        if student.shape == self._teacher.shape and student.ndim == 2 and student.shape[1] > 1:
            self._latest = divergences(self._teacher, student, self._labels)

    def on_event(self, kind: str, fields: Mapping[str, Any]) -> None:
        """An ``epoch`` event says which epoch the latest divergences belong to."""
        if kind == "epoch" and self._latest is not None:
            self._seen[int(fields["epoch"])] = self._latest
            write_atomic(self._path, json.dumps({str(epoch): pair for epoch, pair in self._seen.items()}))
            self._latest = None

    @property
    def curves(self) -> Curves:
        pairs = [self._seen[epoch] for epoch in sorted(self._seen)]
        return Curves(tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs))

    def text(self) -> str:
        """Curves and verdict as JSON."""
        verdict = judge(self.curves)
        return json.dumps({**asdict(self.curves), "verdict": asdict(verdict)}, indent=1)
