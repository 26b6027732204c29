"""Reasons of one table, each written once and referred to by its number, in all three forms of the report."""

from __future__ import annotations

from dataclasses import dataclass, field

from compressor.types import Unavailable


@dataclass
class Footnotes:
    """``reasons`` in the order of their numbers, which begin at 1."""

    reasons: list[str] = field(default_factory=list)

    def number(self, reason: str) -> int:
        """The number of this reason, a new one when it was not there yet."""
        if reason not in self.reasons:
            self.reasons.append(reason)
        return self.reasons.index(reason) + 1


def full(missing: Unavailable) -> str:
    """A reason with what to do about it, where that is known."""
    reason = (missing.reason or "no reason was recorded").rstrip(".")
    return f"{reason}. {missing.hint}".strip()
