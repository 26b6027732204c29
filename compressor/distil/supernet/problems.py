"""What keeps a super-net from being trained, seen on the teacher before anything is computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from compressor.distil.objectives.base import ChangesStudent
from compressor.distil.terms import BATCH_FIELDS, made
from compressor.errors import Problem
from compressor.recipe import DistilStage
from compressor.search import SuperNet, corners, named

if TYPE_CHECKING:
    from torch import Tensor, nn


def supernet_problems(
    stage: DistilStage, where: str, module: nn.Module, example: Mapping[str, Tensor]
) -> list[Problem]:
    """Of the module, the space, the budget and of what the stage combines it with; ``where`` is the stage's key."""
    from compressor.models.signals import available

    space = stage.supernet
    assert space is not None
    found = [
        Problem(f"{where}.supernet.{item.where}".rstrip("."), item.what)
        for item in space_problems(space, module, example)
    ]
    found += [Problem(f"{where}.{name}", "cannot be used with `supernet`") for name in _other(stage)]
    signals = available(module)
    for number, item in enumerate(stage.objective):
        objective = made(item)
        if isinstance(objective, ChangesStudent):
            what = f"`{item.use}` puts a part into the student, which sub-nets cannot share"
            found.append(Problem(f"{where}.objective.{number}.use", what))
        elif objective is not None and not objective.bind(signals, signals) and objective.needs.batch - BATCH_FIELDS:
            what = f"`{item.use}` needs more than inputs and labels, by which sub-nets are judged"
            found.append(Problem(f"{where}.objective.{number}.use", what))
    return found


def _other(stage: DistilStage) -> list[str]:
    names = ("rollouts", "sequences", "negatives", "cache_logits", "qat")
    found = [name for name in names if getattr(stage, name, None) is not None]
    return found + (["rounds"] if stage.rounds > 1 else []) + (["labels"] if stage.labels == "estimate" else [])


def space_problems(space: SuperNet, module: nn.Module, example: Mapping[str, Tensor]) -> Iterator[Problem]:
    """Values that ``module`` cannot have and a budget that no sub-net meets; keys are those inside the table."""
    from torch.nn.modules.batchnorm import _NormBase

    from compressor.models.signals import encoder_decoder, structure_of
    from compressor.models.structure.sizes import KEYS, problem_of
    from compressor.models.structure.surgery import FORWARD_ERRORS
    from compressor.models.structure.units import find_groups

    if any(isinstance(part, _NormBase) and part.track_running_stats for part in module.modules()):
        yield Problem("", "batch norm's running statistics belong to one width: it is for models with layer norms")
        return
    if encoder_decoder(module) is not None or not structure_of(module).transformer:
        yield Problem("", "is for transformers with one list of layers")
        return
    try:
        groups = find_groups(module, example)
    except FORWARD_ERRORS as error:
        yield Problem("", f"the model cannot be followed on its example input: {type(error).__name__}: {error}")
        return
    wrong = [*_layers(space, module, example)]
    for key in KEYS:
        for number, units in enumerate(space.axes.get(key, ())):
            what = problem_of(module, groups, key, units)
            wrong += [Problem(f"{key}.{number}", what)] if what is not None else []
    yield from wrong or _budget(space, module, example)


def _layers(space: SuperNet, module: nn.Module, example: Mapping[str, Tensor]) -> Iterator[Problem]:
    from compressor.distil.supernet.subnets import layers_of
    from compressor.models.signals import structure_of
    from compressor.models.structure.blocks import shares_bias

    values = space.axes.get("keep_layers", ())
    blocks = layers_of(module, example) if values else None
    if values and (blocks is None or len(structure_of(module).blocks) != blocks.count):
        yield Problem("keep_layers", "matches nothing: the model has no single list of layers of equal shape")
        return
    for number, keep in enumerate(values):
        assert blocks is not None
        kept = tuple(range(keep)) if isinstance(keep, int) else keep
        ascending = list(kept) == sorted(set(kept)) and bool(kept)
        if not ascending or kept[-1] >= blocks.count:
            what = f"`{blocks.container}` has {blocks.count} layers; give how many to keep, or ascending indices from 0"
            yield Problem(f"keep_layers.{number}", what)
        elif kept[0] and shares_bias(next(module.get_submodule(blocks.container).children())):
            yield Problem(f"keep_layers.{number}", f"layer 0 of `{blocks.container}` holds the position bias: keep it")


def _budget(space: SuperNet, module: nn.Module, example: Mapping[str, Tensor]) -> Iterator[Problem]:
    from compressor.distil.supernet.subnets import SubNets
    from compressor.errors import CompressError

    smallest = corners(space)[0]
    try:
        net = SubNets(module, space, example, ())(smallest)
    except CompressError as error:
        yield Problem("", str(error))
        return
    over = space.budget.over(net.macs, net.parameters_count, None)
    if over:
        yield Problem("budget", f"no sub-net meets it; the smallest, {named(smallest)}: {'; '.join(over)}")


__all__ = ["space_problems", "supernet_problems"]
