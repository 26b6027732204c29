"""Residual blocks between other layers of a Sequential can be dropped, down to none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compressor.models.rebuild import replay
from compressor.models.structure.blocks import find_block_lists
from compressor.prune import check, prune
from compressor.recipe import PruneStage

pytestmark = pytest.mark.train


class Residual(nn.Module):
    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU())
        with torch.no_grad():
            self.body[0].weight.mul_(scale)
            self.body[0].bias.mul_(scale)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU())
        self.stage1 = nn.Sequential(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()), Residual(8, 1.0))
        self.stage2 = nn.Sequential(nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU()), nn.MaxPool2d(2), Residual(16, 1e-3))
        self.head = nn.Linear(16, 3)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.stage2(self.stage1(self.stem(image))).mean((2, 3)))


@pytest.fixture
def example() -> dict[str, Tensor]:
    return {"image": torch.randn(8, 1, 10, 10, generator=torch.Generator().manual_seed(0))}


def test_found_beside_layers_of_another_kind(example: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    found = {blocks.container: (blocks.positions, blocks.minimum) for blocks in find_block_lists(Net(), example)}
    assert found == {"stage1": ((1,), 0), "stage2": ((2,), 0)}


def test_least_influential_goes_first_and_equals_the_net_without_it(example: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    net = Net().eval()
    done = prune(net, example, PruneStage(kind="prune", layers=1), [example], repair=False)
    assert [fact.layer for fact in done.facts if fact.action == "dropped"] == ["stage2.2"]
    expected = net.head(net.stage2[1](net.stage2[0](net.stage1(net.stem(example["image"])))).mean((2, 3)))
    torch.testing.assert_close(done.module(example["image"]), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(replay(net, done.record)(example["image"]), expected, atol=1e-5, rtol=0)


def test_every_block_can_go_and_no_more(example: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    net = Net().eval()
    done = prune(net, example, PruneStage(kind="prune", layers=2), [example], repair=False)
    assert done.macs_after < done.macs_before
    assert not any(isinstance(part, Residual) for part in done.module.modules())
    problem = check(net, example, PruneStage(kind="prune", layers=3))
    assert [p.where for p in problem] == ["layers"]
    assert "2 of the model's 2 blocks" in problem[0].what
