"""Cutting units out: the masked twin, the record of the cut, and the committed module, checked against its twin."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from compressor.models.rebuild import ranges_of, replay
from compressor.models.structure.groups import Cut, Group, owner, removed_positions
from compressor.models.structure.trace import evaluating, few_samples, run

TOLERANCE = 1e-4  # of the largest output (at least 1): committed against masked, in fp32
FORWARD_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError, AttributeError)


@dataclass(frozen=True)
class Committed:
    """A module with really smaller tensors, its masked twin, the steps that made it, and what could not be cut."""

    module: nn.Module
    masked: nn.Module
    record: list[dict[str, Any]]
    refused: Mapping[str, str]  # group name -> why


def commit(module: nn.Module, cuts: Sequence[Cut], example: Mapping[str, Tensor], *, exact: bool = True) -> Committed:
    """Cut a copy of ``module``. With ``exact`` the result must compute what the masked module computes, to 1e-4.

    A group whose cut breaks the module's own code (a literal size in a ``view``, say) is left whole and named in
    ``refused``. Size attributes are changed by their meaning (the heads of an attention block); only where that does
    not work, by their value.
    """
    cuts = [cut for cut in cuts if len(cut.keep) < cut.group.units]
    made = _attempt(module, cuts, frozenset(), example, exact)
    if not isinstance(made, str):
        return Committed(made[0], mask(module, cuts), made[1], {})
    accepted, refused, by_value = list[Cut](), dict[str, str](), frozenset[str]()
    made = copy.deepcopy(module), []
    for cut in cuts:
        for values in (by_value, by_value | {cut.group.name}):
            tried = _attempt(module, [*accepted, cut], values, example, exact)
            if not isinstance(tried, str):
                made, by_value = tried, values
                accepted.append(cut)
                break
            refused.setdefault(cut.group.name, tried)
    refused = {name: why for name, why in refused.items() if name not in {cut.group.name for cut in accepted}}
    return Committed(made[0], mask(module, accepted), made[1], refused)


def _attempt(
    module: nn.Module, cuts: Sequence[Cut], by_value: frozenset[str], example: Mapping[str, Tensor], exact: bool
) -> tuple[nn.Module, list[dict[str, Any]]] | str:
    """The committed module and its steps, or what is wrong with it."""
    steps = record_of(module, cuts, by_value)
    try:
        student = replay(module, steps)
        found = outputs_of(student, example)
    except FORWARD_ERRORS as error:
        return f"its forward fails on the smaller layer ({type(error).__name__}: {error})".split("\n")[0]
    if exact and not agree(outputs_of(mask(module, cuts), example), found):
        return "the smaller layer does not compute what the masked one does"
    return student, steps


def outputs_of(module: nn.Module, example: Mapping[str, Tensor]) -> list[Tensor]:
    with evaluating(module):
        output = run(module, few_samples(example))
    output = list(output.values()) if isinstance(output, Mapping) else output
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def agree(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    return len(wanted) == len(found) and all(
        a.shape == b.shape and float((a - b).abs().max()) <= TOLERANCE * max(1.0, float(a.abs().max()))
        for a, b in zip(wanted, found, strict=True)
    )


def mask(module: nn.Module, cuts: Sequence[Cut]) -> nn.Module:
    """A copy of ``module`` with all its sizes, in which every element of the removed units is zero."""
    masked = copy.deepcopy(module)
    with torch.no_grad():
        for key, gone in removed_positions(cuts).items():
            _tensor(masked, key.tensor).index_fill_(key.axis, torch.from_numpy(gone), 0.0)
    return masked


def _tensor(module: nn.Module, name: str) -> Tensor:
    path, _, local = name.rpartition(".")
    return getattr(module.get_submodule(path), local)  # type: ignore[no-any-return]


def record_of(module: nn.Module, cuts: Sequence[Cut], by_value: frozenset[str] = frozenset()) -> list[dict[str, Any]]:
    """The steps for :func:`compressor.models.rebuild.replay`. ``by_value`` names groups (see :func:`commit`)."""
    steps: list[dict[str, Any]] = []
    for key, gone in removed_positions(cuts).items():
        size = _tensor(module, key.tensor).shape[key.axis]
        kept = np.setdiff1d(np.arange(size), gone)
        steps.append({"op": "cut", "tensor": key.tensor, "axis": key.axis, "keep": ranges_of(kept.tolist())})
    changed: dict[tuple[str, str], Any] = {}
    for cut in cuts:
        for holder in _holders(cut.group):
            for attribute, value in list(vars(module.get_submodule(holder)).items()):
                new = _new_value(cut, attribute, value, cut.group.name in by_value)
                if new is not None:
                    changed[(holder, attribute)] = new
    return steps + [
        {"op": "set", "module": holder, "attribute": attribute, "value": value}
        for (holder, attribute), value in changed.items()
    ]


def _holders(group: Group) -> list[str]:
    """Modules whose code may read the group's size: the parents of its layers."""
    return sorted({owner(owner(key.tensor)) for key in group.index})


def _new_value(cut: Cut, attribute: str, value: Any, by_value: bool) -> Any:
    """What a size attribute becomes, or None when it is not one of this group's sizes."""
    old = {int(index.size): len(cut.keep) * index.shape[1] for index in cut.group.index.values()}
    if isinstance(value, list | tuple) and by_value and any(_is_size(item, old) for item in value):
        return [old.get(item, item) if _is_size(item, old) else item for item in value]
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    name = attribute.lower()
    if value in old and (by_value or (cut.group.kind == "heads" and "head" in name)):
        return old[value]
    counts = cut.group.kind == "heads" and "head" in name and "dim" not in name and "size" not in name
    if counts and value % cut.group.units == 0:
        return value // cut.group.units * len(cut.keep)
    return None


def _is_size(item: Any, sizes: Mapping[int, int]) -> bool:
    return isinstance(item, int) and not isinstance(item, bool) and item in sizes
