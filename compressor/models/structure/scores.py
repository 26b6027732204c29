"""Importance of units: weight magnitude, activation (forward only), Taylor and relevance (backward too), random.

One interface: a :class:`Scores` value holds one number per unit and group, scaled as the method's source says, so that
groups of different layers can be ranked together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor.models.structure.groups import Floats, Group, Index, Key, Method, Scores, normalised, owner
from compressor.models.structure.trace import evaluating, run


def score(
    module: nn.Module,
    groups: Sequence[Group],
    method: Method,
    calibration: Iterable[Mapping[str, Tensor]] = (),
    seed: int = 0,
) -> Scores:
    """Score every unit of ``groups``. ``calibration`` is read once, batch by batch (twice for taylor and relevance);
    magnitude and random do not need it.

    Where activations cannot be watched (a weight used by hand instead of by a layer) magnitude stands in, with a note.
    """
    statistics = ActivationStatistics(module, groups)
    statistics.observe(calibration)
    observed = _backward(module, groups, method, calibration, seed) if method in BACKWARD else statistics
    generator = np.random.default_rng(seed)
    units: dict[str, Floats] = {}
    notes: dict[str, str] = {}
    for group in groups:
        if method == "random":
            units[group.name] = normalised(generator.random(group.units))
            continue
        found = observed.importance(group) if method in (*BACKWARD, *FORWARD) else None
        if found is not None and method == "activation-weight":
            found = statistics.weighted_importance(group)
        if found is None and method != "magnitude":
            notes[group.name] = "magnitude: its activations could not be watched"
        units[group.name] = found if found is not None else magnitude(module, group)
    return Scores(method, _scaled(units, method, notes), statistics.means(), notes, statistics.samples)


FORWARD: tuple[Method, ...] = ("activation", "activation-weight")
BACKWARD: tuple[Method, ...] = ("taylor", "relevance")


def _scaled(units: Mapping[str, Floats], method: Method, notes: Mapping[str, str]) -> dict[str, Floats]:
    """Scores that can be ranked together: L2 norm 1 for taylor (its source), relevance as it is, otherwise mean 1."""
    found = {name: values for name, values in units.items() if name not in notes}
    if method == "taylor":
        found = {name: values / max(float(np.linalg.norm(values)), 1e-30) for name, values in found.items()}
    usual = float(np.mean([values.mean() for values in found.values()])) if found else 1.0
    return {name: found[name] if name in found else values * usual for name, values in units.items()}


def _backward(
    module: nn.Module, groups: Sequence[Group], method: Method, calibration: Iterable[Mapping[str, Tensor]], seed: int
) -> Any:
    from compressor.models.structure.relevance import RelevanceStatistics
    from compressor.models.structure.taylor import TaylorStatistics

    made = (TaylorStatistics if method == "taylor" else RelevanceStatistics)(module, groups, seed)
    made.observe(calibration)
    return made


def magnitude(module: nn.Module, group: Group) -> Floats:
    """L2 norm over everything a unit owns; each weight counts relative to its own mean, so that no layer dominates."""
    total = np.zeros(group.units)
    for key, index in group.index.items():
        path, _, local = key.tensor.rpartition(".")
        tensor = getattr(module.get_submodule(path), local).detach()
        if tensor.dim() < 2:
            continue
        squares = tensor.double().pow(2).sum(dim=[axis for axis in range(tensor.dim()) if axis != key.axis]).numpy()
        total += normalised(squares[index].sum(axis=1))
    return normalised(np.sqrt(total))


def _reading_norm(module: nn.Module, group: Group, key: Key) -> Floats:
    """L2 norm, per unit, of the weights that read it at one place."""
    path, _, local = key.tensor.rpartition(".")
    weight = getattr(module.get_submodule(path), local).detach().double()
    squares = weight.pow(2).sum(dim=[axis for axis in range(weight.dim()) if axis != key.axis]).numpy()
    norms: Floats = np.sqrt(squares[group.index[key]].sum(axis=1))
    return norms


@dataclass
class Point:
    """One place where a group's activations are watched: the input of a reading layer or the output of a norm."""

    group: Group
    key: Key
    squares: Floats  # per unit: sum over samples of (mean over positions of |activation|) squared


class ActivationStatistics:
    """Streaming activation statistics (Minitron, methods U1): mean of |a| over positions, then L2 over samples.

    For a head ``|a|`` is the L2 norm of the head's output. Padding is left out where the batch has an
    ``attention_mask``. What is held does not depend on the number of samples (``floats_held``).
    """

    def __init__(self, module: nn.Module, groups: Sequence[Group]) -> None:
        self._module = module
        self._points: dict[str, list[Point]] = {}
        self._sums: dict[str, Floats] = {}
        self._weights: dict[str, float] = {}
        self._keys: dict[str, Key] = {}
        self._mask: Tensor | None = None
        self.samples = 0
        for group in groups:
            for key in _watched_keys(module, group):
                self._points.setdefault(owner(key.tensor), []).append(Point(group, key, np.zeros(group.units)))

    @property
    def floats_held(self) -> int:
        points = sum(point.squares.size for points in self._points.values() for point in points)
        return points + sum(total.size for total in self._sums.values()) + len(self._weights)

    def observe(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Run ``batches`` and add what they show."""
        handles = [self._watch(name) for name in self._points]
        try:
            with evaluating(self._module):
                for batch in batches:
                    self._mask = batch.get("attention_mask")
                    self.samples += int(next(iter(batch.values())).shape[0])
                    run(self._module, batch)
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, name: str) -> Any:
        layer = self._module.get_submodule(name)
        if _is_norm(layer):
            return layer.register_forward_hook(lambda *call: self._add(name, layer, call[2]))
        return layer.register_forward_pre_hook(lambda *call: self._add(name, layer, call[1][0]))

    def _add(self, name: str, layer: nn.Module, data: Tensor) -> None:
        values = _channels_last(layer, data.detach())
        weight = self._position_weights(values)
        for point in self._points[name]:
            index = _fold(layer, point.group.index[point.key], values.shape[-1])
            chosen = values[..., torch.from_numpy(index.reshape(-1))].reshape(*values.shape[:2], *index.shape)
            size = chosen.abs().squeeze(-1) if index.shape[1] == 1 else chosen.norm(dim=-1)
            per_sample = (size * weight[..., None]).sum(dim=1) / weight.sum(dim=1, keepdim=True).clamp_min(1)
            point.squares += per_sample.double().pow(2).sum(dim=0).numpy()
            self._keys[name] = point.key
        total = (values * weight[..., None]).sum(dim=(0, 1)).double().numpy()
        self._sums[name] = self._sums.get(name, np.zeros_like(total)) + total
        self._weights[name] = self._weights.get(name, 0.0) + float(weight.sum())

    def _position_weights(self, values: Tensor) -> Tensor:
        """(samples, positions): 1, or 0 for padding."""
        if self._mask is not None and self._mask.shape == values.shape[:2]:
            return self._mask.to(values.dtype)
        return torch.ones(values.shape[:2])

    def importance(self, group: Group) -> Floats | None:
        """Mean over the places that read the group of its normalised activation norm; None when none was seen."""
        seen = [
            normalised(np.sqrt(point.squares))
            for points in self._points.values()
            for point in points
            if point.group is group and self._weights.get(owner(point.key.tensor), 0)
        ]
        return normalised(np.mean(seen, axis=0)) if seen else None

    def weighted_importance(self, group: Group) -> Floats | None:
        """:meth:`importance` with each place's activation times the L2 norm of the weights that read the unit.

        What Wanda (Sun et al. 2024) does for single weights; in the pilot of methods U1 better than activations alone.
        """
        seen = []
        for points in self._points.values():
            for point in points:
                if point.group is group and self._weights.get(owner(point.key.tensor), 0):
                    values = np.sqrt(point.squares)
                    if not _is_norm(self._module.get_submodule(owner(point.key.tensor))):
                        values = values * _reading_norm(self._module, group, point.key)
                    seen.append(normalised(values))
        return normalised(np.mean(seen, axis=0)) if seen else None

    def means(self) -> dict[Key, Floats]:
        """Mean input of each reading layer, by position of its weight's reading axis."""
        found = {}
        for name, total in self._sums.items():
            if not _is_norm(self._module.get_submodule(name)):
                found[self._keys[name]] = total / max(self._weights[name], 1.0)
        return found


def _is_norm(layer: nn.Module) -> bool:
    return isinstance(layer, nn.LayerNorm | nn.RMSNorm) or type(layer).__name__.endswith("RMSNorm")


def _is_reader(layer: nn.Module) -> bool:
    linear = isinstance(layer, nn.Linear) or (hasattr(layer, "nx") and hasattr(layer, "nf"))
    return linear or isinstance(layer, nn.modules.conv._ConvNd)


def _watched_keys(module: nn.Module, group: Group) -> list[Key]:
    """Norms that the units pass through (hidden width, as in U1), otherwise the layers that read them."""

    def layer_of(key: Key) -> nn.Module:
        return module.get_submodule(owner(key.tensor))

    norms = [key for key in group.index if key.tensor.endswith("weight") and _is_norm(layer_of(key))]
    return norms or [key for key in group.consumed if _is_reader(layer_of(key))]


def _channels_last(layer: nn.Module, data: Tensor) -> Tensor:
    """(samples, positions, channels)."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        data = data.movedim(1, -1)
    return data.reshape(data.shape[0], -1, data.shape[-1])


def _fold(layer: nn.Module, index: Index, channels: int) -> Index:
    """Positions of a grouped convolution's weight stand for one channel in each of its groups."""
    groups = getattr(layer, "groups", 1)
    if groups == 1 or getattr(layer, "transposed", False) or index.max() >= channels // groups:
        return index
    offsets = np.arange(groups) * (channels // groups)
    folded: Index = (index[:, :, None] + offsets).reshape(index.shape[0], -1).astype(np.int64)
    return folded
