"""How long texts are for compiled files with fixed shapes."""

from __future__ import annotations

from collections.abc import Sequence

from compressor.data.types import DataBundle
from compressor.errors import Problem
from compressor.models.types import LoadedModel, TextInput
from compressor.profile import HardwareProfile
from compressor.recipe import Recipe
from compressor.types import TEXT2TEXT


def length_problems(recipe: Recipe, data: DataBundle) -> list[Problem]:
    """Samples that would not fit into files of ``data.fixed_length``."""
    limit = recipe.data.fixed_length
    if limit is None:
        return []
    found = []
    for name in ("validation", "test"):
        lengths = getattr(data.splits[name], "lengths", None)
        if lengths is not None and (longest := int(lengths.max(initial=0))) > limit:
            what = f"{int((lengths > limit).sum())} samples of {name} have more tokens, the longest {longest}"
            found.append(Problem("data.fixed_length", what))
    return found


def with_lengths(
    profiles: Sequence[HardwareProfile], models: Sequence[LoadedModel], fixed: int | None = None
) -> tuple[HardwareProfile, ...]:
    """Profiles whose files with fixed shapes are no longer than the texts. Writers go on beyond the recipe's length.

    ``models``: the student's form of the teacher first, then the teacher as it came; ``fixed``: ``data.fixed_length``.
    """
    lengths = [model.preprocess.max_length for model in models if isinstance(model.preprocess, TextInput)]
    if not lengths or models[0].task in TEXT2TEXT | {"causal-lm"}:
        return tuple(profiles)
    longest = fixed if fixed is not None else max(lengths)
    return tuple(
        profile
        if profile.runtime.max_sequence is not None
        else profile.model_copy(update={"runtime": profile.runtime.model_copy(update={"max_sequence": longest})})
        for profile in profiles
    )
