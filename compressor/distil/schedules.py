"""Values at a step: weights and options that are schedules, and those that react to what was measured. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING

from compressor.schedule import Schedule

if TYPE_CHECKING:
    from compressor.distil.terms import Weighted

Feedback = MutableMapping[str, list[float]]  # name of a value -> [value, what it last saw]


def value_at(course: float | Schedule, step: int, total: int, now: float | None = None) -> float:
    """The value of step ``step`` of ``total``: exactly ``from`` at the first, exactly ``to`` at the last.

    Args:
        course: a number, or a schedule.
        step: from 0.
        total: of the whole run.
        now: where a ``feedback`` schedule stands.
    """
    if not isinstance(course, Schedule):
        return course
    first, final = course.first, course.final
    if course.kind == "feedback":
        return first if now is None else now
    done = step / max(1, total - 1)
    if course.kind == "constant":
        return first
    if course.kind == "step":
        return final if done >= course.start and step > 0 else first
    if done >= course.last:
        return final
    if done <= course.start:
        return first
    share = (done - course.start) / (course.last - course.start)
    if course.kind == "cosine":
        share = 0.5 * (1 - math.cos(math.pi * share))
    return first + (final - first) * share


def moved(course: Schedule, now: float, before: float, seen: float) -> float:
    """A feedback value after an epoch in which the watched quantity went from ``before`` to ``seen``."""
    change = seen - before if course.when == "rises" else before - seen
    if not change > course.by_more_than:
        return now
    if course.final >= course.first:
        return min(course.final, now + course.by)
    return max(course.final, now - course.by)


class Courses:
    """The weights and options of a run at each step. ``feedback`` lives in the checkpoint."""

    def __init__(
        self,
        labels: float | Schedule,
        objectives: Sequence[Weighted],
        names: Sequence[str],
        more: Mapping[str, float | Schedule] | None = None,
    ) -> None:
        """``names``: of the terms, ``labels`` first when there is such a term; ``more``: further values by name."""
        self._more = dict(more or {})
        self._weights: list[tuple[str, float | Schedule]] = []
        if labels:
            self._weights.append(("labels", labels))
        self._objectives = list(zip(names[len(self._weights) :], objectives, strict=True))
        self._weights += [(name, item.weight) for name, item in self._objectives]
        self._still = not any(isinstance(course, Schedule) for _, course in self._named())
        self._fixed = [float(course) for _, course in self._weights if not isinstance(course, Schedule)]

    def _named(self) -> Iterator[tuple[str, float | Schedule]]:
        yield from ((f"{name}.weight", course) for name, course in self._weights)
        for name, item in self._objectives:
            yield from ((f"{name}.{option}", course) for option, course in item.schedules.items())
        yield from self._more.items()

    def values(self, step: int, total: int, feedback: Mapping[str, list[float]]) -> dict[str, float]:
        """Everything that is scheduled, by name; for the history."""
        return {
            name: value_at(course, step, total, feedback[name][0] if name in feedback else None)
            for name, course in self._named()
            if isinstance(course, Schedule)
        }

    def apply(self, step: int, total: int, feedback: Mapping[str, list[float]]) -> list[float]:
        """Set the scheduled options of the objectives; the weights of the terms in their order."""
        if self._still:
            return self._fixed
        now = self.values(step, total, feedback)
        for name, item in self._objectives:
            if item.schedules:
                update = {option: now[f"{name}.{option}"] for option in item.schedules}
                options = getattr(item.objective, "options")  # noqa: B009  (checked when the stage was built)
                setattr(item.objective, "options", options.model_copy(update=update))  # noqa: B010
        return [
            now.get(f"{name}.weight", course if isinstance(course, float) else 0.0) for name, course in self._weights
        ]

    def observe(self, seen: Mapping[str, float], feedback: Feedback) -> None:
        """Move the feedback values after an epoch; ``seen``: ``loss``, ``score`` and the terms by name."""
        for name, course in self._named():
            if not isinstance(course, Schedule) or course.kind != "feedback" or course.watch not in seen:
                continue
            now, before = feedback.get(name, [course.first, math.nan])
            value = seen[course.watch]
            feedback[name] = [moved(course, now, before, value), value]
