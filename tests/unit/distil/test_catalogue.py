"""The table of the catalogue's rows agrees with the registry, and every recipe in it is valid."""

from __future__ import annotations

import tomllib

import pytest

from compressor.config import validate
from compressor.distil import catalogue
from compressor.distil.objectives import registry
from compressor.recipe import DistilStage, Recipe

WITH_RECIPE = [row for row in catalogue.rows() if row.recipe]


def test_the_table_has_every_row_once_with_one_status() -> None:
    rows = catalogue.rows()
    assert len(rows) == 141  # 138 papers and the three foundations L1 to L3
    assert len({row.id for row in rows}) == 141
    for row in rows:
        assert row.title
        assert bool(row.built or row.part) + bool(row.recipe) + bool(row.reason) == 1, row.id


def test_built_names_are_registered_and_registered_names_are_in_the_table() -> None:
    built = {name for row in catalogue.rows() for name in row.built}
    ours = {name for name in registry.names() if registry.describe(name).source.startswith("compressor.")}
    assert built <= set(registry.names())
    assert ours <= built


def objectives(recipe: Recipe) -> list[str]:
    return [item.use for stage in recipe.stage if isinstance(stage, DistilStage) for item in stage.objective]


@pytest.mark.parametrize("row", WITH_RECIPE, ids=lambda row: row.id)
def test_the_recipe_of_a_row_is_valid(row: catalogue.Row) -> None:
    recipe = validate(Recipe, tomllib.loads(row.recipe), row.id)
    assert recipe.stage
    assert set(objectives(recipe)) <= set(registry.names())


@pytest.mark.parametrize("name", registry.names())
def test_every_method_has_a_recipe_to_paste_and_says_when(name: str) -> None:
    recipe = validate(Recipe, tomllib.loads(catalogue.recipe_of(name)), name)
    assert name in objectives(recipe)
    assert catalogue.when_of(registry.describe(name).text)
    assert catalogue.family(name) in {*catalogue.FAMILIES.values()}


@pytest.mark.train
@pytest.mark.parametrize("recipe", [*(row.recipe for row in WITH_RECIPE), *map(catalogue.recipe_of, registry.names())])
def test_the_options_in_a_recipe_are_the_objectives_own(recipe: str) -> None:
    pytest.importorskip("torch")
    from compressor.distil.terms import SOURCES, check

    for stage in validate(Recipe, tomllib.loads(recipe), "recipe").stage:
        if isinstance(stage, DistilStage):
            fields = frozenset(SOURCES)  # what data and stage may bring
            assert [p.what for p in check(stage, catalogue.USUAL, catalogue.USUAL, fields=fields)] == []
