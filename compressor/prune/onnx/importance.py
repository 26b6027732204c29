"""Importance of units in an ONNX graph: magnitude of constants, activations (forward only), random as the control."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from onnx import ModelProto, NodeProto

from compressor.models.structure.groups import Floats, Group, Index, Key, Method, Scores, normalised, owner
from compressor.prune.onnx.graph import Structure
from compressor.prune.onnx.runtime import Watcher, batches_of
from compressor.types import Array

Batches = Iterable[Mapping[str, Array]]
CONVOLUTIONS = ("Conv", "ConvTranspose")


def score(structure: Structure, groups: Sequence[Group], method: Method, calibration: Batches, seed: int = 0) -> Scores:
    """Score every unit of ``groups``, mean 1 in every group. ``calibration`` is read once; it also gives the mean input
    of every reading node, for bias compensation. Without samples activation importance falls back to magnitude."""
    statistics = ActivationStatistics(structure, groups)
    statistics.observe(calibration)
    generator = np.random.default_rng(seed)
    units: dict[str, Floats] = {}
    notes: dict[str, str] = {}
    for group in groups:
        if method == "random":
            units[group.name] = normalised(generator.random(group.units))
            continue
        found = statistics.importance(group) if method == "activation" else None
        if found is None and method == "activation":
            notes[group.name] = "magnitude: its activations could not be watched"
        units[group.name] = found if found is not None else magnitude(structure, group)
    return Scores(method, units, statistics.means(), notes, statistics.samples)


def magnitude(structure: Structure, group: Group) -> Floats:
    """L2 norm over everything a unit owns; each weight counts relative to its own mean, so that no node dominates."""
    total = np.zeros(group.units)
    for key, index in group.index.items():
        array = structure.trace.arrays[structure.constant(key)].astype(np.float64)
        if sum(size > 1 for size in array.shape) < 2 and array.ndim < 3:
            continue
        squares = np.square(array).sum(axis=tuple(axis for axis in range(array.ndim) if axis != key.axis))
        total += normalised(squares[index].sum(axis=1))
    return normalised(np.sqrt(total))


class Point:
    """The input of one reading node: for each group that it reads, the positions of its units."""

    def __init__(self, node: NodeProto, key: Key, shape: tuple[int, ...], groups: Sequence[Group]) -> None:
        self.key = key
        self.tensor = node.input[0]
        self.axis = 1 if node.op_type in CONVOLUTIONS else len(shape) - 1
        channels = shape[self.axis]
        self.index = {group.name: _fold(group.index[key], node, channels) for group in groups}
        self.squares = {group.name: np.zeros(group.units) for group in groups}
        self.sum = np.zeros(channels)
        self.count = 0
        self.floats_per_sample = math.prod(shape) // max(1, shape[0])

    def add(self, data: Array) -> None:
        """Mean of |a| over positions, then squares summed over samples (Minitron, methods U1)."""
        values = np.moveaxis(data, self.axis, -1).reshape(data.shape[0], -1, data.shape[self.axis])
        sizes = np.abs(values).mean(axis=1, dtype=np.float64)
        for name, index in self.index.items():
            self.squares[name] += np.square(sizes[:, index].mean(axis=2)).sum(axis=0)
        self.sum += values.sum(axis=(0, 1), dtype=np.float64)
        self.count += values.shape[0] * values.shape[1]


def _fold(index: Index, node: NodeProto, channels: int) -> Index:
    """Positions of a grouped convolution's weight stand for one channel in each of its groups."""
    groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
    if node.op_type != "Conv" or groups == 1:
        return index
    offsets = np.arange(groups) * (channels // groups)
    folded: Index = (index[:, :, None] + offsets).reshape(index.shape[0], -1).astype(np.int64)
    return folded


class ActivationStatistics:
    """Streaming statistics of what reading nodes see. What is held does not depend on the number of samples."""

    def __init__(self, structure: Structure, groups: Sequence[Group]) -> None:
        self._model: ModelProto = structure.trace.model
        nodes = {node.name: node for node in self._model.graph.node}
        readers: dict[Key, list[Group]] = {}
        for group in groups:
            for key in group.consumed:
                node = nodes[owner(key.tensor)]
                if node.op_type in (*CONVOLUTIONS, "Gemm", "MatMul") and key.tensor.endswith(".1"):
                    readers.setdefault(key, []).append(group)
        self._points = [
            Point(nodes[owner(key.tensor)], key, structure.trace.shapes[nodes[owner(key.tensor)].input[0]], read)
            for key, read in readers.items()
        ]
        self.samples = 0

    @property
    def floats_held(self) -> int:
        return sum(point.sum.size + sum(each.size for each in point.squares.values()) for point in self._points)

    def observe(self, batches: Batches) -> None:
        """Run ``batches`` in pieces and add what they show."""
        watch = {point.tensor: point.floats_per_sample for point in self._points}
        session: Watcher | None = None
        for batch in batches:
            session = session or Watcher(self._model, list(watch))
            for piece in batches_of(self._model, batch, sum(watch.values())):
                found = session.run(piece) | piece
                self.samples += len(next(iter(piece.values())))
                for point in self._points:
                    point.add(found[point.tensor])

    def importance(self, group: Group) -> Floats | None:
        """Mean over the nodes that read the group of its normalised activation norm; None when none was seen."""
        seen = [normalised(np.sqrt(p.squares[group.name])) for p in self._points if group.name in p.index and p.count]
        return normalised(np.mean(seen, axis=0)) if seen else None

    def means(self) -> dict[Key, Floats]:
        """Mean input of each reading node, by channel."""
        return {point.key: point.sum / point.count for point in self._points if point.count}
