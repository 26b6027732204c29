"""Recipes are data: every problem is listed with its key and a suggestion."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor.config import validate
from compressor.errors import ConfigError
from compressor.recipe import Recipe, load_recipe, parse_drop

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


def problems(data: dict[str, object]) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        validate(Recipe, data, "`bad.toml`")
    assert caught.value.exit_code == 2
    return {problem.where: problem.what for problem in caught.value.problems}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.stage
    assert recipe.profiles


def test_all_problems_are_listed_at_once_with_keys_and_suggestions() -> None:
    found = problems(
        {
            "tacher": {},
            "accept": {"max_drop": "5x"},
            "stage": [
                {"kind": "prune", "ratio": 1.5, "importnace": "activation"},
                {"kind": "quantise"},
                {"kind": "distil", "optimiser": "adm"},
                {"epochs": 1},
            ],
        }
    )
    assert found["tacher"] == "unknown key; did you mean `teacher`?"
    assert found["stage.0.prune.ratio"].startswith("must be less than 1")
    assert found["stage.0.prune.importnace"] == "unknown key; did you mean `importance`?"
    assert "did you mean `quantize`?" in found["stage.1"]
    assert "did you mean `adamw`?" in found["stage.2.distil.optimiser"]
    assert found["stage.3"] == "needs a `kind`"
    assert "percentage" in found["accept.max_drop"]


def test_a_prune_stage_must_ask_for_something() -> None:
    assert "nothing to prune" in problems({"stage": [{"kind": "prune"}]})["stage.0.prune"]


@pytest.mark.parametrize(("text", "value"), [("1%", 0.01), ("0.5 %", 0.005), (0.02, 0.02), ("0.02", 0.02), (0, 0)])
def test_a_drop_is_a_fraction_or_a_percentage(text: object, value: float) -> None:
    assert parse_drop(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["-1%", "100%", 1, "a lot"])
def test_a_drop_out_of_range_is_refused(text: object) -> None:
    with pytest.raises(ValueError):
        parse_drop(text)


def test_remote_code_cannot_be_switched_on_in_a_file() -> None:
    assert "teacher.trust_remote_code" in problems({"teacher": {"trust_remote_code": True}})


def test_a_missing_or_broken_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_recipe(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("name = ")
    with pytest.raises(ConfigError, match="syntax"):
        load_recipe(broken)
