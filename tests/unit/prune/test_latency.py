"""Widths by cost: the table follows every cut, the target is reached, what cannot be reached is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from compressor.errors import PlanError, StageError  # noqa: E402
from compressor.models.cost import count_macs  # noqa: E402
from compressor.models.structure.units import find_groups  # noqa: E402
from compressor.prune import check, prune, sensitivity_of  # noqa: E402
from compressor.prune.choose import candidates  # noqa: E402
from compressor.prune.latency import CostTable, LayerShape, layer_shapes, macs_of  # noqa: E402
from compressor.prune.sensitivity import as_json, from_json, lost_at  # noqa: E402
from compressor.recipe import PruneStage  # noqa: E402
from targets.layer_cost import LayerCost, layer_model  # noqa: E402
from tests.unit.prune.topologies import build, images  # noqa: E402

pytestmark = pytest.mark.train


def stage(speedup: float | None = 2.0, **keys: Any) -> PruneStage:
    return PruneStage(kind="prune", scope="latency", target_speedup=speedup, importance="magnitude", **keys)


def two() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).eval()


BATCH = {"input": torch.randn(4, 16)}


@pytest.mark.parametrize("topology", ["chain", "residual", "depthwise", "grouped"])
def test_the_table_is_what_the_network_costs(topology: str) -> None:
    module = build(topology)
    groups = candidates(find_groups(module, images()), stage())
    table = CostTable(module, images(), groups)
    assert table.total() == count_macs(module, images())
    made = prune(module, images(), PruneStage(kind="prune", ratio=0.5, importance="magnitude"), [])
    sizes = {fact.layer: fact.after for fact in made.facts if fact.action == "pruned"}
    for group in groups:
        if group.name in sizes:
            table.units[group.name] = int(sizes[group.name].split()[0]) // group.width
    assert table.total() == made.macs_after


@pytest.mark.parametrize("topology", ["chain", "residual"])
def test_the_speed_up_is_reached_and_not_much_more(topology: str) -> None:
    module = build(topology)
    made = prune(module, images(), stage(1.8), [])
    assert 1.8 <= made.macs_before / made.macs_after < 3.5
    assert any("saved cost" in fact.reason for fact in made.facts if fact.action == "pruned")


def test_heads_and_neurons_of_a_transformer(bert: nn.Module, tokens: dict[str, torch.Tensor]) -> None:
    groups = candidates(find_groups(bert, tokens), stage(1.5))
    made = prune(bert, tokens, stage(1.5), [tokens])
    before, after = (CostTable(each, tokens, groups[:0]).total() for each in (bert, made.module))
    assert before / after >= 1.5


def test_what_is_dear_goes_first() -> None:
    """Two equal layers; the cost says that the second one is a hundred times as slow."""
    module = nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)
    ).eval()

    def cost(shape: LayerShape) -> float:
        return shape.macs * (100.0 if shape.outputs == 4 or (shape.inputs == 16 and shape.outputs <= 16) else 1.0)

    made = prune(module, BATCH, stage(1.3, protect=("2",)), [], cost=cost)
    assert made.module[4].out_features < made.module[0].out_features


def test_steps_are_free_where_the_kernel_gains_nothing() -> None:
    """A target that pads to 16 gains only at multiples of 16: that is where the widths end up."""

    def padded(shape: LayerShape) -> float:
        return macs_of(LayerShape(-(-shape.outputs // 16) * 16, -(-shape.inputs // 16) * 16, (), 1, shape.size))

    made = prune(two(), BATCH, stage(2.0), [], round_to=16, cost=padded)
    assert {made.module[0].out_features % 16, made.module[2].out_features % 16} == {0}


def test_shapes_of_layers() -> None:
    found = layer_shapes(nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, groups=2)), {"input": torch.zeros(1, 4, 9, 9)})
    assert found == {"0": LayerShape(8, 2, (3, 3), 2, (4, 4))}
    assert found["0"].macs == 8 * 2 * 9 * 16


def test_what_cannot_be_reached_is_refused_by_plan() -> None:
    problems = check(two(), BATCH, stage(1e6))
    assert [problem.where for problem in problems] == ["target_speedup"]
    with pytest.raises(PlanError):
        prune(two(), BATCH, stage(1e6), [])
    assert not check(two(), BATCH, stage(2.0))
    with pytest.raises(StageError, match="cannot be reached"):  # possible by operations, not on this target
        prune(two(), BATCH, stage(2.0), [], cost=lambda shape: 1.0 + 1e-9 * shape.macs)


@pytest.mark.parametrize("keys", [{"scope": "latency"}, {"target_speedup": 2.0, "ratio": 0.5}])
def test_scope_and_target_need_each_other(keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="need each other"):
        PruneStage(kind="prune", **keys)


@pytest.mark.parametrize("shape", [LayerShape(64, 32, (), 1, (16,)), LayerShape(8, 1, (3, 3), 8, (6, 6))])
def test_measured_layers_run(shape: LayerShape) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(layer_model(shape), providers=["CPUExecutionProvider"])
    assert len(session.get_inputs()) == 1
    ticks = iter(np.arange(0, 1000, 0.001))
    found = LayerCost(clock=lambda: float(next(ticks)))(shape)
    assert 0 < found < 10


def test_sensitivity_spares_the_group_that_costs_accuracy() -> None:
    """Two layers of one shape; the quality that is measured looks at the first one only."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16)).eval()

    def quality(each: nn.Module) -> float:
        return float((each[0].weight.abs().sum(dim=1) > 0).sum()) / 64

    config = stage(2.0).model_copy(update={"scope": "sensitivity"})
    curves = sensitivity_of(module, BATCH, config, [], quality)
    assert curves["0"] == [(64, 0.0), (48, 0.25), (32, 0.5), (16, 0.75)]
    assert curves["2"] == [(64, 0.0), (48, 0.0), (32, 0.0), (16, 0.0)]
    assert lost_at(curves["0"], 40) == pytest.approx(0.375)
    assert lost_at(curves["0"], 8) == pytest.approx(0.875)
    assert from_json(json.loads(json.dumps(as_json(curves)))) == curves
    made = prune(module, BATCH, config, [], curves=curves)
    assert (made.module[0].out_features, made.module[2].out_features < 32) == (64, True)
    assert made.macs_before / made.macs_after >= 2.0
    with pytest.raises(StageError, match="needs curves"):
        prune(module, BATCH, config, [])


def test_balance_instead_of_a_bottleneck() -> None:
    """Equal layers share a cut: none of them is emptied before the others."""
    made = prune(two(), BATCH, stage(3.0), [])
    sizes = (made.module[0].out_features, made.module[2].out_features)
    assert min(sizes) > 20
