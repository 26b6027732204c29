"""Layers that find their teacher: the worked number, the order, layers that masks took away."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from compressor.distil.objectives.base import Batch, Context, Step  # noqa: E402
from compressor.distil.objectives.layerwise import Layerwise, alignment  # noqa: E402

pytestmark = pytest.mark.train


def made(taught, own, layers=2):
    """Bound to a teacher and a student whose layers hold these constants."""
    objective = Layerwise(Layerwise.Options(layers=layers))
    counts = {"qkv": 3, "logits": 1}
    assert objective.bind(counts | {"hidden": len(own) + 1}, counts | {"hidden": len(taught) + 1}) == []
    s, t = (
        {f"hidden[{i + 1}]": torch.full((1, 1, 2), float(x)) for i, x in enumerate(values)} for values in (own, taught)
    )
    objective.prepare(Context(s, t, torch.Generator().manual_seed(0), "cpu"))
    return objective, s, t


def test_the_worked_number():
    objective, s, t = made([1, 3], [3, 2, 0])
    assert float(objective(s, t, Batch(None, torch.ones(1, 1)), Step(0, 1, 0)).sum) == 4.0


def test_a_layer_that_is_masked_away_teaches_no_one():
    objective, s, t = made([1, 3], [1, 3, 3])
    batch = Batch(None, torch.ones(1, 1))
    assert float(objective(s, t, batch, Step(0, 1, 0)).sum) == 0.0
    assert float(objective(s, t, batch, Step(0, 1, 0, (False, True, True))).sum) == 4.0  # layer 1 is the nearest left
    assert float(objective(s, t, batch, Step(0, 1, 0, (True, False, False))).sum) == 4.0  # one layer for both


def test_the_order_is_kept():
    assert alignment([[0.0, 9.0, 9.0], [9.0, 9.0, 0.0]], [True] * 3) == [0, 2]
    assert alignment([[9.0, 9.0, 0.0], [0.0, 9.0, 9.0]], [True] * 3) == [0, 0]
    assert alignment([[9.0, 9.0, 0.0], [9.0, 1.0, 1.0]], [True] * 3) == [0, 1]
    assert alignment([[1.0, 0.0]], [False, False]) == [1]


def test_taught_layers_are_spread_and_end_at_the_last():
    objective = Layerwise()
    counts = {"qkv": 12, "hidden": 13}
    assert objective.bind(counts, counts) == []
    assert objective.taught == ("hidden[3]", "hidden[6]", "hidden[9]", "hidden[12]")
    assert objective.bind({"hidden": 3}, {"hidden": 3}) == ["`layerwise` needs transformers with layers on both sides"]
