"""Students made from their teacher: fewer layers, a narrower hidden width, a smaller vocabulary, layers of low rank,
fewer tokens, or the same network narrower and untrained.

Copying every second layer is what DistilBERT did (layers 0, 2, 4, 7, 9, 11 of 12; methods F2) and a robust start for
any transformer (methods N3); slicing the hidden width by activation is Minitron's (methods U1).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compressor.errors import PlanError, Problem
from compressor.recipe import StudentStage
from compressor.students import depth, factory, lowrank, tokens, units
from compressor.types import LayerFact

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compressor.models.structure.groups import Cut, Group

Batch = Mapping[str, "Tensor"]
STAGE = "student"


@dataclass(frozen=True)
class Made:
    """A student, in evaluation mode, and the steps that make it from its teacher."""

    module: nn.Module
    record: list[dict[str, Any]]
    facts: tuple[LayerFact, ...]
    parameters_before: int
    parameters_after: int


def check(module: nn.Module, example: Batch, config: StudentStage) -> list[Problem]:
    """Everything that keeps ``config`` from being carried out on ``module``; empty when it can be."""
    if config.search is not None:
        from compressor.students import search

        return search.problems_of(module, example, config, candidate)
    if config.factory:
        problems = factory.problems_of(module, example, config.factory)
        return problems or checks_of(factory.remade(module, config.factory, 0)[0], example, config)
    return checks_of(module, example, config)


def checks_of(
    module: nn.Module, example: Batch, config: StudentStage, groups: Sequence[Group] | None = None
) -> list[Problem]:
    """:func:`check` of all keys but ``factory`` and ``search``; ``groups`` are the module's, where they are known."""
    from compressor.models.structure.units import find_groups

    problems = depth.problems_of(module, example, config) + lowrank.problems_of(module, config)
    if config.drop_tokens and not problems:  # numbers of blocks are those of the student
        kept = module if config.keep_layers is None else depth.keep_layers(module, example, config)[0]
        problems += tokens.problems_of(kept, example, config)
    if config.hidden_size is None and config.width is None and not units.wanted(config):
        return problems
    groups = find_groups(module, example) if groups is None else groups
    problems += units.problems_of(module, groups, config)
    if config.hidden_size is not None:
        problems += _hidden_problems(groups, config.hidden_size)
    if config.width is not None and not _scalable(groups):
        problems.append(Problem("width", "matches nothing: the model has no convolution whose channels could go"))
    return problems


def make_student(
    module: nn.Module,
    config: StudentStage,
    example: Batch,
    *,
    seed: int,
    calibration: Iterable[Batch] | None = None,
    round_to: int = 1,
) -> Made:
    """Make a student as ``config`` asks; ``module`` is not touched.

    ``example`` and ``calibration`` hold inputs by name, batch first. The hidden width keeps the units of highest
    activation on ``calibration``, or of highest weight norm without it. ``width`` gives new weights, drawn from
    ``seed``. A smaller vocabulary needs a module of :func:`compressor.models.vocabulary.read_ids`. Ranks are multiples
    of ``round_to``.

    Raises :class:`PlanError` for what :func:`check` finds.
    """
    from compressor.models.cost import count_parameters

    problems = check(module, example, config)
    if problems:
        raise PlanError("the student stage", problems)
    if config.search is not None:
        raise PlanError.single("search", "settle it first: `compressor.students.search.choose` gives the stage")
    batches = calibration if calibration is None or not hasattr(calibration, "__next__") else list(calibration)
    student, record, facts = _made(module, config, example, seed, batches)
    steps, rows = lowrank.factorise_layers(student, config, round_to, batches)
    record, facts = record + steps, facts + rows
    steps, rows = tokens.drop_tokens(student, example, config)
    record, facts = record + steps, facts + rows
    return Made(student.eval(), record, tuple(facts), count_parameters(module), count_parameters(student))


def candidate(module: nn.Module, config: StudentStage, example: Batch) -> nn.Module:
    """The student that a search looks at: as :func:`make_student` makes it, but unchecked and other units may stay.

    Raises:
        CompressError: the keys do not fit together.
    """
    student = _made(module, config, example, 0, None)[0]
    lowrank.factorise_layers(student, config, 1, None)
    tokens.drop_tokens(student, example, config)
    return student.eval()


def _made(
    module: nn.Module, config: StudentStage, example: Batch, seed: int, batches: Iterable[Batch] | None
) -> tuple[nn.Module, list[dict[str, Any]], list[LayerFact]]:
    """Everything that makes another network; what changes layers in place comes after."""
    start: list[dict[str, Any]] = []
    told: list[LayerFact] = []
    if config.factory:
        module, start, told = factory.remade(module, config.factory, seed)
    student, record, facts = depth.keep_layers(module, example, config)
    record, facts = start + record, told + facts
    if config.vocabulary is not None:
        steps, rows = _fewer_tokens(student)
        record, facts = record + steps, facts + rows
    student, steps, rows = units.fewer_units(student, config, example, batches)
    record, facts = record + steps, facts + rows
    if config.hidden_size is not None:
        student, steps, rows = _narrow(student, config.hidden_size, example, batches)
        record, facts = record + steps, facts + rows
    if config.width is not None:
        student, steps, rows = _scale(student, config.width, example, seed)
        record, facts = record + steps, facts + rows
    return student, record, facts


def _fewer_tokens(student: nn.Module) -> tuple[list[dict[str, Any]], list[LayerFact]]:
    """Cut the tables of ``student`` in place to the tokens that its input ids stand for."""
    from compressor.models.rebuild import apply
    from compressor.models.vocabulary import vocabulary_steps

    record = vocabulary_steps(student)
    if not record:
        raise PlanError.single("vocabulary", "the model does not read the ids of a smaller vocabulary")
    names = [str(step["tensor"]) for step in record if step["op"] == "cut"]
    before = [len(student.get_parameter(name)) for name in names]
    apply(student, record)
    pairs = zip(names, before, strict=True)
    return record, [
        LayerFact(
            STAGE,
            name.rpartition(".")[0],
            "trimmed",
            f"{rows} tokens",
            f"{len(student.get_parameter(name))} tokens",
            "only tokens of the corpus, special tokens and single characters",
        )
        for name, rows in pairs
        if name.endswith("weight")
    ]


def _hidden_problems(groups: Sequence[Group], size: int) -> list[Problem]:
    from compressor.models.structure.sizes import hidden_groups

    hidden = hidden_groups(groups)
    if not hidden:
        return [Problem("hidden_size", "matches nothing: no width of the model is normalised by a layer norm")]
    fixed = sorted({reason for group in hidden for reason in group.hard})
    if fixed:
        return [Problem("hidden_size", f"`{hidden[0].name}` must keep its width: it {'; it '.join(fixed)}")]
    if size > hidden[0].units:
        return [Problem("hidden_size", f"{size} is more than the teacher's {hidden[0].units}")]
    return []


def _narrow(
    student: nn.Module, size: int, example: Batch, calibration: Iterable[Batch] | None
) -> tuple[nn.Module, list[dict[str, Any]], list[LayerFact]]:
    import numpy as np

    from compressor.models.structure.groups import Cut, Method
    from compressor.models.structure.scores import score
    from compressor.models.structure.sizes import hidden_groups
    from compressor.models.structure.units import find_groups

    groups = hidden_groups(find_groups(student, example))
    method: Method = "activation" if calibration is not None else "magnitude"
    scores = score(student, groups, method, calibration or ())
    cuts = [
        Cut(group, np.sort(np.argsort(-scores.units[group.name], kind="stable")[:size]).astype(np.int64))
        for group in groups
    ]
    return _cut(student, cuts, example, f"hidden width by {method}")


def _scalable(groups: Sequence[Group]) -> list[Group]:
    """What ``width`` scales: every width that is free, in a network that has channels at all."""
    free = [group for group in groups if not group.hard and group.kind != "heads"]
    return free if any(group.kind == "channels" for group in free) else []


def _scale(
    student: nn.Module, width: float, example: Batch, seed: int
) -> tuple[nn.Module, list[dict[str, Any]], list[LayerFact]]:
    """The same topology with ``width`` times the channels and newly drawn weights.

    Layers draw by their own ``reset_parameters``; parameters outside standard layers keep a slice of the teacher's.
    """
    import numpy as np
    import torch

    from compressor.models.structure.groups import Cut
    from compressor.models.structure.units import find_groups

    groups = _scalable(find_groups(student, example))
    cuts = [Cut(group, np.arange(max(1, round(group.units * width)), dtype=np.int64)) for group in groups]
    student, record, facts = _cut(student, cuts, example, f"width {width:g}, new weights")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part in student.modules():
            reset = getattr(part, "reset_parameters", None)
            if callable(reset):
                reset()
    return student, record, facts


def _cut(
    student: nn.Module, cuts: Sequence[Cut], example: Batch, reason: str
) -> tuple[nn.Module, list[dict[str, Any]], list[LayerFact]]:
    from compressor.models.structure.surgery import commit

    made = commit(student, cuts, example, exact=False)
    return made.module, made.record, units.rows_of(cuts, made.refused, reason)


__all__ = ["Made", "candidate", "check", "checks_of", "make_student"]
