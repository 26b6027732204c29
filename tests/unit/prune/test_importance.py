"""Importance: known answers, constant memory; and the repairs after a cut."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from compressor.models.structure.scores import ActivationStatistics, score  # noqa: E402
from compressor.models.structure.units import find_groups  # noqa: E402
from compressor.prune import prune  # noqa: E402
from compressor.prune.repair import reestimate_batch_norm  # noqa: E402
from compressor.recipe import PruneStage  # noqa: E402
from tests.unit.prune.topologies import build, images  # noqa: E402

pytestmark = pytest.mark.train


def mlp() -> nn.Sequential:
    """Hidden activations are the inputs themselves."""
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        module[0].weight.copy_(torch.eye(4))
        module[0].bias.zero_()
    return module.eval()


def test_activation_is_mean_over_positions_then_l2_over_samples() -> None:
    data = torch.tensor([[[1.0, 0, 2, 4], [3, 0, 2, 0]], [[2.0, 1, 2, 0], [2, 1, 2, 0]]])  # (samples, positions, units)
    module = mlp()
    groups = [group for group in find_groups(module, {"x": data}) if not group.hard]
    found = score(module, groups, "activation", [{"x": data[:1]}, {"x": data[1:]}]).units["0"]
    expected = np.sqrt((np.array([[2, 0, 2, 2], [2, 1, 2, 0]]) ** 2).sum(axis=0))
    assert found == pytest.approx(expected / expected.mean())


def test_heads_are_ranked_by_the_norm_of_their_output(bert: nn.Module, tokens: dict[str, torch.Tensor]) -> None:
    attention = bert.model.bert.encoder.layer[1].attention.self
    with torch.no_grad():
        attention.value.weight[8:16] *= 30  # head 1 says more
        attention.value.weight[24:32] = attention.value.bias[24:32] = 0  # head 3 says nothing
    groups = [group for group in find_groups(bert, tokens) if group.kind == "heads"]
    found = score(bert, groups, "activation", [tokens]).units[groups[1].name]
    assert found.argmax() == 1
    assert found[3] == 0


def test_padding_does_not_count(bert: nn.Module, tokens: dict[str, torch.Tensor]) -> None:
    groups = [group for group in find_groups(bert, tokens) if group.kind == "neurons" and not group.hard]
    longer = {name: torch.nn.functional.pad(tensor, (0, 6)) for name, tensor in tokens.items()}
    short, padded = (score(bert, groups[:4], "activation", [batch]).units for batch in (tokens, longer))
    for name in short:
        assert padded[name] == pytest.approx(short[name], abs=1e-4)


def test_magnitude_of_known_weights() -> None:
    module = mlp()
    with torch.no_grad():
        module[0].weight.copy_(torch.diag(torch.tensor([1.0, 2, 3, 4])))
        module[2].weight.copy_(torch.ones(2, 4))
    groups = [group for group in find_groups(module, {"x": torch.randn(2, 4)}) if not group.hard]
    found = score(module, groups, "magnitude").units["0"]
    expected = np.sqrt(np.array([1, 4, 9, 16]) / 7.5 + 1)
    assert found == pytest.approx(expected / expected.mean())


def test_random_depends_on_the_seed_only() -> None:
    module = build("chain")
    groups = [group for group in find_groups(module, images()) if not group.hard]
    one, same, other = (score(module, groups, "random", seed=seed).units["stem.0"] for seed in (1, 1, 2))
    assert (one == same).all()
    assert (one != other).any()


def test_memory_does_not_grow_with_the_samples() -> None:
    module = mlp()
    groups = [group for group in find_groups(module, {"x": torch.randn(2, 4)}) if not group.hard]
    held = {}
    for samples in (100, 10_000):
        statistics = ActivationStatistics(module, groups)
        statistics.observe({"x": torch.randn(100, 4)} for _ in range(samples // 100))
        assert statistics.samples == samples
        held[samples] = statistics.floats_held
    assert held[100] == held[10_000] == 4 + 4 + 1


def test_bias_compensation_is_exact_for_constant_units() -> None:
    """Units that always say the same can go without changing the outputs at all."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        module[0].weight[4:] = 0
        module[0].bias[4:] = torch.tensor([0.5, 1.0, 1.5, 2.0])
        module[0].weight[:4] *= 20
        module[0].bias[:4] = 9
    data = {"x": torch.randn(64, 6)}
    wanted = module(input=data["x"])
    pruned = prune(module, data, PruneStage(kind="prune", ratio=0.5), [data])
    assert pruned.module[0].out_features == 4
    assert torch.allclose(pruned.module(data["x"]), wanted, atol=1e-5)
    plain = prune(module, data, PruneStage(kind="prune", ratio=0.5), [data], repair=False)
    assert not torch.allclose(plain.module(data["x"]), wanted, atol=1e-2)


def test_batch_norm_reestimation_gives_the_statistics_of_the_data() -> None:
    module = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5)).eval()
    batches = [{"input": torch.randn(20, 3, 4, 4, generator=torch.Generator().manual_seed(s)) * 3 + 1} for s in (0, 1)]
    assert reestimate_batch_norm(module, batches) == ["0"]
    stacked = torch.cat([batch["input"] for batch in batches])
    assert torch.allclose(module[0].running_mean, stacked.mean(dim=(0, 2, 3)), atol=1e-5)
    assert torch.allclose(module[0].running_var, stacked.var(dim=(0, 2, 3)), rtol=0.02)
    assert (module[0].momentum, module[0].training) == (0.1, False)


def test_batch_norm_is_left_alone_with_too_few_samples() -> None:
    module = nn.Sequential(nn.BatchNorm2d(3)).eval()
    assert reestimate_batch_norm(module, [{"input": torch.randn(8, 3, 4, 4) + 5}]) == []
    assert module[0].running_mean.abs().max() == 0
