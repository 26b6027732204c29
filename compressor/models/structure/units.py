"""From joined labels to groups of units: what can be removed, what goes with it, and why the rest must stay."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np
from torch import Tensor, nn

from compressor.models.structure.groups import Entries, Group, Index, Key, Kind, owner
from compressor.models.structure.labels import LabelSpace
from compressor.models.structure.trace import record


def find_groups(module: nn.Module, example: Mapping[str, Tensor]) -> tuple[Group, ...]:
    """All groups of ``module`` in the order of its parameters, those that must stay included.

    ``example`` are the module's inputs by name; two samples of it are run.
    """
    space = record(module, example)
    roots = space.find(np.arange(space.size, dtype=np.int64))
    grouped = _group_roots(space, roots)
    hard, soft = _reasons(space, roots)
    heads = set(space.find(np.unique(np.concatenate(space.head_labels))).tolist()) if space.head_labels else set()
    groups = []
    for entries, members in grouped:
        produced = tuple(key for key in entries if key in space.produced)
        if not produced:
            continue
        causes = _merge_reasons(hard, members), _merge_reasons(soft, members)
        kind = _kind(module, entries, bool(heads.intersection(members)), bool(causes[1]))
        if kind == "heads" and any(_is_builtin_attention(module, key) for key in entries):
            causes = (*causes[0], "belongs to nn.MultiheadAttention, which ties its heads to its width"), causes[1]
        consumed = tuple(key for key in entries if key in space.consumed)
        groups.append(Group(owner(produced[0].tensor), kind, entries, produced, consumed, *causes))
    return tuple(_unique_names(groups))


def _group_roots(space: LabelSpace, roots: Index) -> list[tuple[dict[Key, Index], list[int]]]:
    """Roots with the same axes and the same number of positions on each, with these positions."""
    places: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, (_, first, count) in enumerate(space.owners):
        for position, root in enumerate(roots[first : first + count].tolist()):
            places[root][number].append(position)
    classes: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
    for root, found in places.items():
        classes[tuple(sorted((number, len(positions)) for number, positions in found.items()))].append(root)
    grouped = []
    for signature, members in sorted(classes.items()):
        main = signature[0][0]
        members.sort(key=lambda root: places[root][main][0])
        entries = {
            space.owners[number][0]: np.array([places[root][number] for root in members], dtype=np.int64)
            for number, _ in signature
        }
        grouped.append((entries, members))
    return grouped


def _reasons(space: LabelSpace, roots: Index) -> tuple[dict[int, set[str]], dict[int, set[str]]]:
    hard: dict[int, set[str]] = defaultdict(set)
    soft: dict[int, set[str]] = defaultdict(set)
    for frozen in space.frozen:
        target = soft if frozen.soft else hard
        for root in np.unique(roots[frozen.labels]).tolist():
            target[root].add(frozen.reason)
    return hard, soft


def _merge_reasons(reasons: Mapping[int, set[str]], members: Iterable[int]) -> tuple[str, ...]:
    merged: set[str] = set().union(*(reasons.get(root, set()) for root in members))
    return tuple(sorted(reason or "has a fixed size" for reason in merged))


def _kind(module: nn.Module, entries: Entries, heads: bool, soft: bool) -> Kind:
    if heads:
        return "heads"
    if soft:
        return "hidden"
    convolutional = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
    if any(isinstance(module.get_submodule(owner(key.tensor)), convolutional) for key in entries):
        return "channels"
    return "neurons"


def _is_builtin_attention(module: nn.Module, key: Key) -> bool:
    return isinstance(module.get_submodule(owner(key.tensor)), nn.MultiheadAttention)


def _unique_names(groups: list[Group]) -> Iterable[Group]:
    """Two groups can be made by one layer (a fused projection): the second gets a number."""
    from dataclasses import replace

    seen: dict[str, int] = defaultdict(int)
    for group in groups:
        seen[group.name] += 1
        yield group if seen[group.name] == 1 else replace(group, name=f"{group.name}#{seen[group.name]}")
