"""A cut in rounds: together the parts are the whole."""

from __future__ import annotations

import math
from typing import Any

import pytest

from compressor.recipe import DistilStage, PruneStage, Recipe
from compressor.rounds import expanded, round_problems


def stages(epochs: int = 7, **keys: Any) -> tuple[PruneStage, DistilStage]:
    return PruneStage(kind="prune", **keys), DistilStage(kind="distil", epochs=epochs)


def test_the_parts_make_the_whole() -> None:
    made = expanded(stages(ratio=0.5, heads=0.75, layers=2, rounds=3))
    cuts, trained = made[::2], made[1::2]
    assert [stage.kind for stage in made] == ["prune", "distil"] * 3
    assert math.prod(1 - cut.ratio for cut in cuts) == pytest.approx(0.5)
    assert math.prod(1 - cut.heads for cut in cuts) == pytest.approx(0.25)
    assert sum(cut.layers for cut in cuts) == 2
    assert {cut.rounds for cut in cuts} == {1}
    assert [stage.epochs for stage in trained] == [2, 2, 3]


def test_a_speed_up_is_a_product() -> None:
    made = expanded(stages(scope="latency", target_speedup=8.0, rounds=3))
    assert [round(cut.target_speedup, 6) for cut in made[::2]] == [2.0, 2.0, 2.0]


def test_rounds_without_a_share_only_train() -> None:
    made = expanded(stages(layers=1, rounds=3))
    assert [stage.kind for stage in made] == ["distil", "distil", "prune", "distil"]


def test_one_round_is_the_recipe() -> None:
    given = stages(ratio=0.5)
    assert tuple(expanded(given)) == given


@pytest.mark.parametrize(
    ("epochs", "kind", "words"), [(2, "factory", "3 rounds cannot share 2"), (9, "onnx", "right after it")]
)
def test_what_cannot_be(epochs: int, kind: str, words: str) -> None:
    problems = round_problems(Recipe(stage=stages(epochs, ratio=0.5, rounds=3)), kind)
    assert [problem.where for problem in problems] == ["stage.0.prune.rounds"]
    assert words in problems[0].what


def test_training_must_follow() -> None:
    cut, train = stages(ratio=0.5, rounds=2)
    assert round_problems(Recipe(stage=(train, cut)), "factory")
    assert not round_problems(Recipe(stage=(cut, train)), "factory")
