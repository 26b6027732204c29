"""Choose a student from a space, under a budget, before anything is trained.

Every candidate is a setting of the student stage itself, made by the same code on a copy of the teacher, so that what
is chosen can be written into a recipe as it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from compressor.errors import CompressError, Problem, StageError
from compressor.recipe import StudentStage
from compressor.search import FACTORY, Candidate, Search, corners
from compressor.students.search.evolve import Tried, look_at
from compressor.types import LayerFact

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compressor.students.search.diswot import Judge

Batch = Mapping[str, "Tensor"]
Make = Callable[["nn.Module", StudentStage, Batch], "nn.Module"]
Cost = Callable[[Any], float]
STAGE = "student"


@dataclass(frozen=True)
class Outcome:
    """What was chosen, as a stage without a search, and all that was tried, best first."""

    chosen: StudentStage
    tried: tuple[Tried, ...]
    facts: tuple[LayerFact, ...]

    def as_json(self) -> dict[str, Any]:
        given = self.chosen.model_dump(mode="json", exclude_defaults=True)
        return {"chosen": given, "tried": [each.as_json() for each in self.tried]}


def stage_of(stage: StudentStage, candidate: Candidate) -> StudentStage:
    """The student stage that makes a candidate: the other keys of ``stage`` stay."""
    plain = {key: value for key, value in candidate.items() if not key.startswith(FACTORY)}
    arguments = {key.removeprefix(FACTORY): value for key, value in candidate.items() if key.startswith(FACTORY)}
    return stage.model_copy(update={"search": None, "factory": {**stage.factory, **arguments}, **plain})


class Builder:
    """Makes candidates and says what they cost."""

    def __init__(self, teacher: nn.Module, stage: StudentStage, example: Batch, make: Make, cost: Cost | None) -> None:
        assert stage.search is not None
        self.teacher, self.stage, self.example, self.make = teacher, stage, example, make
        self.budget, self._cost = stage.search.budget, cost
        self._known: dict[Any, float] = {}

    def __call__(self, candidate: Candidate) -> tuple[Tried, nn.Module | None]:
        """Costs of a candidate and the module, None where it cannot be built; ``why`` says what is too much."""
        try:
            module = self.make(self.teacher, stage_of(self.stage, candidate), self.example)
        except CompressError as error:
            return Tried(candidate, why=f"cannot be built: {error}".replace("\n", " ")), None
        found = self.costs(module, candidate)
        if why := self._unlike(module):
            return replace(found, why=why), None
        over = self.budget.over(found.macs, found.parameters, found.latency_ms)
        return replace(found, why="; ".join(over)), module

    def costs(self, module: nn.Module, candidate: Candidate) -> Tried:
        """What a module costs; latency only where it is limited and can be measured."""
        from compressor.models.cost import count_macs, count_parameters

        latency = self._latency(module) if self.budget.latency_ms is not None and self._cost is not None else None
        return Tried(candidate, count_macs(module, self.example), count_parameters(module), latency)

    def _unlike(self, module: nn.Module) -> str:
        from compressor.students.factory import unlike

        return unlike(self.teacher, module, self.example) if module is not self.teacher else ""

    def _latency(self, module: nn.Module) -> float:
        from compressor.models.shapes import layer_shapes

        total = 0.0
        for shape in layer_shapes(module, self.example).values():
            if shape not in self._known:
                assert self._cost is not None
                self._known[shape] = self._cost(shape)
            total += self._known[shape]
        return total


def choose(build: Builder, judge: Judge, config: Search) -> Outcome:
    """Search, and say what came of it.

    Raises:
        StageError: no candidate that was tried is within the budget.
    """

    def evaluate(candidate: Candidate) -> Tried:
        found, module = build(candidate)
        if module is None or found.why:
            return found
        try:
            return replace(found, score=judge(module))
        except CompressError as error:
            return replace(found, why=f"cannot be scored: {error}".replace("\n", " "))

    tried = sorted(look_at(config, evaluate), key=lambda each: each.rank)
    if tried[0].score is None:
        least = min(tried, key=lambda each: (not each.parameters, each.macs))
        raise StageError(
            f"none of the {len(tried)} candidates that were tried is within the budget; the smallest, {least.name}: "
            f"{least.why}",
            hint="Raise `search.budget`, or give the space smaller values.",
        )
    before = build.costs(build.teacher, {}).cost
    facts = tuple(_row(each, before, chosen=number == 0) for number, each in enumerate(tried))
    return Outcome(stage_of(build.stage, tried[0].candidate), tuple(tried), facts)


def _row(each: Tried, before: str, *, chosen: bool) -> LayerFact:
    action = "chosen" if chosen else "scored" if each.score is not None else "left out"
    reason = each.score.shown if each.score is not None else each.why
    return LayerFact(STAGE, f"candidate: {each.name}", action, before, each.cost, reason)


def problems_of(module: nn.Module, example: Batch, stage: StudentStage, make: Make) -> list[Problem]:
    """What keeps the search from being carried out: values that no candidate can have, budgets that none meets."""
    from compressor.students.search import diswot

    assert stage.search is not None
    found = _value_problems(module, example, stage)
    found += [Problem("search.terms", text) for text in diswot.problems_of(module, example, stage.search)]
    return found or _budget_problems(module, example, stage, make)


def _value_problems(module: nn.Module, example: Batch, stage: StudentStage) -> list[Problem]:
    """Values that the teacher cannot have; with a factory its other networks are what the values refer to."""
    from compressor.models.structure.units import find_groups
    from compressor.students import checks_of
    from compressor.students.factory import name_problems

    assert stage.search is not None
    space = stage.search.space
    if space.factory:
        return name_problems(module, space.factory, "search.space.factory")
    groups = find_groups(module, example)
    problems = []
    for key, values in space.axes.items():
        for number, value in enumerate(values):
            wrong = checks_of(module, example, StudentStage(kind="student", **{key: value}), groups)
            problems += [Problem(f"search.space.{key}.{number}", item.what) for item in wrong]
    return problems


def _budget_problems(module: nn.Module, example: Batch, stage: StudentStage, make: Make) -> list[Problem]:
    """The smallest candidates are built; latency is not measured here."""
    assert stage.search is not None
    build = Builder(module, stage, example, make, None)
    found = [build(candidate)[0] for candidate in corners(stage.search.space)]
    if any(not each.why for each in found):
        return []
    least = min(found, key=lambda each: (not each.parameters, each.macs))
    key = "search.budget" if least.parameters else "search.space"
    return [Problem(key, f"no candidate meets it; the smallest, {least.name}: {least.why}")]


__all__ = ["Builder", "Outcome", "choose", "problems_of", "stage_of"]
