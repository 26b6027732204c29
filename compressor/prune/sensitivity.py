"""How much accuracy each group costs: one curve a group, measured on validation with that group alone cut.

The curves decide how much goes where (``scope = "sensitivity"``): step by step the units go that lose least accuracy
per saved cost (Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, measured such curves first).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.models.structure.groups import Cut, Floats, Group, Scores

if TYPE_CHECKING:
    from torch import nn

SHARES = (0.75, 0.5, 0.25)  # of a group's units that stay while it is measured
TIE = 1e-3  # weight of the importance that is lost, where the curves are flat
Curve = list[tuple[int, float]]  # (units, score lost), from all units down
Curves = Mapping[str, Curve]
Quality = Callable[["nn.Module"], float]


def measure(module: nn.Module, groups: Sequence[Group], scores: Scores, quality: Quality) -> dict[str, Curve]:
    """Score lost on validation when one group alone keeps a share of its units, by group.

    ``quality`` is higher for better modules; it is called once for the whole and ``len(SHARES)`` times a group. Losses
    never fall with the share that goes (noise of the validation set is smoothed away upwards).
    """
    from compressor.models.structure.surgery import mask
    from compressor.prune.choose import best

    whole = quality(module)
    curves: dict[str, Curve] = {}
    for group in groups:
        curve, lost = [(group.units, 0.0)], 0.0
        for share in SHARES:
            units = max(1, round(group.units * share))
            if units < curve[-1][0]:
                kept = Cut(group, best(scores.units[group.name], units))
                lost = max(lost, whole - quality(mask(module, [kept])))
                curve.append((units, lost))
        curves[group.name] = curve
    return curves


def lost_at(curve: Curve, units: float) -> float:
    """Between the measured points in a straight line; below the last one on in its direction to no units at all."""
    known = curve if curve[-1][0] == 0 else [*curve, (0, _at_zero(curve))]
    places = np.array([place for place, _ in known][::-1], dtype=float)
    values = np.array([value for _, value in known][::-1], dtype=float)
    return float(np.interp(units, places, values))


def _at_zero(curve: Curve) -> float:
    if len(curve) < 2:
        return curve[-1][1]
    (before, less), (last, more) = curve[-2:]
    return more + (more - less) / (before - last) * last


def loss_of(curves: Curves) -> Callable[[Group, Floats, int, int], float]:
    """What a step loses: accuracy by the curve, and a little for the importance that goes where it is flat."""

    def loss(group: Group, ranked: Floats, now: int, then: int) -> float:
        share = float(ranked[then:now].sum() / max(ranked.sum(), 1e-30))
        curve = curves[group.name]
        return lost_at(curve, then) - lost_at(curve, now) + TIE * share

    return loss


def as_json(curves: Curves) -> Any:
    return {name: [[units, round(lost, 6)] for units, lost in curve] for name, curve in curves.items()}


def from_json(value: Any) -> dict[str, Curve]:
    return {str(name): [(int(units), float(lost)) for units, lost in curve] for name, curve in value.items()}


__all__ = ["Curve", "Curves", "Quality", "as_json", "from_json", "loss_of", "lost_at", "measure"]
