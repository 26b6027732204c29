"""Taylor importance: its definition, what it sees that magnitude does not, and that it leaves the model alone."""

from __future__ import annotations

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from compressor.errors import StageError  # noqa: E402
from compressor.models.structure.scores import score  # noqa: E402
from compressor.models.structure.taylor import TaylorStatistics, pseudo_loss  # noqa: E402
from compressor.models.structure.units import find_groups  # noqa: E402
from compressor.prune import prune  # noqa: E402
from compressor.recipe import PruneStage  # noqa: E402
from tests.unit.prune.test_importance import mlp  # noqa: E402
from tests.unit.prune.topologies import build, images  # noqa: E402

pytestmark = pytest.mark.train


def test_it_is_the_mean_of_activation_times_gradient() -> None:
    module, data = mlp(), torch.tensor([[1.0, 0, 2, 4], [3, 0, 2, 0], [2, 1, 2, 0]])
    groups = [group for group in find_groups(module, {"input": data}) if not group.hard]
    found = score(module, groups, "taylor", [{"input": data}], seed=0).units["0"]
    hidden = torch.relu(data).requires_grad_(True)  # the first layer is the identity
    generator = torch.Generator().manual_seed(0)
    pseudo_loss(module[2](hidden), {"input": data}, generator).backward()
    expected = (hidden * hidden.grad).detach().abs().sum(dim=0).numpy()
    assert found == pytest.approx(expected / np.linalg.norm(expected), rel=1e-5)


def test_it_sees_what_the_loss_does_not_depend_on() -> None:
    """A unit with large weights in, and none out, matters to magnitude and not to the loss."""
    module = mlp()
    with torch.no_grad():
        module[0].weight[2] *= 50
        module[2].weight[:, 2] = 0
    data = {"input": torch.rand(16, 4) + 0.1}
    groups = [group for group in find_groups(module, data) if not group.hard]
    assert score(module, groups, "taylor", [data]).units["0"][2] == 0
    assert score(module, groups, "magnitude").units["0"].argmax() == 2


def test_the_model_stays_as_it_was(bert: nn.Module, tokens: dict[str, torch.Tensor]) -> None:
    bert.train()
    before = copy.deepcopy(bert.state_dict())
    groups = [group for group in find_groups(bert, tokens) if not group.hard and not group.soft]
    found = score(bert, groups, "taylor", [tokens], seed=1)
    assert not found.notes
    assert all(np.isfinite(values).all() and values.max() > 0 for values in found.units.values())
    assert bert.training
    assert all(weight.grad is None and weight.requires_grad for weight in bert.parameters())
    assert all(torch.equal(value, before[name]) for name, value in bert.state_dict().items())
    again = score(bert, groups, "taylor", [tokens], seed=1)
    assert all((again.units[name] == values).all() for name, values in found.units.items())


def test_memory_does_not_grow_with_the_samples() -> None:
    module = mlp()
    groups = [group for group in find_groups(module, {"input": torch.randn(2, 4)}) if not group.hard]
    held = set()
    for batches in (1, 50):
        statistics = TaylorStatistics(module, groups)
        statistics.observe({"input": torch.randn(20, 4)} for _ in range(batches))
        assert statistics.samples == 20 * batches
        held.add(statistics.floats_held)
    assert len(held) == 1


@pytest.mark.parametrize("topology", ["residual", "depthwise"])
def test_a_stage_prunes_by_it(topology: str) -> None:
    module = build(topology)
    config = PruneStage(kind="prune", ratio=0.5, importance="taylor")
    made = prune(module, images(), config, [images()])
    assert made.macs_after < 0.6 * made.macs_before
    with pytest.raises(StageError, match="taylor importance needs"):
        prune(module, images(), config, [])
