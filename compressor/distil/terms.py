"""From the recipe's objectives to one loss: built, checked against both models, summed in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from compressor.config import problems_of
from compressor.distil.objectives import registry
from compressor.distil.objectives.base import Objective, Term
from compressor.errors import CompressError, ConfigError, Problem
from compressor.recipe import DistilStage, ObjectiveConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Weighted:
    """An objective with its weight and its place in the recipe."""

    name: str
    weight: float
    objective: Objective


def check(
    config: DistilStage, student_signals: Mapping[str, int], teacher_signals: Mapping[str, int], where: str = "distil"
) -> list[Problem]:
    """Everything wrong with the objectives of a stage, found without running a model.

    Args:
        config: the stage.
        student_signals, teacher_signals: what the models offer (``compressor.models.signals.available``).
        where: key of the stage in the recipe, as a prefix of the problems' places (``stage.1``).
    """
    problems: list[Problem] = []
    if not config.labels and not config.objective:
        problems.append(Problem(f"{where}.labels", "must be greater than 0 when there is no objective"))
    for number, item in enumerate(config.objective):
        place = f"{where}.objective.{number}"
        objective = _built(item, place, problems)
        if objective is not None:
            wrong = objective.bind(student_signals, teacher_signals)
            problems += [Problem(f"{place}.match" if item.match else f"{place}.use", text) for text in wrong]
    return problems


def build(config: DistilStage, student: Mapping[str, int], teacher: Mapping[str, int]) -> list[Weighted]:
    """The stage's objectives, bound to what the models offer.

    Raises:
        ConfigError: with every problem :func:`check` finds.
    """
    problems = check(config, student, teacher)
    if problems:
        raise ConfigError("the distil stage", problems)
    built = []
    for item in config.objective:
        objective = _built(item, item.use, problems)
        if objective is not None:
            objective.bind(student, teacher)
            built.append(Weighted(item.use, item.weight, objective))
    return built


def _built(item: ObjectiveConfig, place: str, problems: list[Problem]) -> Objective | None:
    """The objective of one table of the recipe, or None with its problems added."""
    if item.use not in registry.names():
        problems.append(Problem(f"{place}.use", registry.unknown(item.use)))
        return None
    try:
        loaded: Any = registry.get(item.use)
    except CompressError as error:
        problems.append(Problem(f"{place}.use", f"{error} {error.hint}".strip()))
        return None
    before = len(problems)
    options = None
    try:
        options = loaded.Options.model_validate(item.options)
    except ValidationError as error:
        problems += [Problem(f"{place}.options.{p.where}", p.what) for p in problems_of(error, loaded.Options)]
    if item.match is not None and loaded.default_match is None:
        problems.append(Problem(f"{place}.match", f"`{item.use}` takes no match"))
    if len(problems) > before:
        return None
    objective: Objective = loaded(options, item.match)
    return objective


def combine(terms: Sequence[tuple[float, Term]]) -> Tensor:
    """Each term as ``weight * sum / count``, stacked: the one place where reductions are decided.

    The loss is their sum. A term without samples (a batch without labels) gives 0.
    """
    import torch

    return torch.stack([term.sum * (weight / _at_least_one(term.count)) for weight, term in terms])


def _at_least_one(count: Tensor | float) -> Tensor | float:
    return max(count, 1.0) if isinstance(count, float | int) else count.clamp_min(1)
