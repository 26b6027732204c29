"""Structured pruning of an ONNX file without its source code: ONNX in, ONNX out, numpy and ONNX Runtime only.

The dependency graph is found on the ONNX graph itself (:mod:`~compressor.prune.onnx.trace` and its rules), units are
scored forward only, and constants become really smaller. Groups, ratios and facts are those of :mod:`compressor.prune`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compressor.errors import PlanError, Problem, StageError
from compressor.recipe import PruneStage
from compressor.types import Array, LayerFact

if TYPE_CHECKING:
    from onnx import ModelProto

    from compressor.prune.onnx.graph import Structure
    from compressor.prune.onnx.repair import Repaired

Batch = Mapping[str, Array]
FORWARD_ONLY = ("magnitude", "activation", "random")


@dataclass(frozen=True)
class PrunedOnnx:
    """A graph with smaller constants, and its masked twin: the sizes from before with the removed units zeroed, mended
    in the same way; both compute the same outputs (fp32, to 1e-4).

    Multiply-accumulates are those of one sample, None where shapes cannot be inferred. ``distances`` are the mean
    squared differences to the original's outputs on calibration data, by way of mending; ``way`` won.
    """

    model: ModelProto
    masked: ModelProto
    facts: tuple[LayerFact, ...]
    parameters_before: int
    parameters_after: int
    macs_before: int | None
    macs_after: int | None
    way: str
    distances: Mapping[str, float]


def check(model: ModelProto, example: Batch, config: PruneStage) -> list[Problem]:
    """Everything that keeps ``config`` from being carried out on ``model``; empty when it can be.

    A request that matches nothing, that would empty a node or drop whole layers, a protect pattern that matches no
    node. ``where`` is the key inside the stage. Runs two samples of ``example`` (inputs by name, batch first).
    """
    from compressor.prune.onnx import sparsity
    from compressor.prune.onnx.graph import find_structure
    from compressor.prune.onnx.trace import prepare

    if config.zeros is not None:
        return sparsity.check(model, config)
    try:
        structure = find_structure(prepare(model), example)
    except StageError as error:
        return [Problem("model", f"cannot be followed on its example input: {error}")]
    return _problems(structure, config)


def _problems(structure: Structure, config: PruneStage) -> list[Problem]:
    from compressor.prune.choose import problems_of

    problems = problems_of(structure.groups, list(structure.operators), config)
    if config.experts:
        problems.append(Problem("experts", "cannot be dropped from an ONNX file: its router is not known there"))
    if config.layers:
        problems.append(Problem("layers", "whole layers cannot be dropped from an ONNX file; cut channels and neurons"))
    if config.target_speedup is not None:
        problems.append(
            Problem("scope", f"`{config.scope}` is not for ONNX files; give `ratio`, `channels` or `neurons`")
        )
    if config.importance not in FORWARD_ONLY:
        what = f"`{config.importance}` is not for ONNX files; one of {', '.join(FORWARD_ONLY)}"
        problems.append(Problem("importance", what))
    return problems


def prune(
    model: ModelProto,
    example: Batch,
    config: PruneStage,
    calibration: Sequence[Batch],
    *,
    round_to: int = 1,
    seed: int = 0,
    repair: bool = True,
) -> PrunedOnnx:
    """Cut ``model`` as ``config`` asks and return a new one; ``model`` is not changed.

    ``calibration`` are batches of inputs by name, batch first. ``round_to`` is the device's channel multiple. With
    ``repair`` the way of mending whose outputs are nearest to the original's is kept.

    Raises :class:`PlanError` for what :func:`check` finds, :class:`StageError` when activation importance has no data
    or the graph does not run.
    """
    from compressor.prune.choose import candidates, choose
    from compressor.prune.facts import group_facts
    from compressor.prune.onnx.graph import find_structure
    from compressor.prune.onnx.importance import score
    from compressor.prune.onnx.repair import repair as mend
    from compressor.prune.onnx.surgery import checked, commit, mask, shrink
    from compressor.prune.onnx.trace import prepare, tidy

    if config.importance == "activation" and not calibration:
        hint = 'Give calibration data, or choose `importance = "magnitude"`.'
        raise StageError("activation importance needs calibration data, and there is none", hint=hint)
    structure = find_structure(prepare(model), example)
    problems = _problems(structure, config)
    if problems:
        raise PlanError("the prune stage", problems)
    chosen = candidates(structure.groups, config)
    scores = score(structure, chosen, config.importance, calibration, seed)
    committed = commit(structure, choose(chosen, scores, config, round_to), example)
    masked = mask(structure.trace.model, structure, committed.cuts)
    facts = group_facts(structure.groups, committed.cuts, committed.refused, scores, config)
    mended = mend(structure, masked, committed.cuts, scores.means, calibration if repair else ())
    small = checked(tidy(shrink(mended.masked, structure, committed.cuts)))
    return _result(model, small, example, mended, [*facts, *_repair_facts(mended)])


def _repair_facts(mended: Repaired) -> list[LayerFact]:
    facts = [
        LayerFact("prune", name, "bias-compensated", "", "", "mean input from the units that went")
        for name in mended.biased
    ]
    if mended.norms:
        facts.append(LayerFact("prune", "batch norm", "mended", "", f"{len(mended.norms)} layers", mended.way))
    if mended.fitted:
        why = "least squares towards the original's outputs on calibration data"
        facts.append(LayerFact("prune", "weights", "fitted", "", f"{len(mended.fitted)} layers", why))
    return facts


def _result(
    model: ModelProto, small: ModelProto, example: Batch, mended: Repaired, facts: Sequence[LayerFact]
) -> PrunedOnnx:
    from compressor.models.onnx_facts import count_parameters

    return PrunedOnnx(
        model=small,
        masked=mended.masked,
        facts=tuple(facts),
        parameters_before=count_parameters(model),
        parameters_after=count_parameters(small),
        macs_before=macs_of(model, example),
        macs_after=macs_of(small, example),
        way=mended.way,
        distances=mended.distances,
    )


def macs_of(model: ModelProto, example: Batch) -> int | None:
    """Multiply-accumulates of one sample of the example's sizes, from the shapes that tensors really have."""
    from compressor.models.onnx_facts import macs_of_shapes
    from compressor.prune.onnx.runtime import few_samples
    from compressor.prune.onnx.trace import shapes_of

    total = macs_of_shapes(model.graph, shapes_of(model, example))
    samples = len(next(iter(few_samples(model, example).values())))
    return total // samples if total is not None else None


__all__ = ["PrunedOnnx", "check", "macs_of", "prune"]
