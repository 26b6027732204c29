"""What a recipe's searches need of profiles and of the order of stages. Data; needs no torch."""

from __future__ import annotations

from collections.abc import Iterator

from compressor.errors import Problem
from compressor.profile import HardwareProfile
from compressor.recipe import DistilStage, Recipe, StudentStage
from compressor.search import Budget


def budgets_of(recipe: Recipe) -> Iterator[tuple[str, Budget]]:
    """Key and value of every budget of a search."""
    for position, stage in enumerate(recipe.stage):
        if isinstance(stage, StudentStage) and stage.search is not None:
            yield f"stage.{position}.student.search.budget", stage.search.budget
        elif isinstance(stage, DistilStage) and stage.supernet is not None:
            yield f"stage.{position}.distil.supernet.budget", stage.supernet.budget


def measured_here(profile: HardwareProfile) -> bool:
    """Can layers of this profile be timed by this process?"""
    return profile.here == "this-machine" and profile.target == "onnxruntime-cpu"


def search_problems(recipe: Recipe, profile: HardwareProfile) -> list[Problem]:
    """Budgets in milliseconds where nothing can be timed, a factory's student after other surgeries, two teachers.

    ``profile``: the recipe's first.
    """
    problems = []
    for where, budget in budgets_of(recipe):
        if budget.latency_ms is not None and not measured_here(profile):
            what = f"the first profile, {profile.name}, is not this machine with ONNX Runtime: limit `macs` instead"
            problems.append(Problem(f"{where}.latency_ms", what))
    for position, stage in enumerate(recipe.stage):
        if not isinstance(stage, StudentStage | DistilStage):
            continue
        where = f"stage.{position}.{stage.kind}"
        if isinstance(stage, StudentStage):
            searched = stage.search is not None and bool(stage.search.space.factory)
            if position and (stage.factory or searched):
                key = "factory" if stage.factory else "search.space.factory"
                problems.append(Problem(f"{where}.{key}", "makes another network: it must be the first stage"))
        elif stage.supernet is not None and recipe.teacher.more:
            problems.append(Problem(f"{where}.supernet", "learns from one teacher: leave `teacher.more` out"))
    return problems


__all__ = ["budgets_of", "measured_here", "search_problems"]
