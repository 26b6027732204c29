"""Early exits as a recipe asks for them: `multi-exit` with ``export = "threshold"``."""

from __future__ import annotations

from dataclasses import dataclass

from compressor.errors import Problem
from compressor.recipe import DistilStage, Recipe
from compressor.types import Task

OBJECTIVE = "multi-exit"
CLASSIFIERS = frozenset({"image-classification", "text-classification"})


@dataclass(frozen=True)
class EarlyExit:
    """``threshold`` of the largest softmax probability; None: chosen on validation within ``accept.max_drop``."""

    threshold: float | None


def early_exits(recipe: Recipe) -> EarlyExit | None:
    """What the recipe asks for, or None."""
    for stage in recipe.stage:
        for item in stage.objective if isinstance(stage, DistilStage) else ():
            if item.use == OBJECTIVE and item.options.get("export") == "threshold":
                given = item.options.get("threshold")
                return EarlyExit(float(given) if isinstance(given, int | float) else None)
    return None


def exit_problems(recipe: Recipe, task: Task) -> list[Problem]:
    """Why a threshold cannot be had."""
    wanted = early_exits(recipe)
    if wanted is None:
        return []
    found = []
    if task not in CLASSIFIERS and task != "generic":
        found.append(Problem("stage", f"exits with a threshold are for classifiers of one class; the task is {task}"))
    if wanted.threshold is None and recipe.accept.max_drop is None:
        what = "is needed to choose the exits' threshold; or give `threshold` in the objective's options"
        found.append(Problem("accept.max_drop", what))
    return found
