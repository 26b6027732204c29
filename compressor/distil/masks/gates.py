"""Which units of a student get a mask, and what each mask multiplies: read off the dependency graph, no model's code.

A mask z of heads, neurons or channels multiplies the columns of the layers that read them; the mask of a layer
multiplies the rows and the bias of the layer that closes it; the mask of hidden dimensions multiplies all that writes
into the stream (rows, biases, norms, embeddings), while every norm counts only the dimensions that are there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, nn

from compressor.masks import CoFi
from compressor.models.signals import structure_of
from compressor.models.structure.groups import Group, Index, Key, owner, protected_by
from compressor.models.structure.units import find_groups

NORMS = (nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Gate:
    """A vector of masks: one for each unit of a group, or a single one for a whole layer of units."""

    name: str
    kind: str  # layers, heads, neurons, channels, hidden
    units: int
    group: Group
    block: int = -1  # position of the transformer block around it
    reader: str = ""  # layers: the linear layer that closes it


@dataclass(frozen=True)
class Use:
    """``tensor`` is multiplied along ``axis`` at ``index`` (units, width); a layer's gate multiplies all of it."""

    tensor: str
    gate: str
    axis: int
    index: Index


@dataclass(frozen=True)
class Counted:
    """A weight matrix in the count of what stays: elements, and (axis, gate, width per unit) of its masked axes."""

    tensor: str
    elements: int
    axes: tuple[tuple[int, str, int, int], ...]  # axis, gate, positions a unit, size of the axis
    layer: str = ""  # gate of the layer it belongs to


@dataclass(frozen=True)
class GatePlan:
    """All masks of a student."""

    gates: Mapping[str, Gate]
    uses: tuple[Use, ...]
    counted: tuple[Counted, ...]
    norms: Mapping[str, tuple[str, Index]]  # norm module -> gate of hidden dimensions, positions of its units
    notes: Mapping[str, str] = field(default_factory=dict)  # group -> why it has no mask
    blocks: int = 0

    @property
    def total(self) -> int:
        """Weights that are counted."""
        return sum(item.elements for item in self.counted)


def plan_gates(module: nn.Module, example: Mapping[str, Tensor], config: CoFi) -> GatePlan:
    """Masks for ``module`` as ``config`` asks; two samples of ``example`` are run."""
    groups, blocks = find_groups(module, example), [path for path, _ in structure_of(module).blocks]
    notes: dict[str, str] = {}
    gates: dict[str, Gate] = {}
    for group in groups:
        why = _why_not(module, group, config, blocks, groups)
        if why:
            notes[group.name] = why
            continue
        block = _block_of(group, blocks)
        gates[group.name] = Gate(group.name, group.kind, group.units, group, block)
        reader = _only_reader(module, group)
        if "layers" in config.masks and group.kind in ("heads", "neurons") and reader:
            name = f"layer:{group.name}"
            gates[name] = Gate(name, "layers", 1, group, block, reader)
    uses = tuple(use for gate in gates.values() for use in _uses(module, gate))
    norms = {
        owner(key.tensor): (gate.name, index)
        for gate in gates.values()
        if gate.kind == "hidden"
        for key, index in gate.group.index.items()
        if isinstance(module.get_submodule(owner(key.tensor)), NORMS) and key.tensor.endswith("weight")
    }
    return GatePlan(gates, uses, _counted(module, gates), norms, notes, len(blocks))


def _why_not(module: nn.Module, group: Group, config: CoFi, blocks: Sequence[str], groups: Sequence[Group]) -> str:
    """Why a group gets no mask; empty when it does."""
    if group.kind not in config.masks:
        return f"no masks were asked for {group.kind}"
    pattern = protected_by(group, config.protect)
    if pattern is not None:
        return f"protected by `{pattern}`"
    if group.hard:
        return "; ".join(group.hard)
    if group.kind == "hidden":
        return _why_not_hidden(module, group, groups)
    if group.kind != "channels" and _block_of(group, blocks) < 0:
        return "does not belong to a layer"
    if not [key for key in group.consumed if key not in group.produced and _is_weight(module, key)]:
        return "nothing reads it through a weight"
    return ""


def _why_not_hidden(module: nn.Module, group: Group, groups: Sequence[Group]) -> str:
    if group.units < max(other.units for other in groups if other.kind == "hidden"):
        return "not the model's hidden width"
    holders = {owner(key.tensor) for key in group.index}
    uses = Counter(id(own) for part in module.modules() for own in part.parameters(recurse=False))
    if any(uses[id(_tensor(module, key.tensor))] > 1 for key in group.index):
        return "a weight of it is used twice (tied)"
    odd = [name for name in holders if "norm" in type(module.get_submodule(name)).__name__.lower()]
    if any(not isinstance(module.get_submodule(name), NORMS) for name in odd):
        return "is normalised by something else than LayerNorm or RMSNorm"
    return ""


def _block_of(group: Group, blocks: Sequence[str]) -> int:
    return next((n for n, path in enumerate(blocks) if group.name.startswith(f"{path}.")), -1)


def _is_weight(module: nn.Module, key: Key) -> bool:
    return bool(_tensor(module, key.tensor).dim() >= 2)


def _tensor(module: nn.Module, name: str) -> Tensor:
    path, _, local = name.rpartition(".")
    return getattr(module.get_submodule(path), local)  # type: ignore[no-any-return]


def _only_reader(module: nn.Module, group: Group) -> str:
    """The one linear layer that reads a group's units, so that the layer of units ends with it; empty otherwise."""
    readers = {owner(key.tensor) for key in group.consumed}
    if len(readers) != 1:
        return ""
    name = readers.pop()
    layer = module.get_submodule(name)
    linear = isinstance(layer, nn.Linear) or (hasattr(layer, "nx") and hasattr(layer, "nf"))
    return name if linear else ""


def _uses(module: nn.Module, gate: Gate) -> Iterable[Use]:
    group = gate.group
    if gate.kind == "layers":
        layer = module.get_submodule(gate.reader)
        nothing = np.empty((0, 0), dtype=np.int64)
        yield Use(f"{gate.reader}.weight", gate.name, -1, nothing)
        if getattr(layer, "bias", None) is not None:
            yield Use(f"{gate.reader}.bias", gate.name, -1, nothing)
        return
    for key, index in group.index.items():
        reads = key in group.consumed and key not in group.produced and _is_weight(module, key)
        if reads != (gate.kind == "hidden") and isinstance(_tensor(module, key.tensor), nn.Parameter):
            yield Use(key.tensor, gate.name, key.axis, index)


def _counted(module: nn.Module, gates: Mapping[str, Gate]) -> tuple[Counted, ...]:
    """Every weight that masks of heads, neurons or channels make smaller, embeddings never."""
    axes: dict[str, list[tuple[int, str, int, int]]] = {}
    inner: dict[str, str] = {}
    for gate in gates.values():
        if gate.kind == "layers":
            continue
        for key, index in gate.group.index.items():
            tensor = _tensor(module, key.tensor)
            if tensor.dim() < 2 or not isinstance(tensor, nn.Parameter):
                continue
            axes.setdefault(key.tensor, []).append((key.axis, gate.name, index.shape[1], tensor.shape[key.axis]))
            if gate.kind != "hidden":
                inner[key.tensor] = f"layer:{gate.name}" if f"layer:{gate.name}" in gates else ""
    return tuple(
        Counted(name, _tensor(module, name).numel(), tuple(axes[name]), layer) for name, layer in inner.items()
    )
