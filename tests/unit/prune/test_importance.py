"""Importance: known answers, constant memory; and the repairs after a cut."""

from __future__ import annotations

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from compressor.models.structure.scores import ActivationStatistics, score  # noqa: E402
from compressor.models.structure.units import find_groups  # noqa: E402
from compressor.prune import Pruned, prune  # noqa: E402
from compressor.prune.repair import statistics_on  # noqa: E402
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


class Normed(nn.Module):
    """A convolution and its norm, read by a second convolution and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x)).mean(dim=(2, 3)))


def normed(seed: int = 0) -> Normed:
    """With running statistics of data of mean 0 and deviation 1."""
    torch.manual_seed(seed)
    module = Normed().train()
    for _ in range(60):
        module(torch.randn(64, 3, 4, 4))
    return module.eval()


def mended(module: Normed, data: list[dict[str, torch.Tensor]], ratio: float) -> tuple[Pruned, str]:
    done = prune(module, {"x": data[0]["x"][:2]}, PruneStage(kind="prune", channels=ratio), data)
    fact = next((fact.reason for fact in done.facts if fact.layer == "batch norm"), "")
    return done, fact


def test_statistics_on_data_are_those_of_the_data() -> None:
    module = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5)).eval()
    batches = [{"input": torch.randn(20, 3, 4, 4, generator=torch.Generator().manual_seed(s)) * 3 + 1} for s in (0, 1)]
    mean, variance = statistics_on(module, batches)["0"]
    stacked = torch.cat([batch["input"] for batch in batches])
    assert torch.allclose(mean, stacked.mean(dim=(0, 2, 3)), atol=1e-5)
    assert torch.allclose(variance, stacked.var(dim=(0, 2, 3)), rtol=0.02)
    assert module[0].running_mean.abs().max() == 0
    assert (module[0].momentum, module[0].training) == (0.1, False)


def test_mending_brings_the_outputs_nearer_to_the_teachers() -> None:
    module = normed()
    data = [{"x": torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(s))} for s in (1, 2)]
    done, how = mended(module, data, 0.5)
    plain = prune(module, {"x": data[0]["x"][:2]}, PruneStage(kind="prune", channels=0.5), data, repair=False)
    wanted = module(data[0]["x"])
    assert how.startswith("statistics ")
    assert (done.module(data[0]["x"]) - wanted).square().mean() < (plain.module(data[0]["x"]) - wanted).square().mean()
    assert torch.allclose(done.module(data[0]["x"]), done.masked(data[0]["x"]), atol=1e-5)


def test_data_unlike_the_teachers_does_not_replace_its_statistics() -> None:
    """Calibration pictures five deviations away: their own statistics would undo what the teacher makes of them."""
    module = normed()
    data = [{"x": torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(s)) + 5} for s in (1, 2)]
    done, how = mended(module, data, 0.3)
    assert how != "statistics estimated again on calibration data"
    renewed = copy.deepcopy(done.module)
    for name, (mean, variance) in statistics_on(done.module, data).items():
        renewed.get_submodule(name).running_mean.copy_(mean)
        renewed.get_submodule(name).running_var.copy_(variance)
    wanted, x = module(data[0]["x"]), data[0]["x"]
    assert (done.module(x) - wanted).square().mean() < (renewed(x) - wanted).square().mean()


def test_batch_norm_is_left_alone_with_too_few_samples() -> None:
    module = normed()
    done, how = mended(module, [{"x": torch.randn(8, 3, 4, 4)}], 0.5)
    assert how == ""
    kept = torch.isin(module.first[1].running_mean, done.module.first[1].running_mean).sum()
    assert kept == len(done.module.first[1].running_mean)
