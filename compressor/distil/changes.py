"""Parts that objectives put into the student: installed before training, settled after it, kept as record steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compressor.distil.objectives.base import ChangesStudent, Committed, Pass
from compressor.errors import ConfigError, Problem
from compressor.types import LayerFact

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compressor.distil.terms import Weighted
    from compressor.recipe import DistilStage, ObjectiveConfig


@dataclass
class Changes:
    """What the objectives of one stage changed in the student, in their order."""

    owners: Sequence[ChangesStudent]
    steps: list[tuple[Mapping[str, Any], ...]] = field(default_factory=list)
    facts: tuple[LayerFact, ...] = ()

    def install(self, student: nn.Module, example: Mapping[str, Tensor]) -> None:
        """Put the parts in.

        Raises:
            ConfigError: a part does not fit this student.
        """
        for owner in self.owners:
            problems = [Problem("distil.objective", text) for text in owner.unfit(student)]
            if problems:
                raise ConfigError("the distil stage", problems)
            self.steps.append(owner.install(student, example))

    def commit(self, student: nn.Module, validation: Pass | None) -> None:
        """Settle what stays."""
        for number, owner in enumerate(self.owners):
            done: Committed = owner.commit(student, self.steps[number], validation)
            self.steps[number] = done.steps
            self.facts = (*self.facts, *done.facts)

    @property
    def record(self) -> tuple[Mapping[str, Any], ...]:
        """All steps, in order."""
        return tuple(step for steps in self.steps for step in steps)


def changing(weighted: Iterable[Weighted]) -> list[ChangesStudent]:
    """The objectives that put a part into the student."""
    return [item.objective for item in weighted if isinstance(item.objective, ChangesStudent)]


def label_signal(weighted: Iterable[Weighted]) -> str:
    """The student's signal that the labels teach: its output, unless an objective has a head of its own for them."""
    found = (getattr(item.objective, "label_signal", "logits") for item in weighted)
    return next((name for name in found if name != "logits"), "logits")


def problems_of(weighted: Sequence[Weighted], student: nn.Module, where: str) -> list[Problem]:
    """What is impossible about the parts of a stage, found without changing the student."""
    problems: list[Problem] = []
    owners: dict[str, str] = {}
    for number, item in enumerate(weighted):
        objective, place = item.objective, f"{where}.objective.{number}.use"
        if not isinstance(objective, ChangesStudent):
            continue
        if objective.place in owners:
            first = owners[objective.place]
            problems.append(Problem(place, f"`{item.name}` and `{first}` both change the student's {objective.place}"))
        owners[objective.place] = item.name
        problems += [Problem(place, text) for text in objective.unfit(student)]
    return problems


def stage_problems(
    config: DistilStage, student: nn.Module, taught: Mapping[str, int], where: str, fields: frozenset[str] = frozenset()
) -> list[Problem]:
    """:func:`problems_of` for a stage whose objectives are known to exist with these options.

    ``taught``: what the teachers offer; ``fields``: of a batch that the data brings.
    """
    from compressor.distil.terms import build
    from compressor.models.signals import available

    return problems_of(build(config, available(student), taught, fields=fields), student, where)


def shapes_student(item: ObjectiveConfig) -> bool:
    """Does this objective put a part into the student that the null twin has too, as it makes the output's size?"""
    from compressor.distil.terms import made

    return bool(getattr(made(item), "in_twin", False))


def passes_of(config: DistilStage) -> tuple[str, ...]:
    """Objectives of a stage that read the whole training set once before the first step."""
    from compressor.distil.objectives import registry

    known = registry.names()
    return tuple(
        item.use for item in config.objective if item.use in known and hasattr(registry.get(item.use), "survey")
    )
