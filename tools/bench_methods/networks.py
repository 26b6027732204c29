"""The networks of the picture rows; all tiny, so that a row costs seconds."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn


def _stage(inside: int, outside: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outside), nn.ReLU())


class ConvNet(nn.Module):  # type: ignore[misc]  # torch is not typed here
    """Up to three 3x3 convolutions with batch norm (28 to 14 to 7 points wide), 3x3 averages, a linear head."""

    def __init__(self, width: int, outputs: int = 10, depth: int = 3) -> None:
        super().__init__()
        widths = [1, width, 2 * width, 4 * width][: depth + 1]
        self.stages = nn.Sequential(*(_stage(widths[i], widths[i + 1], (2, 2, 1)[i]) for i in range(depth)))
        self.pool = nn.AvgPool2d(3, 2)
        self.head = nn.Linear(9 * widths[-1], outputs)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.pool(self.stages(image)).flatten(1))


class Shallow(nn.Module):  # type: ignore[misc]  # torch is not typed here
    """The first two stages of a :class:`ConvNet` with the head that an exit there has: mean over space."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stages = nn.Sequential(_stage(1, width, 2), _stage(width, 2 * width, 2))
        self.head = nn.Linear(2 * width, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.stages(image).mean((2, 3)))


class Residual(nn.Module):  # type: ignore[misc]  # torch is not typed here
    """Two convolutions in, then blocks that add to their input at 7x7 points: any of them can be left out."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(_stage(1, width, 2), _stage(width, width, 2))
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(blocks))
        self.head = nn.Linear(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class ResidualBlock(nn.Module):  # type: ignore[misc]  # torch is not typed here
    """x + BN(conv(ReLU(BN(conv x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        last = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.body = nn.Sequential(_stage(width, width, 1), last, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


class Dense(nn.Module):  # type: ignore[misc]  # torch is not typed here
    """One hidden layer on all points."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(784, width), nn.Linear(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(image.flatten(1))))


BUILT: dict[str, Callable[[], nn.Module]] = {
    "student": lambda: ConvNet(8),
    "teacher": lambda: ConvNet(32),
    "middle": lambda: ConvNet(16),
    "pair": lambda: ConvNet(8, 2),
    "pair teacher": lambda: ConvNet(32, 2),
    "shallow": lambda: Shallow(8),
    "residual": lambda: Residual(16, 2),
    "residual teacher": lambda: Residual(16, 4),
    "dense": lambda: Dense(16),
    "dense teacher": lambda: Dense(256),
}


def fresh(network: str, seed: int) -> nn.Module:
    """A network with weights of its own seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BUILT[network]()


def redrawn(module: nn.Module, seed: int) -> nn.Module:
    """A copy of the same shapes with new weights."""
    made = copy.deepcopy(module)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for part in made.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
    return made
