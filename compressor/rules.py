"""Which target's rules a stage of fake quantization trains for, and what of a recipe does not go with such a stage."""

from __future__ import annotations

from collections.abc import Sequence

from compressor.errors import Problem
from compressor.profile import HardwareProfile, QuantizationRules, joint_rules
from compressor.recipe import DistilStage, PruneStage, QuantizeStage, Recipe


def trained_rules(recipe: Recipe, profiles: Sequence[HardwareProfile]) -> QuantizationRules:
    """The rules of the profile that `qat.profile` names, or the strictest of all; the usual ones without `qat`.

    Raises:
        ValueError: the profiles have no rules in common; :func:`qat_problems` says it before.
    """
    named = next((s.qat.profile for s in recipe.stage if isinstance(s, DistilStage) and s.qat is not None), "")
    if named == "":
        return QuantizationRules()
    return joint_rules([profile for profile in profiles if named is None or profile.name == named])


def qat_problems(recipe: Recipe, profiles: Sequence[HardwareProfile]) -> list[Problem]:
    """Stages after fake quantization, profiles that are not there, and profiles that cannot share one student."""
    found: list[Problem] = []
    for number, stage in enumerate(recipe.stage):
        if not isinstance(stage, DistilStage) or stage.qat is None:
            continue
        where = f"stage.{number}.distil.qat"
        later = next((item for item in recipe.stage[number + 1 :] if not isinstance(item, QuantizeStage)), None)
        if later is not None:
            text = f"only `quantize` can follow: a `{later.kind}` stage would undo what was trained for the device"
            found.append(Problem(where, text))
        before = recipe.stage[number - 1] if number else None
        if isinstance(before, PruneStage) and before.rounds > 1:
            found.append(Problem(where, "cannot train between the rounds of a cut: give it a distil stage of its own"))
        found += _profile_problems(stage.qat.profile, where, recipe, profiles)
    return found


def _profile_problems(
    named: str | None, where: str, recipe: Recipe, profiles: Sequence[HardwareProfile]
) -> list[Problem]:
    names = [profile.name for profile in profiles]
    if named is not None and named not in names:
        return [Problem(f"{where}.profile", f"`{named}` is none of the recipe's profiles: {', '.join(names)}")]
    try:
        rules = trained_rules(recipe, profiles)
    except ValueError as error:
        return [Problem(f"{where}.profile", f"{error}: name the one to train for")]
    return [] if rules.int8 else [Problem(f"{where}.profile", "a target takes no int8: name another to train for")]
