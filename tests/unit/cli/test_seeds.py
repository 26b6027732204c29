"""When several seeds cannot be compared, `plan` says why."""

from __future__ import annotations

from types import SimpleNamespace as Fake

import pytest

from compressor.cli.seeds import seed_problems
from compressor.config import validate
from compressor.recipe import Recipe

LABELLED = Fake(splits={"train": Fake(labels=[0, 1])})
UNLABELLED = Fake(splits={"train": Fake(labels=None)})
MODULE, FILE = Fake(module=object()), Fake(module=None)
KD = {"kind": "distil"}


@pytest.mark.parametrize(
    ("keys", "model", "data", "why"),
    [
        ({"stage": [KD], "null_twin": False}, MODULE, LABELLED, "null_twin = false"),
        ({"stage": [{"kind": "prune", "ratio": 0.5}]}, MODULE, LABELLED, "no `distil` stage"),
        ({"stage": [KD]}, MODULE, UNLABELLED, "needs labels"),
        ({"stage": [KD | {"data": "transfer"}]}, MODULE, LABELLED, "needs labels"),
        ({"stage": [KD]}, FILE, LABELLED, "ONNX file is not trained"),
    ],
)
def test_without_pairs_there_is_nothing_to_compare(keys, model, data, why) -> None:
    recipe = validate(Recipe, keys, "a test")
    [problem] = seed_problems(2, recipe, model, data)
    assert problem.where == "--seeds"
    assert why in problem.what
    assert not seed_problems(1, recipe, model, data)
    assert not seed_problems(2, validate(Recipe, {"stage": [KD]}, "a test"), MODULE, LABELLED)
