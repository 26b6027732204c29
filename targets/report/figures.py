"""Numbers in words: one place decides digits, units and signs. A missing number always says why."""

from __future__ import annotations

import math
from collections.abc import Callable

from compressor.evaluate import PERPLEXITY
from compressor.types import Artifact, Figure, Measurement, Unavailable

MIB = 1024 * 1024
MINUS = "\N{MINUS SIGN}"


def significant(value: float, digits: int = 3) -> str:
    """Plain notation with at least ``digits`` significant digits, never an exponent.

    >>> [significant(value) for value in (0.01234, 1.234, 12.34, 1234.5)]
    ['0.0123', '1.23', '12.3', '1234']
    """
    if not math.isfinite(value):
        return "not finite"
    magnitude = math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(0, digits - 1 - magnitude)}f}".replace("-", MINUS)


def small(value: float) -> str:
    """Three significant digits, with an exponent below 0.0001 and none for zero.

    >>> small(0.0), small(3.21e-06), small(0.321)
    ('0', '3.2e-06', '0.321')
    """
    if value == 0:
        return "0"
    return f"{value:.1e}" if abs(value) < 1e-4 else significant(value)


def is_percentage(metric: str) -> bool:
    """Accuracies, agreements, F1 scores, BLEU and ROUGE read as percentages; a correlation does not."""
    return any(word in metric.lower() for word in ("accuracy", "agreement", "f1", "bleu", "rouge"))


def score(value: float, metric: str) -> str:
    """A task metric in 0..1 as text: ``93.42 %`` or ``0.8731``."""
    if not math.isfinite(value):
        return "not finite"
    if metric == PERPLEXITY:
        return significant(value, 4)
    return f"{100 * value:.2f} %" if is_percentage(metric) else f"{value:.4f}".replace("-", MINUS)


def points(difference: float, metric: str) -> str:
    """A signed difference of two scores, in percentage points where the metric is a percentage.

    Of two perplexities: by how much (in per cent) the first is higher, which is worse.

    >>> points(-0.0123, "accuracy"), points(0.002, "Spearman against teacher"), points(0.0, "accuracy")
    ('−1.23', '+0.0020', '±0.00')
    """
    text = f"{100 * difference:.2f}" if is_percentage(metric) or metric == PERPLEXITY else f"{difference:.4f}"
    if not text.strip("-0."):
        signed = "±" + text.lstrip("-")
    else:
        signed = MINUS + text[1:] if text.startswith("-") else "+" + text
    return f"{signed} %" if metric == PERPLEXITY else signed


def milliseconds(value: float) -> str:
    """``1.23 ms``."""
    return f"{significant(value)} ms"


def mebibytes(size_bytes: float) -> str:
    """A size in bytes as ``0.31 MiB``; below 0.1 MiB in KiB.

    >>> mebibytes(3 * 1024 * 1024), mebibytes(20_000)
    ('3.00 MiB', '19.5 KiB')
    """
    if abs(size_bytes) < 0.1 * MIB:
        return f"{significant(size_bytes / 1024)} KiB"
    return f"{significant(size_bytes / MIB)} MiB"


def times(value: float) -> str:
    """``8.21x``."""
    return f"{significant(value)}x"


def say(figure: Figure, render: Callable[[float], str]) -> str:
    """The number through ``render``, or ``unavailable: <reason>``."""
    return render(figure.value) if isinstance(figure, Measurement) else unavailable(figure)


def unavailable(figure: Unavailable) -> str:
    """``unavailable: <reason>``; an empty reason is said to be one."""
    return f"unavailable: {figure.reason or 'no reason was recorded'}"


def value_of(figure: Figure) -> float | None:
    """The bare number, or None."""
    return figure.value if isinstance(figure, Measurement) else None


def detail_of(figure: Figure, key: str) -> float | None:
    """A number of the measurement's detail (``p95``), or None."""
    found = figure.detail.get(key) if isinstance(figure, Measurement) else None
    return float(found) if isinstance(found, int | float) else None


def short_name(artifact: Artifact) -> str:
    """A label for the picture: the role for fp32 files, the variant's own part of the name otherwise.

    ``student/int8-static-per-channel`` becomes ``int8 static per channel``.
    """
    last = artifact.name.rsplit("/", 1)[-1]
    if artifact.role == "student" and artifact.precision != "fp32":
        return last.replace("-", " ")
    role = artifact.role.replace("-", " ")
    return role if artifact.precision == "fp32" else f"{role} {last.replace('-', ' ')}"
