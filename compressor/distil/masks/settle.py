"""From learnt masks to a smaller student: folded into the weights, cut by the usual surgery, then checked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from compressor.distil.masks.gates import Gate, GatePlan
from compressor.distil.objectives.base import Committed, Steps
from compressor.errors import StageError
from compressor.models.rebuild import apply
from compressor.models.structure.groups import Cut
from compressor.models.structure.surgery import TOLERANCE, commit
from compressor.models.structure.trace import evaluating, few_samples, run
from compressor.types import LayerFact

STAGE = "cofi"


def settle(
    student: nn.Module,
    plan: GatePlan,
    masks: Mapping[str, Tensor],
    example: Mapping[str, Tensor],
    detach: Callable[[nn.Module], None],
    sparsity: tuple[float, float],
) -> Committed:
    """Make ``student`` smaller, in place.

    ``masks`` are the settled values of each gate, ``detach`` folds them into the weights; ``sparsity``: expected and
    wanted, for the report.

    Raises:
        StageError: the smaller student does not compute what the masked one does.
    """
    wanted = _outputs(student, example)
    detach(student)
    folded = plain(student)
    units = [cut for gate in _kinds(plan, hidden=False) if (cut := _cut(plan, gate, masks)) is not None]
    hidden = [cut for gate in _kinds(plan, hidden=True) if (cut := _cut(plan, gate, masks)) is not None]
    narrow = commit(folded, units, example)
    made = commit(narrow.module, hidden, example, exact=False)
    refused = {**narrow.refused, **made.refused}
    silent = [gate for gate in plan.gates.values() if gate.kind == "layers" and _is_off(gate, masks)]
    steps: Steps = (*narrow.record, *made.record)
    steps += _silence(made.module, silent, example, wanted)
    smaller = plain(student)
    apply(smaller, steps)
    if not _agree(wanted, _outputs(smaller, example)):
        raise StageError(
            "the student cut by its learnt masks does not compute what the masked one does",
            hint='Leave `"hidden"` out of `cofi.masks`; if that helps, please report this model.',
        )
    apply(student, steps)
    return Committed(steps, tuple(_facts(plan, masks, refused, silent, sparsity)))


def _silence(module: nn.Module, gates: list[Gate], example: Mapping[str, Tensor], wanted: list[Tensor]) -> Steps:
    """Steps that take whole sublayers out, where the model's code runs without them."""
    steps: Steps = ()
    for gate in gates:
        step = {"op": "silence", "module": gate.reader}
        trial = copy.deepcopy(module)
        try:
            apply(trial, [step])
            same = _agree(wanted, _outputs(trial, example))
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
            same = False
        if same:
            steps += (step,)
            apply(module, [step])
    return steps


def _kinds(plan: GatePlan, *, hidden: bool) -> Iterator[Gate]:
    return (g for g in plan.gates.values() if g.kind != "layers" and (g.kind == "hidden") == hidden)


def _is_off(layer: Gate, masks: Mapping[str, Tensor]) -> bool:
    return not bool(masks[layer.name].any()) or not bool(masks[layer.group.name].any())


def _cut(plan: GatePlan, gate: Gate, masks: Mapping[str, Tensor]) -> Cut | None:
    """What stays of a group: the units with a mask above 0; one of a layer that goes, so that its code still runs."""
    layer = plan.gates.get(f"layer:{gate.name}")
    mask = masks[gate.name].numpy()
    keep = np.flatnonzero(mask > 0).astype(np.int64)
    if len(keep) == 0 or (layer is not None and _is_off(layer, masks)):
        keep = np.array([int(np.argmax(mask))], dtype=np.int64)
    return Cut(gate.group, keep) if len(keep) < gate.units else None


def plain(module: nn.Module) -> nn.Module:
    """A copy without hooks and replaced forwards, which belong to the original's training."""
    made = copy.deepcopy(module)
    for part in made.modules():
        part.__dict__.pop("forward", None)
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return made


def _outputs(module: nn.Module, example: Mapping[str, Tensor]) -> list[Tensor]:
    with evaluating(module):
        output = run(module, few_samples(example))
    leaves = tree_leaves(list(output.values()) if isinstance(output, Mapping) else output)
    return [leaf.clone() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _agree(wanted: list[Tensor], found: list[Tensor]) -> bool:
    return len(wanted) == len(found) and all(
        a.shape == b.shape and float((a - b).abs().max()) <= TOLERANCE * max(1.0, float(a.abs().max()))
        for a, b in zip(wanted, found, strict=True)
    )


def _facts(
    plan: GatePlan,
    masks: Mapping[str, Tensor],
    refused: Mapping[str, str],
    silent: list[Gate],
    sparsity: tuple[float, float],
) -> Iterator[LayerFact]:
    reason = f"learnt masks: {sparsity[0]:.1%} of the weights expected to go, {sparsity[1]:.1%} wanted"
    gone = {gate.group.name for gate in silent}
    for gate in plan.gates.values():
        if gate.kind == "layers":
            continue
        before, after = f"{gate.units * _rows(gate)} {gate.kind}", int((masks[gate.name] > 0).sum())
        for module in gate.group.modules:
            if gate.name in refused:
                yield LayerFact(STAGE, module, "kept", before, before, refused[gate.name])
            elif gate.name in gone:
                yield LayerFact(STAGE, module, "dropped", before, f"0 {gate.kind}", reason)
            else:
                action = "pruned" if after < gate.units else "kept"
                yield LayerFact(STAGE, module, action, before, f"{after * _rows(gate)} {gate.kind}", reason)
    for name, why in plan.notes.items():
        yield LayerFact(STAGE, name, "kept", "", "", why)


def _rows(gate: Gate) -> int:
    return 1 if gate.kind == "heads" else gate.group.width


__all__ = ["STAGE", "plain", "settle"]
