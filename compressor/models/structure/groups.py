"""What a dependency graph yields, whichever graph it was found on: groups of units, cuts and scores. No torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np
import numpy.typing as npt

Index = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Kind = Literal["channels", "heads", "neurons", "hidden"]
Method = Literal["magnitude", "activation", "activation-weight", "taylor", "relevance", "random"]


@dataclass(frozen=True)
class Key:
    """One axis of one parameter or buffer, by its dotted name (in an ONNX graph: node name, dot, input number)."""

    tensor: str
    axis: int


Entries = Mapping[Key, Index]


@dataclass(frozen=True)
class Group:
    """Units of one sort that live on the same tensor axes: the channels of a convolution, the heads of a layer.

    ``index[key]`` is (units, width): which positions of that axis each unit owns. ``hard`` and ``soft`` say why the
    group cannot be cut: a hard reason never allows it, a soft one only when the network may change (a narrower
    student).
    """

    name: str  # the layer that makes the units
    kind: Kind
    index: Entries
    produced: tuple[Key, ...]
    consumed: tuple[Key, ...]
    hard: tuple[str, ...]
    soft: tuple[str, ...]

    @property
    def units(self) -> int:
        return int(self.index[self.main].shape[0])

    @property
    def main(self) -> Key:
        return self.produced[0]

    @property
    def width(self) -> int:
        """Channels (rows of the main weight) per unit."""
        return int(self.index[self.main].shape[1])

    @property
    def modules(self) -> tuple[str, ...]:
        """The layers that make the units: those whose output gets smaller."""
        return tuple(dict.fromkeys(owner(key.tensor) for key in self.produced))

    @property
    def all_modules(self) -> frozenset[str]:
        """Every layer that makes units or normalises and scales them; not those that only read them."""
        return frozenset(owner(key.tensor) for key in self.index if key not in self.consumed or key in self.produced)


@dataclass(frozen=True)
class Cut:
    """Which units of a group stay, in order."""

    group: Group
    keep: Index

    @property
    def removed(self) -> Index:
        return np.setdiff1d(np.arange(self.group.units, dtype=np.int64), self.keep)


@dataclass(frozen=True)
class Scores:
    """``units[group]``: importance of each unit. ``means[key]``: mean input at each position of an axis.

    Scores have mean 1 in every group, except that those of ``taylor`` have L2 norm 1 (Molchanov et al. 2017) and those
    of ``relevance`` are as they were found: relevance is conserved from layer to layer, so that it can be compared.
    """

    method: Method
    units: Mapping[str, Floats]
    means: Mapping[Key, Floats] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)  # group -> why another method was used for it
    samples: int = 0


def owner(tensor: str) -> str:
    """Name of the module that holds a parameter."""
    return tensor.rpartition(".")[0]


def normalised(values: Floats) -> Floats:
    """Scores with mean 1, so that groups of different layers can be ranked together."""
    mean = float(values.mean())
    return values / mean if mean > 0 else np.ones_like(values)


def removed_positions(cuts: Iterable[Cut]) -> dict[Key, Index]:
    """Positions that go, on each tensor axis that some cut touches."""
    gone: dict[Key, list[Index]] = defaultdict(list)
    for cut in cuts:
        for key, index in cut.group.index.items():
            gone[key].append(index[cut.removed].reshape(-1))
    return {key: np.unique(np.concatenate(parts)) for key, parts in gone.items()}


def protected_by(group: Group, patterns: Sequence[str]) -> str | None:
    """The first pattern that names one of the group's layers or a module around it."""
    names = {name for module in group.all_modules for name in _with_parents(module)}
    return next((pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in names)), None)


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
