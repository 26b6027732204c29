"""The label-smoothing lint: a teacher trained with smoothed labels should not be asked at a high temperature (I3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from compressor.recipe import DistilStage, Recipe

Defaults = Callable[[str], Mapping[str, str]]  # objective -> its options' defaults as text


def smoothing_warnings(recipe: Recipe, defaults: Defaults) -> tuple[str, ...]:
    """A warning for every objective with a temperature above 1 that meets a teacher trained with label smoothing.

    Chandrasegaran et al., "Revisiting Label Smoothing and Knowledge Distillation Compatibility: What was Missing?",
    ICML 2022: with smoothing 0.1, ResNet-50 to ResNet-18 on ImageNet falls from 71.67 % at temperature 1 to 67.75 at 3.
    """
    smoothed = {item.name: item.label_smoothing for item in recipe.teacher.more}
    smoothed["main"] = recipe.teacher.label_smoothing
    found = []
    for teacher, amount in smoothed.items():
        if not amount:
            continue
        for number, stage in enumerate(recipe.stage):
            for item in stage.objective if isinstance(stage, DistilStage) else ():
                tau = highest(item.options.get("temperature", defaults(item.use).get("temperature")))
                if tau is not None and tau > 1:
                    found.append(
                        f"stage.{number}: `{item.use}` at temperature {tau:g} meets teacher `{teacher}`, trained with "
                        f"label smoothing {amount:g}; use temperature 1"
                    )
    return tuple(found)


def highest(value: Any) -> float | None:
    """The largest temperature an option may take: a number, or the ends of a schedule."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    ends = [getattr(value, name, None) for name in ("start", "end")]
    numbers = [float(end) for end in ends if isinstance(end, int | float)]
    return max(numbers) if numbers else None
