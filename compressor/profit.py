"""Who profits from zeros: what a plan says of sparsity for each profile, and what it refuses. Data; needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from compressor.errors import Problem
from compressor.masks import Zeros
from compressor.profile import HardwareProfile
from compressor.recipe import DistilStage, PruneStage, QuantizeStage, Recipe, StudentStage


def zeros_of(recipe: Recipe) -> Iterator[tuple[int, str, Zeros]]:
    """Every wish for zeros: position of the stage, key in the recipe, what is asked for."""
    for position, stage in enumerate(recipe.stage):
        if isinstance(stage, PruneStage) and stage.zeros is not None:
            yield position, f"stage.{position}.prune", stage.zeros
        elif isinstance(stage, DistilStage) and stage.masks is not None:
            yield position, f"stage.{position}.distil.masks", stage.masks.zeros


def sparsity_problems(recipe: Recipe, profiles: Sequence[HardwareProfile]) -> list[Problem]:
    """Stages that would destroy the zeros, and a speed that only zeros could give where they give none."""
    found = list(zeros_of(recipe))
    problems = _round_problems(recipe)
    if found:
        problems += _order_problems(recipe, found[0][0]) + _speed_problems(recipe, profiles, found[-1][2])
    return problems


def _round_problems(recipe: Recipe) -> list[Problem]:
    """A cut in rounds trains between its steps: masks of that training would be cut by the next step."""
    problems = []
    for position, stage in enumerate(recipe.stage[1:], 1):
        before = recipe.stage[position - 1]
        if not isinstance(stage, DistilStage) or not isinstance(before, PruneStage) or before.rounds == 1:
            continue
        for name in ("masks", "cofi", "supernet", "sparse_update"):
            if getattr(stage, name) is not None:
                what = f"cannot be cut into the {before.rounds} rounds of stage {position - 1}: give it a later stage"
                problems.append(Problem(f"stage.{position}.distil.{name}", what))
    return problems


def _order_problems(recipe: Recipe, first: int) -> list[Problem]:
    problems = []
    for position, stage in enumerate(recipe.stage[first + 1 :], first + 1):
        cuts = isinstance(stage, StudentStage) or (isinstance(stage, PruneStage) and stage.zeros is None)
        asked = ("cofi", "supernet", "lora", "sparse_update") if isinstance(stage, DistilStage) else ()
        keys = [f".{name}" for name in asked if getattr(stage, name) is not None] or ([""] if cuts else [])
        what = f"comes after stage {first} made zeros, whose pattern it would destroy: put it before"
        problems += [Problem(f"stage.{position}.{stage.kind}{key}", what) for key in keys]
    return problems


def _speed_problems(recipe: Recipe, profiles: Sequence[HardwareProfile], zeros: Zeros) -> list[Problem]:
    wanted = recipe.accept.min_speedup
    if wanted is None or wanted <= 1:
        return []
    smaller = any(
        isinstance(stage, StudentStage)
        or (isinstance(stage, PruneStage) and stage.zeros is None)
        or (isinstance(stage, DistilStage) and (stage.cofi is not None or stage.supernet is not None))
        for stage in recipe.stage
    )
    quantized = any(isinstance(stage, QuantizeStage) for stage in recipe.stage)
    problems = []
    for profile in profiles:
        if smaller or (quantized and profile.quantization.int8) or profits(profile, zeros):
            continue
        what = (
            f"asks for {wanted:g}x, which only the zeros ({zeros.shown}) could give, and {profile.name} cannot: "
            f"{_why(profile)}. Cut with `prune` or `student`, add `quantize`, or leave `min_speedup` out"
        )
        problems.append(Problem("accept.min_speedup", what))
    return problems


def profits(profile: HardwareProfile, zeros: Zeros) -> bool:
    """Does the target skip zeros of this pattern?"""
    return zeros.pattern in profile.sparsity.faster


def _why(profile: HardwareProfile) -> str:
    return profile.sparsity.why or f"no source says that {profile.target} skips zeros"


def sparsity_notes(recipe: Recipe, profiles: Sequence[HardwareProfile]) -> tuple[str, ...]:
    """For each profile: do the zeros that ship make it faster, and what becomes of the file."""
    found = list(zeros_of(recipe))
    if not found:
        return ()
    zeros, notes = found[-1][2], []
    for profile in profiles:
        if profits(profile, zeros):
            notes.append(f"{profile.name}: zeros ({zeros.shown}) can be faster there: {profile.sparsity.why}")
        else:
            notes.append(f"{profile.name}: zeros ({zeros.shown}) do not make it faster there: {_why(profile)}")
    notes.append("zeros leave the model file as large as it was; what is compressed (the package) gets smaller")
    return tuple(notes)
