"""Structured pruning: channels, heads, neurons and whole layers, committed to really smaller tensors.

:func:`check` says what is wrong with a request without computing anything but one forward pass; :func:`prune` carries
it out. The dependency graph is :mod:`compressor.models.structure`, the format of records
:mod:`compressor.models.rebuild`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compressor.errors import PlanError, Problem, StageError
from compressor.recipe import PruneStage
from compressor.types import LayerFact

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compressor.prune.latency import Cost
    from compressor.prune.sensitivity import Curve, Curves, Quality

Batch = Mapping[str, "Tensor"]


@dataclass(frozen=True)
class Pruned:
    """A module with smaller tensors, in evaluation mode, and what made it.

    ``masked`` has the sizes from before the width cut with the removed units zeroed, and computes the same outputs
    (fp32, to 1e-4). Multiply-accumulates are those of one sample.
    """

    module: nn.Module
    record: list[dict[str, Any]]
    facts: tuple[LayerFact, ...]
    masked: nn.Module
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int


def check(module: nn.Module, example: Batch, config: PruneStage) -> list[Problem]:
    """Everything that keeps ``config`` from being carried out on ``module``; empty when it can be.

    A request that matches nothing, that would empty a layer or drop more blocks than there are, a protect pattern that
    matches no module. ``where`` is the key inside the stage. Runs two samples of ``example``; ``module`` is not
    changed.
    """
    from compressor.models.structure.surgery import FORWARD_ERRORS
    from compressor.models.structure.units import find_groups
    from compressor.prune import experts, latency, sparsity
    from compressor.prune.choose import candidates, problems_of

    if config.zeros is not None:
        return sparsity.check(module, config)
    try:
        groups = find_groups(module, example)
    except FORWARD_ERRORS as error:
        return [Problem("model", f"cannot be followed on its example input: {type(error).__name__}: {error}")]
    names = [name for name, _ in module.named_modules()]
    found = problems_of(groups, names, config) + _layer_problems(module, example, config)
    found += experts.problems_of(module, example, config)
    return found or latency.problems_of(module, example, candidates(groups, config), config)


def prune(
    module: nn.Module,
    example: Batch,
    config: PruneStage,
    calibration: Iterable[Batch],
    *,
    round_to: int = 1,
    seed: int = 0,
    repair: bool = True,
    cost: Cost | None = None,
    curves: Curves | None = None,
) -> Pruned:
    """Cut ``module`` as ``config`` asks and return a new one.

    ``example`` and the batches of ``calibration`` are inputs by name, batch first. ``calibration`` is read several
    times (a list or a data loader; a generator is read into memory). ``round_to`` is the device's channel multiple.
    With ``repair`` the removed units' mean contribution moves into the next bias, and batch-norm statistics are
    mended where that brings the outputs on calibration data nearer to the teacher's. ``cost`` prices a layer's shape
    for the scopes ``latency`` and ``sensitivity``; multiply-accumulates where it is left out.
    ``curves`` are those of :func:`sensitivity_of`, for the scope ``sensitivity``.

    Raises :class:`PlanError` for what :func:`check` finds, :class:`StageError` when activation importance has no data.
    """
    from compressor.models.cost import count_macs, count_parameters
    from compressor.prune.experts import drop_experts

    batches = calibration if not hasattr(calibration, "__next__") else list(calibration)
    _require(module, example, config, batches)
    before = count_parameters(module), count_macs(module, example)
    work, record, facts = _drop_layers(module, example, config, batches, seed)
    work, steps, more = drop_experts(work, example, config, batches, seed)
    record, facts = record + steps, facts + more
    made = _cut_width(work, example, config, batches, _How(round_to, seed, repair, cost, curves))
    after = count_parameters(made.module), count_macs(made.module, example)
    return Pruned(
        module=made.module,
        record=record + made.record,
        facts=(*facts, *made.facts),
        masked=made.masked,
        parameters_before=before[0],
        parameters_after=after[0],
        macs_before=before[1],
        macs_after=after[1],
    )


def needs_data(importance: str) -> bool:
    """Whether this importance looks at what the network computes, not at its weights alone."""
    return importance not in ("magnitude", "random")


def _require(module: nn.Module, example: Batch, config: PruneStage, batches: Iterable[Batch]) -> None:
    problems = check(module, example, config)
    if problems:
        raise PlanError("the prune stage", problems)
    if needs_data(config.importance) and next(iter(batches), None) is None:
        hint = 'Give calibration data, or choose `importance = "magnitude"`.'
        raise StageError(f"{config.importance} importance needs calibration data, and there is none", hint=hint)


def _layer_problems(module: nn.Module, example: Batch, config: PruneStage) -> list[Problem]:
    from compressor.models.structure.blocks import find_block_lists

    if not config.layers:
        return []
    lists = find_block_lists(module, example)
    if not lists:
        return [
            Problem("layers", "matches nothing: the model has no list of blocks that map a state to one of its shape")
        ]
    blocks, spare = (
        sum(len(each.positions) for each in lists),
        sum(len(each.positions) - each.minimum for each in lists),
    )
    if config.layers > spare:
        return [Problem("layers", f"{config.layers} is more than can go: {spare} of the model's {blocks} blocks")]
    return []


def _drop_layers(
    module: nn.Module, example: Batch, config: PruneStage, batches: Iterable[Batch], seed: int
) -> tuple[nn.Module, list[dict[str, Any]], list[LayerFact]]:
    """A copy without the blocks that change their input least (``random`` importance drops any)."""
    import numpy as np

    from compressor.models.rebuild import apply
    from compressor.models.structure.blocks import block_influence, drop_steps, find_block_lists

    work = copy.deepcopy(module).eval()
    if not config.layers:
        return work, [], []
    lists = find_block_lists(work, example)
    data = batches if next(iter(batches), None) is not None else [example]
    influence = block_influence(work, lists, data)
    if config.importance == "random":
        generator = np.random.default_rng(seed)
        influence = {key: float(generator.random()) for key in influence}
    spare = {blocks.container: len(blocks.positions) - blocks.minimum for blocks in lists}
    dropped = _least(influence, spare, config.layers)
    record: list[dict[str, Any]] = []
    facts = []
    for blocks in lists:
        gone = sorted(position for container, position in dropped if container == blocks.container)
        keep = [position for position in range(blocks.count) if position not in gone]
        record += drop_steps(work, blocks.container, keep) if gone else []
        for position in gone:
            reason = f"1 - cos(input, output) = {influence[(blocks.container, position)]:.4f}, among the least"
            reason = "random control" if config.importance == "random" else reason
            facts.append(LayerFact("prune", f"{blocks.container}.{position}", "dropped", "1 block", "0 blocks", reason))
    apply(work, record)
    return work, record, facts


def _least(influence: Mapping[tuple[str, int], float], spare: dict[str, int], count: int) -> set[tuple[str, int]]:
    """The ``count`` blocks of least influence; of every container at most ``spare`` go."""
    dropped: set[tuple[str, int]] = set()
    for key in sorted(influence, key=lambda key: (influence[key], key)):
        if len(dropped) < count and spare[key[0]] > 0:
            dropped.add(key)
            spare[key[0]] -= 1
    return dropped


@dataclass(frozen=True)
class _How:
    round_to: int
    seed: int
    repair: bool
    cost: Cost | None
    curves: Curves | None


def _budgeted(
    work: nn.Module, example: Batch, config: PruneStage, chosen: Sequence[Any], scores: Any, how: _How
) -> dict[str, float]:
    """Units per group under the budget of the scopes ``latency`` and ``sensitivity``."""
    from compressor.prune.latency import CostTable, Loss, relative_importance, widths
    from compressor.prune.sensitivity import loss_of

    loss: Loss = relative_importance
    if config.scope == "sensitivity":
        if how.curves is None:
            raise StageError("the scope `sensitivity` needs curves measured on validation, and there are none")
        loss = loss_of(how.curves)
    table = CostTable(work, example, chosen, how.cost if config.cost == "auto" else None)
    return widths(chosen, scores, config, how.round_to, table, loss)


def sensitivity_of(
    module: nn.Module,
    example: Batch,
    config: PruneStage,
    calibration: Iterable[Batch],
    quality: Quality,
    *,
    seed: int = 0,
) -> dict[str, Curve]:
    """For every group that ``config`` may cut, the score it loses on validation at some shares of its units.

    Layers that ``config`` drops are dropped first. ``quality`` scores a module on validation, higher is better. Raises
    as :func:`prune` does.
    """
    from compressor.models.structure.scores import score
    from compressor.models.structure.units import find_groups
    from compressor.prune.choose import candidates
    from compressor.prune.sensitivity import measure

    batches = calibration if not hasattr(calibration, "__next__") else list(calibration)
    _require(module, example, config, batches)
    work, _, _ = _drop_layers(module, example, config, batches, seed)
    groups = candidates(find_groups(work, example), config)
    return measure(work, groups, score(work, groups, config.importance, batches, seed), quality)


@dataclass(frozen=True)
class _Width:
    module: nn.Module
    masked: nn.Module
    record: list[dict[str, Any]]
    facts: list[LayerFact]


def _cut_width(
    work: nn.Module,
    example: Batch,
    config: PruneStage,
    batches: Iterable[Batch],
    how: _How,
) -> _Width:
    from compressor.models.structure.scores import score
    from compressor.models.structure.surgery import commit
    from compressor.models.structure.units import find_groups
    from compressor.prune.choose import candidates, choose
    from compressor.prune.facts import group_facts

    groups = find_groups(work, example)
    chosen = candidates(groups, config)
    data = batches if how.repair or needs_data(config.importance) else ()
    scores = score(work, chosen, config.importance, data, how.seed)
    sizes = _budgeted(work, example, config, chosen, scores, how) if config.target_speedup is not None else None
    cuts = choose(chosen, scores, config, how.round_to, sizes)
    committed = commit(work, cuts, example)
    facts = group_facts(groups, cuts, committed.refused, scores, config)
    if not how.repair:
        return _Width(committed.module, committed.masked, committed.record, facts)
    kept = [cut for cut in cuts if cut.group.name not in committed.refused]
    return _repair(work, kept, (committed.record, facts), batches, scores.means)


def _repair(
    work: nn.Module,
    cuts: Sequence[Any],
    done: tuple[list[dict[str, Any]], list[LayerFact]],
    batches: Iterable[Batch],
    means: Mapping[Any, Any],
) -> _Width:
    from compressor.models.rebuild import replay
    from compressor.models.structure.surgery import mask
    from compressor.prune.repair import compensate, mend_batch_norm

    record, facts = done
    teacher = copy.deepcopy(work)
    biased = compensate(work, cuts, means)
    student, masked = replay(work, record), mask(work, cuts)
    norms, how = mend_batch_norm(teacher, masked, student, cuts, batches) if cuts else ([], "")
    facts = facts + [
        LayerFact("prune", name, "bias-compensated", "", "", "mean input from the units that went") for name in biased
    ]
    if norms:
        facts.append(LayerFact("prune", "batch norm", "mended", "", f"{len(norms)} layers", f"statistics {how}"))
    return _Width(student, masked, record, facts)


__all__ = ["Pruned", "check", "prune", "sensitivity_of"]
