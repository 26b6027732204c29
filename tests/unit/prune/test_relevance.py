"""Relevance: the rule by hand, conservation from layer to layer, and where it sits beside the other importances."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from compressor.models.structure.relevance import Rules, folded  # noqa: E402
from compressor.models.structure.scores import score  # noqa: E402
from compressor.models.structure.units import find_groups  # noqa: E402
from tests.unit.prune.topologies import build, images  # noqa: E402

pytestmark = pytest.mark.train


def relevance_of(module: nn.Module, data: torch.Tensor) -> torch.Tensor:
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    data = data.clone().requires_grad_(True)
    with Rules():
        module(data).max(dim=-1).values.sum().backward()
    return data.detach() * data.grad


def test_the_rule_by_hand() -> None:
    """z = 2*1 - 1*3 + 4*0.5 = 1: only the positive parts 2 and 2 share it, half each."""
    layer = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -3.0, 0.5]]))
    assert relevance_of(layer, torch.tensor([[2.0, 1.0, 4.0]])) == pytest.approx(torch.tensor([[0.5, 0.0, 0.5]]))
    assert relevance_of(layer, torch.tensor([[2.0, -1.0, 4.0]])) == pytest.approx(
        torch.tensor([[2.0, 3.0, 2.0]])  # z = 7 with a negative input on a negative weight
    )


class Residuals(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.Linear(3, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two((x + nn.functional.gelu(self.one(x))).mean(dim=(2, 3)))


def test_what_comes_in_is_what_goes_out() -> None:
    torch.manual_seed(0)
    module, data = Residuals(), torch.rand(4, 3, 6, 6)
    winning = module(data).max(dim=-1).values.detach()
    assert relevance_of(module, data).flatten(1).sum(dim=1) == pytest.approx(winning, rel=1e-3)


def test_the_values_are_those_of_the_module() -> None:
    module = build("squeeze-excite")
    batch = images(4, 3)["image"].requires_grad_(True)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    with Rules():
        found = module(batch)
    assert torch.allclose(found, module(batch), atol=1e-4)


def test_folding_changes_nothing() -> None:
    module = build("chain")
    work = folded(module, images())
    assert torch.allclose(work(**images(3, 5)), module(**images(3, 5)), atol=1e-4)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in work.modules())


def test_a_unit_that_never_speaks_has_none() -> None:
    module = build("chain")
    norm = module.stem[1]
    with torch.no_grad():
        norm.weight[3], norm.bias[3] = 0.0, -1.0
    groups = [group for group in find_groups(module, images()) if not group.hard]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    found = score(module, groups, "relevance", [images(8, 1)])
    assert found.units["stem.0"][3] == 0
    assert (found.units["stem.0"] > 0).sum() > 8
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not found.notes


@pytest.mark.parametrize("importance", ["relevance", "activation-weight"])
def test_transformers_are_scored(bert: nn.Module, tokens: dict[str, torch.Tensor], importance: str) -> None:
    groups = [group for group in find_groups(bert, tokens) if not group.hard and not group.soft]
    found = score(bert, groups, importance, [tokens])
    assert not found.notes
    assert all(np.isfinite(values).all() and values.max() > 0 for values in found.units.values())


def test_activation_times_weight_of_known_numbers() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        module[0].weight.copy_(torch.eye(2))
        module[0].bias.zero_()
        module[2].weight.copy_(torch.tensor([[3.0, 1.0], [4.0, 0.0]]))
    groups = [group for group in find_groups(module, {"x": torch.ones(2, 2)}) if not group.hard]
    found = score(module, groups, "activation-weight", [{"x": torch.tensor([[1.0, 10.0], [1.0, 10.0]])}]).units["0"]
    assert found == pytest.approx(np.array([5.0, 10.0]) / 7.5)
