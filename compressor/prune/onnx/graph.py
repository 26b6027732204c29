"""From joined labels to groups of units: what can be removed from an ONNX graph, what goes with it, and why not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from onnx import ModelProto

from compressor.models.structure.groups import Cut, Entries, Group, Index, Key, Kind, owner, removed_positions
from compressor.prune.onnx.labels import LabelSpace
from compressor.prune.onnx.trace import Trace, follow
from compressor.types import Array

CHANNEL_NODES = frozenset({"Conv", "ConvTranspose", "BatchNormalization", "InstanceNormalization"})


@dataclass(frozen=True)
class Structure:
    """The dependency graph of a prepared model."""

    trace: Trace
    groups: tuple[Group, ...]

    @property
    def operators(self) -> dict[str, str]:
        return {node.name: node.op_type for node in self.trace.model.graph.node}

    def constant(self, key: Key) -> str:
        """Name of the constant that a key stands for."""
        node, _, position = key.tensor.rpartition(".")
        return next(str(each.input[int(position)]) for each in self.trace.model.graph.node if each.name == node)

    def gone(self, cuts: list[Cut]) -> Index:
        """Roots of the labels that go with ``cuts``."""
        space, removed = self.trace.space, removed_positions(cuts)
        labels = [first + removed[key] for key, first, _ in space.owners if key in removed]
        return np.unique(space.find(np.concatenate(labels))) if labels else np.empty(0, dtype=np.int64)


def find_structure(model: ModelProto, example: Mapping[str, Array]) -> Structure:
    """All groups of a prepared ``model`` in the order of its nodes, those that must stay included.

    ``example`` are inputs by name; two samples of it are run. Raises :class:`StageError` when they do not run.
    """
    trace = follow(model, example)
    space = trace.space
    roots = space.find(np.arange(space.size, dtype=np.int64))
    reasons: dict[int, set[str]] = defaultdict(set)
    for frozen in space.frozen:
        for root in np.unique(roots[frozen.labels]).tolist():
            reasons[root].add(frozen.reason)
    operators = {node.name: node.op_type for node in model.graph.node}
    groups = []
    for entries, members in _group_roots(space, roots):
        produced = tuple(key for key in entries if key in space.produced)
        if not produced:
            continue
        merged: set[str] = set().union(*(reasons.get(root, set()) for root in members))
        hard = tuple(sorted(reason or "has a fixed size" for reason in merged))
        consumed = tuple(key for key in entries if key in space.consumed)
        if not consumed and not hard:
            hard = ("is read by no weight that could get smaller",)
        name = owner(produced[0].tensor)
        groups.append(Group(name, _kind(entries, operators), entries, produced, consumed, hard, ()))
    return Structure(trace, tuple(_unique_names(groups)))


def _group_roots(space: LabelSpace, roots: Index) -> list[tuple[Entries, list[int]]]:
    """Roots with the same axes and the same number of positions on each, with these positions.

    Roots that stay are kept apart from roots that go, so that one frozen unit does not hold a whole layer.
    """
    stays = set(np.unique(roots[np.concatenate([frozen.labels for frozen in space.frozen])]).tolist())
    places: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, (_, first, count) in enumerate(space.owners):
        for position, root in enumerate(roots[first : first + count].tolist()):
            places[root][number].append(position)
    classes: dict[tuple[tuple[tuple[int, int], ...], bool], list[int]] = defaultdict(list)
    for root, found in places.items():
        shape = tuple(sorted((number, len(positions)) for number, positions in found.items()))
        classes[(shape, root in stays)].append(root)
    grouped: list[tuple[Entries, list[int]]] = []
    for (signature, _), members in sorted(classes.items()):
        main = signature[0][0]
        members.sort(key=lambda root: places[root][main][0])
        entries = {
            space.owners[number][0]: np.array([places[root][number] for root in members], dtype=np.int64)
            for number, _ in signature
        }
        grouped.append((entries, members))
    return grouped


def _kind(entries: Entries, operators: Mapping[str, str]) -> Kind:
    return "channels" if any(operators[owner(key.tensor)] in CHANNEL_NODES for key in entries) else "neurons"


def _unique_names(groups: list[Group]) -> list[Group]:
    """Two groups can be made by one node (a fused projection that is split): the second gets a number."""
    seen: dict[str, int] = defaultdict(int)
    named = []
    for group in groups:
        seen[group.name] += 1
        named.append(group if seen[group.name] == 1 else replace(group, name=f"{group.name}#{seen[group.name]}"))
    return named
