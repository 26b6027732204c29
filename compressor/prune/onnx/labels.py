"""Labels of ONNX tensors, in numpy: which elements of which constants live and die together.

The same idea as :mod:`compressor.models.structure.labels`, for a graph without a module: every index of every axis of a
constant gets a label, nodes carry labels to their outputs or join them, joined labels form one unit. The labels of a
tensor are *layers*: integer arrays of the tensor's rank with its size along the axes on which the label depends and 1
elsewhere, so that reshaping, splitting and transposing are done on labels by the operation that is done to data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from compressor.models.structure.groups import Index, Key


@dataclass
class Value:
    """Labels of one tensor. ``param``: a constant, or one that was only reshaped or transposed."""

    layers: list[Index] = field(default_factory=list)
    param: bool = False


@dataclass(frozen=True)
class Frozen:
    """Labels that must stay, and why; an empty reason is nothing a user would ask about (kernel taps)."""

    labels: Index
    reason: str


def axes_of(layer: Index) -> tuple[int, ...]:
    """Axes along which the labels change."""
    return tuple(axis for axis, size in enumerate(layer.shape) if size > 1)


def first_of(layer: Index, axis: int) -> Index:
    return layer[(slice(None),) * axis + (slice(0, 1),)]


def layer_along(value: Value, axis: int) -> Index | None:
    """The layer that varies along ``axis``, if one does."""
    return next((layer for layer in value.layers if layer.shape[axis] > 1), None)


class LabelSpace:
    """All labels of one graph, joined by union-find."""

    def __init__(self) -> None:
        self._parent: Index = np.zeros(1, dtype=np.int64)
        self.owners: list[tuple[Key, int, int]] = []  # key, first label, count
        self.frozen: list[Frozen] = []
        self.grids: list[Index] = []
        self.consumed: set[Key] = set()  # axes that read a unit (a weight's columns)
        self.produced: set[Key] = set()  # axes that make a unit (a weight's rows)

    @property
    def size(self) -> int:
        return len(self._parent)

    def allocate(self, count: int, key: Key) -> Index:
        """Fresh labels for one axis of a constant."""
        first = self.size
        fresh = np.arange(first, first + count, dtype=np.int64)
        self._parent = np.concatenate([self._parent, fresh])
        self.owners.append((key, first, count))
        return fresh.copy()

    def find(self, labels: Index) -> Index:
        """The representative of each label."""
        roots = self._parent[labels]
        while True:
            higher = self._parent[roots]
            if np.array_equal(higher, roots):
                return roots
            roots = higher

    def union(self, a: Index, b: Index) -> None:
        """Join labels pairwise; shapes broadcast."""
        left, right = np.broadcast_arrays(a, b)
        pairs = np.stack([self.find(left.reshape(-1)), self.find(right.reshape(-1))])
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

    def freeze(self, layer: Index, reason: str) -> None:
        self.frozen.append(Frozen(np.unique(layer), reason))

    def freeze_all(self, values: Iterable[Value], reason: str) -> None:
        for value in values:
            for layer in value.layers:
                self.freeze(layer, reason)

    def collapse(self, layer: Index) -> Index:
        """Shrink to size 1 every axis along which the units do not change."""
        roots = self.find(layer)
        for axis in axes_of(layer):
            if bool((roots == first_of(roots, axis)).all()):
                layer, roots = first_of(layer, axis), first_of(roots, axis)
        return np.ascontiguousarray(layer)

    def fix_axis(self, layer: Index, axis: int, reason: str) -> Index:
        """Keep the size of ``axis``: a unit then spans it wholly, or, when it is the only axis, nothing may go."""
        if layer.shape[axis] == 1:
            return layer
        if len(axes_of(layer)) > 1:
            self.union(first_of(layer, axis), layer)
            return first_of(layer, axis)
        self.freeze(layer, reason)
        return layer

    def merge(self, layers: Sequence[Index]) -> list[Index]:
        """Layers of one rank into layers with disjoint axes, joining labels where two speak about the same axis."""
        result: list[Index] = []
        for layer in layers:
            current = layer
            while axes_of(current):
                clash = next((other for other in result if set(axes_of(other)) & set(axes_of(current))), None)
                if clash is None:
                    result.append(current)
                    break
                result = [other for other in result if other is not clash]
                self.union(clash, current)
                shape = np.broadcast_shapes(clash.shape, current.shape)
                current = self.collapse(np.broadcast_to(clash, shape))
        return result

    def mark(self, layer: Index, kind: set[Key]) -> None:
        """Note the constants' axes that ``layer`` of a weight comes from."""
        wanted = np.unique(layer)
        for key, first, count in self.owners:
            start, stop = np.searchsorted(wanted, [first, first + count])
            if stop > start:
                kind.add(key)

    def settle_grids(self) -> None:
        """An axis viewed as a grid must stay a grid: units may vary along one of its axes only, the innermost."""
        changed = True
        while changed:
            changed = False
            for grid in self.grids:
                varying = axes_of(self.collapse(grid))
                if len(varying) > 1:
                    self.union(grid, first_of(grid, varying[0]))
                    changed = True
