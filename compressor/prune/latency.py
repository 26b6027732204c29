"""Widths by what they cost: greedy removal of the least important step per unit of time until a speed-up is reached.

The cost is a table over layer shapes. Where the target is this machine a callable measures it (``Cost``); otherwise it
is the number of multiply-accumulates, and widths are multiples of what the profile says its kernels work on. Only
layers with weights are in the table; what lies between them (softmax, norms, products of attention) is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from compressor.errors import Problem, StageError
from compressor.models.shapes import LayerShape, axis_of, layer_shapes
from compressor.models.structure.groups import Floats, Group, Scores, owner
from compressor.recipe import PruneStage

if TYPE_CHECKING:
    from torch import Tensor, nn

STEPS = 16  # steps per group at most: the table stays small, and a step is worth a measurement
FLOOR = 0.1  # of a group's units always stay, as for the scope `global`


Cost = Callable[[LayerShape], float]


def macs_of(shape: LayerShape) -> float:
    """The cost where nothing can be measured."""
    return float(shape.macs)


class CostTable:
    """What the network costs while units are taken out of groups, and what it would cost with some more gone."""

    def __init__(
        self, module: nn.Module, example: Mapping[str, Tensor], groups: Sequence[Group], cost: Cost | None = None
    ) -> None:
        self.units = {group.name: group.units for group in groups}
        self._cost = cost or macs_of
        self._known: dict[LayerShape, float] = {}
        self._whole = layer_shapes(module, example)
        self._axes: dict[str, list[tuple[Group, int, int]]] = {}  # layer -> groups on its outputs (0) or inputs (1)
        for group in groups:
            for key, index in group.index.items():
                name = owner(key.tensor)
                if name in self._whole and key.tensor.endswith(".weight"):
                    axis = axis_of(module.get_submodule(name), key.axis)
                    self._axes.setdefault(name, []).append((group, axis, int(index.shape[1])))
        self.fixed = sum(self._price(shape) for name, shape in self._whole.items() if name not in self._axes)
        self._layers = {
            group.name: [name for name, found in self._axes.items() if any(item[0] is group for item in found)]
            for group in groups
        }

    def total(self) -> float:
        return self.fixed + sum(self._price(self._shape(name, self.units)) for name in self._axes)

    def saved(self, group: Group, units: int) -> float:
        """What goes when the group has ``units`` units and all others what they have now."""
        then = {**self.units, group.name: units}
        return sum(
            self._price(self._shape(name, self.units)) - self._price(self._shape(name, then))
            for name in self._layers[group.name]
        )

    def _shape(self, name: str, units: Mapping[str, int]) -> LayerShape:
        whole = self._whole[name]
        gone = [0, 0]
        for group, axis, width in self._axes[name]:
            gone[axis] += (group.units - units[group.name]) * width
        outputs = max(1, whole.outputs - gone[0])
        groups = outputs if whole.groups == whole.outputs else whole.groups
        return LayerShape(outputs, max(1, whole.inputs - gone[1]), whole.kernel, groups, whole.size)

    def _price(self, shape: LayerShape) -> float:
        if shape not in self._known:
            self._known[shape] = self._cost(shape)
        return self._known[shape]


Loss = Callable[[Group, Floats, int, int], float]


def relative_importance(_: Group, ranked: Floats, now: int, then: int) -> float:
    """What a step from ``now`` units to ``then`` loses of what the layer still has (``ranked`` scores descend).

    So the product of the layers' kept shares is what the budget buys. Counted absolutely, the dearest layer would
    shrink to its floor before any other was touched.
    """
    return float(ranked[then:now].sum() / max(ranked[:now].sum(), 1e-30))


def widths(
    groups: Sequence[Group],
    scores: Scores,
    config: PruneStage,
    round_to: int,
    table: CostTable,
    loss: Loss = relative_importance,
) -> dict[str, float]:
    """Units per group that reach ``target_speedup``: each time the step with the least ``loss`` per saved cost.

    Raises:
        StageError: the speed-up cannot be reached with the floors of every group.
    """
    assert config.target_speedup is not None
    start = table.total()
    wanted = start / config.target_speedup
    ranked = {group.name: np.sort(scores.units[group.name])[::-1] for group in groups}
    while table.total() > wanted:
        best = min(
            (step for group in groups for step in _steps(group, ranked[group.name], config, round_to, table, loss)),
            default=None,
        )
        if best is None:
            reached = start / table.total()
            raise StageError(
                f"`target_speedup = {config.target_speedup:g}` cannot be reached: with the smallest widths it is "
                f"{reached:.2f}",
                hint="Ask for less, allow more with `ratio`, protect less, or drop layers first.",
            )
        table.units[best[1]] = best[2]
    return {group.name: float(table.units[group.name]) for group in groups}


def _steps(
    group: Group, ranked: Floats, config: PruneStage, round_to: int, table: CostTable, loss: Loss
) -> Iterator[tuple[float, str, int]]:
    """(loss per saved cost, group, width) of every smaller width that saves something.

    All of them, because a kernel that works on blocks of 16 saves nothing, or loses, at the next multiple of 8.
    """
    now = table.units[group.name]
    then = next_width(group, now, config, round_to)
    while then is not None:
        saved = table.saved(group, then)
        if saved > 0:
            yield loss(group, ranked, now, then) / saved, group.name, then
        then = next_width(group, then, config, round_to)


def next_width(group: Group, now: int, config: PruneStage, round_to: int) -> int | None:
    """The next smaller width of a group, or None at its floor."""
    from compressor.prune.choose import ratio_for, unit_step

    step = unit_step(group, round_to)
    stride = step * max(1, round(group.units / STEPS / step))
    floor = max(step, math.ceil(group.units * (1 - ratio_for(config, group.kind)) / step - 1e-9) * step)
    then = (now - 1) // stride * stride if now % stride else now - stride
    then = max(then, floor)
    return then if then < now else None


def problems_of(
    module: nn.Module, example: Mapping[str, Tensor], groups: Sequence[Group], config: PruneStage
) -> list[Problem]:
    """Is the speed-up possible at all, by multiply-accumulates and with no rounding?"""
    if config.target_speedup is None:
        return []
    if not groups:
        return [Problem("scope", "matches nothing: the model has no units that could go")]
    table = CostTable(module, example, groups)
    start = table.total()
    for group in groups:
        while (then := next_width(group, table.units[group.name], config, 1)) is not None:
            table.units[group.name] = then
    possible = start / table.total()
    if possible >= config.target_speedup:
        return []
    what = f"{config.target_speedup:g} cannot be reached: with the smallest widths it is {possible:.2f}"
    return [Problem("target_speedup", what)]


__all__ = ["Cost", "CostTable", "LayerShape", "layer_shapes", "macs_of", "problems_of", "widths"]
