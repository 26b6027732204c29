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
        carried = bool(row.built or row.part) or bool(row.recipe)
        assert carried != bool(row.reason), row.id
        assert row.status == ("not offered" if row.reason else "built" if row.built or row.part else "recipe")


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
            taught = catalogue.USUAL | {f"big:{signal}": count for signal, count in catalogue.USUAL.items()}
            assert [p.what for p in check(stage, catalogue.USUAL, taught, fields=fields)] == []


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("X1", "X1"), ("x1", "X1"), ("GKD", "X1"), ("gkd", "X1"), ("T5", "T5"), ("BiStil", "T5"), ("DistilBERT", "F2"),
     ("MiniLM", "F1"), ("distillm 2", "X6"), ("DKD", "L3"), ("Well-Read Students", "T1"), ("uDistil-Whisper", "T8")],
)  # fmt: skip
def test_rows_are_found_by_id_short_name_and_title(name: str, wanted: str) -> None:
    assert [row.id for row in catalogue.find(name)] == [wanted]


def test_unclear_names_give_all_rows_and_unknown_ones_none() -> None:
    assert {row.id for row in catalogue.find("cross-tokenizer")} == {"X10", "X11"}
    assert catalogue.find("no such paper") == ()
    assert catalogue.find("?") == ()


@pytest.mark.parametrize("row", catalogue.rows(), ids=lambda row: row.id)
def test_every_row_can_be_shown(row: catalogue.Row, capsys: pytest.CaptureFixture[str]) -> None:
    from compressor.cli.listing import methods_show_command

    assert methods_show_command(row.id, as_json=False) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{row.id}: {row.title} ({row.status})")
    if row.text:
        assert validate(Recipe, tomllib.loads(shown.partition("recipe to paste")[2]), row.id).stage
    else:
        assert row.reason or row.part


def test_papers_speak_of_rows_that_exist() -> None:
    known = tomllib.loads(catalogue.PAPERS.read_text(encoding="utf-8"))
    assert set(known) <= {row.id for row in catalogue.rows()}
    assert all(item.get("paper") for item in known.values())
