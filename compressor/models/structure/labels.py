"""Which elements of which tensors live and die together.

Every index of every axis of every parameter gets a *label*. An operation of the network either carries labels to its
output (a convolution's outputs carry the labels of the rows of its weight) or says that two labels belong together (an
addition joins the labels of its two sides; a matrix product joins the columns of a weight with the channels it reads).
Labels that belong together form one *unit*: removing it removes all its elements in all tensors at once.

A value's labels are kept as a list of *layers*: integer tensors of the value's rank that have the value's size along
the axes on which the label depends and size 1 elsewhere. A (B, T, heads * size) activation has one layer (1, 1, heads *
size); viewed as (B, T, heads, size) the same layer becomes (1, 1, heads, size). Reshaping, splitting and transposing
are thus done on labels by the very operation that the network applies to data. Axes of different layers of one value
are disjoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from compressor.models.structure.groups import Index, Key


@dataclass
class Value:
    """Labels of one tensor.

    ``free`` axes were expanded from size 1: they take any size. ``param``: a weight or a view.
    """

    layers: list[Tensor] = field(default_factory=list)
    free: frozenset[int] = frozenset()
    param: bool = False


@dataclass(frozen=True)
class Frozen:
    """Labels that must stay. ``soft`` ones could go, but the result would not equal the masked network (layer norm)."""

    labels: Index
    reason: str  # empty: nothing a user would ask about (kernel taps, vocabulary, the model's own input)
    soft: bool


def axes_of(layer: Tensor) -> tuple[int, ...]:
    return tuple(axis for axis, size in enumerate(layer.shape) if size > 1)


class LabelSpace:
    """All labels of one network, joined by union-find."""

    def __init__(self) -> None:
        self._parent: Index = np.zeros(1, dtype=np.int64)
        self.owners: list[tuple[Key, int, int]] = []  # key, first label, count
        self.frozen: list[Frozen] = []
        self.grids: list[Tensor] = []
        self.consumed: set[Key] = set()  # axes that read a unit (a weight's columns)
        self.produced: set[Key] = set()  # axes that make a unit (a weight's rows)
        self.head_labels: list[Index] = []

    @property
    def size(self) -> int:
        return len(self._parent)

    def allocate(self, count: int, key: Key | None = None) -> Tensor:
        first = self.size
        fresh = np.arange(first, first + count, dtype=np.int64)
        self._parent = np.concatenate([self._parent, fresh])
        if key is not None:
            self.owners.append((key, first, count))
        return torch.from_numpy(fresh.copy())

    def find(self, labels: Index) -> Index:
        """The representative of each label."""
        roots = self._parent[labels]
        while True:
            higher = self._parent[roots]
            if np.array_equal(higher, roots):
                return roots
            roots = higher

    def union(self, a: Tensor, b: Tensor) -> None:
        """Join labels pairwise; shapes broadcast."""
        left, right = torch.broadcast_tensors(a, b)
        pairs = np.stack([self.find(left.reshape(-1).numpy()), self.find(right.reshape(-1).numpy())])
        pairs = np.unique(pairs[:, pairs[0] != pairs[1]], axis=1)
        for one, other in pairs.T:
            x, y = self._root(int(one)), self._root(int(other))
            if x != y:
                self._parent[max(x, y)] = min(x, y)

    def _root(self, label: int) -> int:
        parent = self._parent
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = int(parent[label])
        return label

    def freeze(self, layer: Tensor, reason: str, *, soft: bool = False) -> None:
        self.frozen.append(Frozen(np.unique(layer.numpy()), reason, soft))

    def freeze_all(self, values: Iterable[Value], reason: str) -> None:
        for value in values:
            for layer in value.layers:
                self.freeze(layer, reason)

    def collapse(self, layer: Tensor) -> Tensor:
        """Shrink to size 1 every axis along which the units do not change."""
        roots = torch.from_numpy(self.find(layer.numpy()))
        for axis in axes_of(layer):
            if bool((roots == roots.narrow(axis, 0, 1)).all()):
                layer, roots = layer.narrow(axis, 0, 1), roots.narrow(axis, 0, 1)
        return layer

    def fix_axis(self, layer: Tensor, axis: int, reason: str, *, soft: bool = False) -> Tensor:
        """Keep the size of ``axis``: a unit then spans it wholly, or, when it is the only axis, nothing may go."""
        if len(axes_of(layer)) > 1 and layer.shape[axis] > 1:
            first = layer.narrow(axis, 0, 1)
            self.union(first, layer)
            return first
        if layer.shape[axis] > 1:
            self.freeze(layer, reason, soft=soft)
        return layer

    def couple(self, layer: Tensor, axis: int, length: int) -> bool:
        """Join the i-th element of every run of ``length`` along ``axis``, so that equal parts stay equal in size."""
        size = layer.shape[axis]
        if size % length or len(axes_of(layer)) > 1:
            return False
        rows = layer.reshape(size // length, length)
        self.union(rows, rows[:1])
        return True

    def merge(self, layers: Sequence[Tensor]) -> list[Tensor]:
        """Layers of one rank into layers with disjoint axes, joining labels where two speak about the same axis."""
        result: list[Tensor] = []
        for layer in layers:
            current = layer
            while axes_of(current):
                clash = next((other for other in result if set(axes_of(other)) & set(axes_of(current))), None)
                if clash is None:
                    result.append(current)
                    break
                result = [other for other in result if other is not clash]
                self.union(clash, current)
                current = self.collapse(clash.expand(torch.broadcast_shapes(clash.shape, current.shape)))
        return result

    def mark(self, value: Value, layer: Tensor, kind: set[Key]) -> None:
        """Note the parameter axes that ``layer`` of a weight comes from."""
        if value.param:
            wanted = np.unique(layer.numpy())
            kind.update(
                key for key, first, count in self.owners if ((wanted >= first) & (wanted < first + count)).any()
            )

    def settle_grids(self) -> None:
        """An axis viewed as a grid must stay a grid: units may vary along one of its axes only, the innermost."""
        changed = True
        while changed:
            changed = False
            for grid in self.grids:
                varying = axes_of(self.collapse(grid))
                if len(varying) > 1:
                    self.union(grid, grid.narrow(varying[0], 0, 1))
                    changed = True


def layer_along(value: Value, axis: int) -> Tensor | None:
    """The layer that varies along ``axis``, if one does."""
    return next((layer for layer in value.layers if layer.shape[axis] > 1), None)


def replace(value: Value, old: Tensor, new: Tensor) -> None:
    value.layers = [new if layer is old else layer for layer in value.layers]
