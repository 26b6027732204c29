"""Whose rules fake quantization trains for, and recipes that do not go with it."""

from __future__ import annotations

import pytest

from compressor.config import validate
from compressor.profile import joint_rules, load_profile
from compressor.recipe import Recipe
from compressor.rules import qat_problems, trained_rules


def recipe(*stages, **qat):
    trained = {"kind": "distil", "qat": qat}
    return validate(Recipe, {"stage": [*stages[:1], trained, *stages[1:]]}, "recipe")


def profiles(*names):
    return [load_profile(name) for name in names]


def test_the_strictest_of_all_profiles_are_trained_for_and_a_named_one_alone():
    several = profiles("raspberry-pi-5", "geforce-rtx-4070")
    rules = trained_rules(recipe({"kind": "prune", "ratio": 0.5}), several)
    assert (rules.symmetric_activation, rules.weighted_only, rules.quantize_bias, rules.dynamic) == (True,) * 3 + (
        False,
    )
    named = trained_rules(recipe({"kind": "prune", "ratio": 0.5}, profile="raspberry-pi-5"), several)
    assert named == several[0].quantization
    assert joint_rules(several[:1]) == several[0].quantization


def test_profiles_without_common_rules_are_refused_by_name():
    plain, wide = profiles("raspberry-pi-5", "raspberry-pi-5")
    wide = wide.model_copy(
        update={"name": "wide", "quantization": wide.quantization.model_copy(update={"activation": "int16"})}
    )
    found = qat_problems(recipe({"kind": "prune", "ratio": 0.5}), [plain, wide])
    assert [item.where for item in found] == ["stage.1.distil.qat.profile"]
    assert "8-bit" in found[0].what
    assert qat_problems(recipe({"kind": "prune", "ratio": 0.5}, profile="wide"), [plain, wide]) == []
    assert "none of the recipe's profiles" in qat_problems(recipe(profile="other"), [plain])[0].what


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        ({"kind": "prune", "ratio": 0.5}, {"kind": "distil"}, "only `quantize` can follow"),
        ({"kind": "prune", "ratio": 0.5, "rounds": 2}, {"kind": "quantize"}, "between the rounds of a cut"),
    ],
)
def test_stages_that_do_not_go_with_it(before, after, text):
    found = qat_problems(recipe(before, after), profiles("raspberry-pi-5"))
    assert [text in item.what for item in found] == [True]
