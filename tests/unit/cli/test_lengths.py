"""Profiles take the length of the recipe's texts for files with fixed shapes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from compressor.cli.lengths import length_problems, with_lengths
from compressor.models.types import LoadedModel, Provenance, TextInput
from compressor.profile import load_profile
from compressor.recipe import Recipe


def model(length: int, task: str = "text-classification") -> LoadedModel:
    names = ("input_ids", "attention_mask")
    settings = TextInput(tokenizer_file="tokenizer.json", max_length=length, pad_id=0, names=names)
    return LoadedModel(
        kind="onnx", task=task, module=None, onnx=None, inputs=(), outputs=(), labels=(), preprocess=settings,
        provenance=Provenance("test", "sha256:0", None), files={},
    )  # fmt: skip


def test_the_longest_of_student_and_teacher_counts() -> None:
    profiles = (load_profile("pixel-8"), load_profile("this-machine"))
    found = with_lengths(profiles, [model(80), model(96)])
    assert [profile.runtime.max_sequence for profile in found] == [96, 96]
    assert found[0].runtime.sequence(128) == 96
    assert found[0].runtime.sequence(64) == 64, "the target's own limit stays"


def test_what_a_profile_says_stays_and_writers_have_no_longest_text() -> None:
    profile = load_profile("pixel-8")
    own = profile.model_copy(update={"runtime": profile.runtime.model_copy(update={"max_sequence": 32})})
    assert with_lengths([own], [model(80)])[0].runtime.max_sequence == 32
    assert with_lengths([profile], [model(80, "causal-lm")]) == (profile,)
    assert with_lengths([profile], [replace(model(80), preprocess=None)]) == (profile,)
    assert with_lengths([profile], [replace(model(80), preprocess=None)], 64) == (profile,)


def test_a_fixed_length_of_the_recipe_counts_and_must_hold_what_is_scored() -> None:
    assert with_lengths([load_profile("pixel-8")], [model(128)], 64)[0].runtime.max_sequence == 64
    recipe = Recipe.model_validate({"name": "x", "data": {"fixed_length": 64}})
    splits = {
        "validation": SimpleNamespace(lengths=np.array([9, 64])),
        "test": SimpleNamespace(lengths=np.array([70, 65])),
    }
    (problem,) = length_problems(recipe, SimpleNamespace(splits=splits))
    assert problem.where == "data.fixed_length"
    assert problem.what == "2 samples of test have more tokens, the longest 70"
    assert length_problems(Recipe(name="x"), SimpleNamespace(splits=splits)) == []
