"""Pruning by topology: what is committed computes what is masked, is smaller, and can be replayed."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")

from compressor.models.cost import count_macs, count_parameters  # noqa: E402
from compressor.models.rebuild import replay  # noqa: E402
from compressor.prune import prune  # noqa: E402
from compressor.recipe import PruneStage  # noqa: E402
from tests.unit.prune.topologies import TOPOLOGIES, build, images  # noqa: E402

pytestmark = pytest.mark.train


def _same(a: torch.nn.Module, b: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    with torch.no_grad():
        return float((a(**batch) - b(**batch)).abs().max())


@pytest.mark.parametrize("name", TOPOLOGIES)
@pytest.mark.parametrize("importance", ["magnitude", "activation"])
def test_committed_equals_masked(name: str, importance: str) -> None:
    module = build(name)
    untouched = copy.deepcopy(module.state_dict())
    data = [images(16, seed) for seed in range(1, 4)]
    config = PruneStage(kind="prune", ratio=0.5, importance=importance)
    pruned = prune(module, images(), config, data, round_to=2, seed=0)
    assert _same(pruned.module, pruned.masked, images(8, 9)) <= 1e-4
    assert pruned.parameters_after < 0.7 * pruned.parameters_before
    assert pruned.macs_after < 0.85 * pruned.macs_before
    assert (count_parameters(pruned.module), count_macs(pruned.module, images())) == (
        pruned.parameters_after,
        pruned.macs_after,
    )
    assert not any("fails" in fact.reason or "not follow" in fact.reason for fact in pruned.facts)
    assert all(torch.equal(untouched[key], value) for key, value in module.state_dict().items())


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_record_replays(name: str) -> None:
    module = build(name)
    config = PruneStage(kind="prune", ratio=0.5, importance="magnitude", scope="global")
    pruned = prune(module, images(), config, [], seed=0, repair=False)
    rebuilt = replay(module, pruned.record)
    assert str(rebuilt) == str(pruned.module)
    assert all(torch.equal(value, pruned.module.state_dict()[key]) for key, value in rebuilt.state_dict().items())
    assert _same(rebuilt, pruned.module, images()) == 0


def test_removed_units_are_really_zero_in_the_masked_module() -> None:
    module = build("chain")
    pruned = prune(module, images(), PruneStage(kind="prune", ratio=0.5, importance="magnitude"), [], round_to=1)
    rows = pruned.masked.stem[0].weight.flatten(1).abs().sum(dim=1)
    assert int((rows == 0).sum()) == 8
    assert pruned.module.stem[0].out_channels == 8
    assert torch.equal(pruned.module.stem[0].weight, pruned.masked.stem[0].weight[rows > 0])


def test_shared_weights_stay_shared() -> None:
    pruned = prune(build("tied"), images(), PruneStage(kind="prune", ratio=0.5, importance="magnitude"), [])
    assert pruned.module.again.weight is pruned.module.encode.weight
    assert pruned.module.encode.weight.shape == (8, 12)


def test_whole_norm_groups_go() -> None:
    pruned = prune(build("group-norm"), images(), PruneStage(kind="prune", ratio=0.5, importance="magnitude"), [])
    assert (pruned.module.norm.num_groups, pruned.module.norm.num_channels) == (8, 16)


def test_grouped_query_heads_go_with_their_key() -> None:
    pruned = prune(build("grouped-query-attention"), images(), PruneStage(kind="prune", heads=0.5), [images()])
    assert (pruned.module.num_heads, pruned.module.num_kv_heads, pruned.module.head_dim) == (4, 2, 4)
    assert pruned.module.q_proj.out_features == 16
    assert pruned.module.k_proj.out_features == 8
