"""Which candidates of a space are looked at: all of them, or those of a population that evolves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.search import Candidate, Search, Space, named

if TYPE_CHECKING:
    from compressor.students.search.diswot import Score

PATIENCE = 20  # draws a wanted candidate, before a population or a generation stays smaller


@dataclass(frozen=True)
class Tried:
    """One candidate: what it costs, its score where it is within the budget, otherwise why it has none."""

    candidate: Candidate
    macs: int = 0
    parameters: int = 0
    latency_ms: float | None = None
    score: Score | None = None
    why: str = ""

    @property
    def name(self) -> str:
        return named(self.candidate)

    @property
    def rank(self) -> tuple[float, int, str]:
        """Smallest first: the best score, then the fewest operations."""
        return (-self.score.value if self.score is not None else float("inf"), self.macs, self.name)

    @property
    def cost(self) -> str:
        if not self.parameters:
            return ""
        latency = "" if self.latency_ms is None else f", {self.latency_ms:.3g} ms in its layers"
        return f"{self.macs:,} multiply-accumulates, {self.parameters:,} parameters{latency}"

    def as_json(self) -> dict[str, Any]:
        terms = dict(self.score.terms) if self.score is not None else None
        value = self.score.value if self.score is not None else None
        made = {"candidate": dict(self.candidate), "macs": self.macs, "parameters": self.parameters}
        return made | {"latency_ms": self.latency_ms, "score": value, "terms": terms, "why": self.why}


Evaluate = Callable[[Candidate], Tried]


def look_at(config: Search, evaluate: Evaluate) -> list[Tried]:
    """Every candidate that was tried, in order; a function of ``config`` and of what ``evaluate`` says.

    All of a grid, and of a space that evolution would see whole anyway.
    """
    whole = config.space.size <= config.population * (config.generations + 1)
    if config.method == "grid" or whole:
        return [evaluate(candidate) for candidate in config.space.candidates()]
    return _Evolution(config, evaluate).run()


class _Evolution:
    """The best of a population have children: one of two parents' values per key, then one key changed."""

    def __init__(self, config: Search, evaluate: Evaluate) -> None:
        self.config, self.evaluate = config, evaluate
        self.random = np.random.default_rng(config.seed)
        self.tried: dict[str, Tried] = {}

    def run(self) -> list[Tried]:
        space, count = self.config.space, self.config.population
        self._fill(count, lambda: space.at(int(self.random.integers(space.size))))
        for _ in range(self.config.generations):
            best = sorted((t for t in self.tried.values() if t.score is not None), key=lambda t: t.rank)[:count]
            if not best:
                break
            parents = best[: max(2, len(best) // 2)]
            self._fill(count, lambda parents=parents: self._child(parents))  # type: ignore[misc]
        return list(self.tried.values())

    def _fill(self, count: int, draw: Callable[[], Candidate]) -> None:
        """Try new candidates until ``count`` of them are within the budget."""
        found = 0
        for _ in range(PATIENCE * count):
            candidate = draw()
            name = named(candidate)
            if name not in self.tried:
                self.tried[name] = self.evaluate(candidate)
                found += self.tried[name].score is not None
            if found == count:
                break

    def _child(self, parents: list[Tried]) -> Candidate:
        one, other = (parents[int(self.random.integers(len(parents)))].candidate for _ in range(2))
        child = {key: (one if self.random.random() < 0.5 else other)[key] for key in one}
        return mutated(child, self.config.space, self.random)


def mutated(candidate: Candidate, space: Space, random: np.random.Generator) -> Candidate:
    """The candidate with another value of one key that has several."""
    axes = {key: values for key, values in space.axes.items() if len(values) > 1}
    key = list(axes)[int(random.integers(len(axes)))]
    others = [value for value in axes[key] if repr(value) != repr(candidate[key])]
    return {**candidate, key: others[int(random.integers(len(others)))]}


__all__ = ["Evaluate", "Tried", "look_at", "mutated"]
