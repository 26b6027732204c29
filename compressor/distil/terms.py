"""From the recipe's objectives to one loss: built, checked against both models, summed in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from compressor.config import problems_of
from compressor.data.pairs import Groups
from compressor.distil.objectives import registry
from compressor.distil.objectives.base import Objective, Term
from compressor.distil.panel import MAIN, Panel
from compressor.errors import CompressError, ConfigError, Problem
from compressor.recipe import DistilStage, ObjectiveConfig
from compressor.schedule import Schedule
from compressor.strategy import MixupStrategy

if TYPE_CHECKING:
    from torch import Tensor

BATCH_FIELDS = frozenset({"labels", "mask", "response"})  # what the loop fills of every ``Batch``
SOURCES = {  # where other fields come from
    "ends": "a language model's further teacher with a tokenizer of its own, named in `match`",
    "vocabularies": "a language model's further teacher with a tokenizer of its own, named in `match`",
    "masked": 'hidden tokens: `augment = ["mask"]`',
    "student_made": "`rollouts` with `beside = true`",
    "groups": "pairs of texts: `data.text_pair` beside `data.text`, in an embedding task",
    "scores": "scores of the pairs: `data.score`",
}


@dataclass(frozen=True)
class Weighted:
    """An objective with its weight and its place in the recipe."""

    name: str
    weight: float | Schedule
    objective: Objective
    schedules: Mapping[str, Schedule] = field(default_factory=dict)  # of its options

    @property
    def teacher(self) -> str:
        """The teacher whose signals it reads; the main one where it reads several."""
        owners = {name.partition(":")[0] if ":" in name else MAIN for name in self.objective.needs.teacher}
        return owners.pop() if len(owners) == 1 else MAIN


def check(
    config: DistilStage,
    student_signals: Mapping[str, int],
    teacher_signals: Mapping[str, int],
    where: str = "distil",
    processes: int = 1,
    fields: frozenset[str] = frozenset(),
) -> list[Problem]:
    """Everything wrong with the objectives of a stage, found without running a model.

    Args:
        config: the stage.
        student_signals, teacher_signals: what the models offer (``compressor.models.signals.available``).
        where: key of the stage in the recipe, as a prefix of the problems' places (``stage.1``).
        processes: how many train together.
        fields: of a ``Batch`` that data and stage bring beside ``BATCH_FIELDS``.
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
            problems += [Problem(f"{place}.use", text) for text in _unfit(config, item.use, objective, processes)]
            problems += [Problem(f"{place}.use", text) for text in _absent(item.use, objective, fields)]
    return problems


def offered_fields(config: DistilStage, panel: Panel | None = None, groups: Groups | None = None) -> frozenset[str]:
    """Fields of a ``Batch`` that this stage, these teachers and data with these groups bring."""
    foreign = panel is not None and any(teacher.foreign for teacher in panel.teachers)
    beside = config.rollouts is not None and config.rollouts.beside
    made = {"ends": foreign, "vocabularies": foreign, "student_made": beside, "masked": "mask" in config.augment}
    paired = {"groups": groups is not None, "scores": groups is not None and groups.scores is not None}
    return frozenset(name for name, there in {**made, **paired}.items() if there)


def _absent(name: str, objective: Objective, fields: frozenset[str]) -> list[str]:
    absent = sorted(objective.needs.batch - BATCH_FIELDS - fields)
    return [f"`{name}` needs {' and '.join(dict.fromkeys(SOURCES[f] for f in absent))}"] if absent else []


def _unfit(config: DistilStage, name: str, objective: Objective, processes: int) -> list[str]:
    """Why an objective cannot be trained the way the stage asks."""
    found, needs = [], objective.needs
    if needs.batch_wise and config.accumulate > 1:
        found.append(
            f"`{name}` compares the samples of a whole batch, which accumulate = {config.accumulate} would cut; "
            "leave `accumulate` out, or give a smaller `batch`"
        )
    if needs.batch_wise and processes > 1:
        found.append(
            f"`{name}` compares the samples of a whole batch, which {processes} processes would cut; launch one"
        )
    if "labels" in needs.batch and any(isinstance(strategy, MixupStrategy) for strategy in config.strategy):
        found.append(f"`{name}` needs one label a sample, which the strategy `mixup` blends")
    return found


def build(
    config: DistilStage,
    student: Mapping[str, int],
    teacher: Mapping[str, int],
    processes: int = 1,
    fields: frozenset[str] = frozenset(),
) -> list[Weighted]:
    """The stage's objectives, bound to what the models offer (see :func:`check`).

    Raises:
        ConfigError: with every problem :func:`check` finds.
    """
    problems = check(config, student, teacher, processes=processes, fields=fields)
    if problems:
        raise ConfigError("the distil stage", problems)
    built = []
    for item in config.objective:
        objective = _built(item, item.use, problems)
        if objective is not None:
            objective.bind(student, teacher)
            built.append(Weighted(item.use, item.weight, objective, _schedules(item)))
    return built


def made(item: ObjectiveConfig) -> Objective | None:
    """The objective of one table of the recipe, unbound; None where the table is wrong."""
    return _built(item, item.use, [])


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
        options = loaded.Options.model_validate(_ends(item, 0))
        if _schedules(item):
            loaded.Options.model_validate(_ends(item, 1))
            problems += [Problem(f"{place}.options.{p.where}", p.what) for p in _unscheduled(item, options)]
    except ValidationError as error:
        problems += [Problem(f"{place}.options.{p.where}", p.what) for p in problems_of(error, loaded.Options)]
    if item.match is not None and loaded.default_match is None:
        problems.append(Problem(f"{place}.match", f"`{item.use}` takes no match"))
    if len(problems) > before:
        return None
    objective: Objective = loaded(options, item.match)
    return objective


def _schedules(item: ObjectiveConfig) -> dict[str, Schedule]:
    return {name: value for name, value in item.options.items() if isinstance(value, Schedule)}


def _ends(item: ObjectiveConfig, end: int) -> dict[str, Any]:
    """The options with every schedule at its first (0) or final (1) value."""
    return {name: v.values[end] if isinstance(v, Schedule) else v for name, v in item.options.items()}


def _unscheduled(item: ObjectiveConfig, options: Any) -> list[Problem]:
    """Only numbers with a fraction can change while training: sizes and switches decide how an objective is built."""
    wrong = [name for name in _schedules(item) if not isinstance(getattr(options, name), float)]
    return [Problem(name, "cannot be a schedule: it is not a number with a fraction") for name in wrong]


def combine(terms: Sequence[tuple[float, Term]]) -> Tensor:
    """Each term as ``weight * sum / count``, stacked: the one place where reductions are decided.

    The loss is their sum. A term without samples (a batch without labels) gives 0.
    """
    import torch

    return torch.stack([term.sum * (weight / at_least_one(term.count)) for weight, term in terms])


def at_least_one(count: Tensor | float) -> Tensor | float:
    return max(count, 1.0) if isinstance(count, float | int) else count.clamp_min(1)
