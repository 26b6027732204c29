"""A tiny network and data with structure, for runs that take seconds. Weights come from a seed, data from a formula."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

CLASSES = 4


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm(self.one(x)))


class Net(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.body = nn.Sequential(
            Block(width), nn.MaxPool2d(2), nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), Block(2 * width)
        )
        self.head = nn.Linear(2 * width, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.body(torch.relu(self.stem(image))).mean(dim=(2, 3)))


def pictures(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (N, 8, 8, 1): a bright bar whose place and direction is the class, on noise."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, CLASSES, count)
    images = generator.integers(0, 90, (count, 8, 8, 1))
    for image, label in zip(images, labels, strict=True):
        place = 1 if label % 2 == 0 else 5
        if label < 2:
            image[place : place + 2] += 120
        else:
            image[:, place : place + 2] += 120
    return images.astype(np.uint8), labels.astype(np.int64)


def load() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {"train": pictures(600, 1), "test": pictures(200, 2)}


def teacher() -> nn.Module:
    """Trained for a second on the spot, deterministically."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    module = Net()
    images, labels = pictures(600, 1)
    x, y = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(labels)
    optimiser = torch.optim.Adam(module.parameters(), 5e-3)
    for _ in range(25):
        for part in torch.arange(len(y)).split(100):
            loss = nn.functional.cross_entropy(module(x[part]), y[part])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return module.eval()


def not_a_module() -> int:
    return 3


class Exploding(Net):
    """Gives NaN once it trains."""

    def forward(self, image: Tensor) -> Tensor:
        out = super().forward(image)
        return out / 0.0 * 0.0 if self.training else out


def exploding() -> nn.Module:
    torch.manual_seed(0)
    return Exploding().eval()


def overlapping() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Three test pictures stand in train."""
    data = load()
    images, labels = data["train"]
    images[:3], labels[:3] = data["test"][0][:3], data["test"][1][:3]
    return data


def too_many_classes() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    data = load()
    data["train"][1][:5] = CLASSES + 3
    return data


def empty_test() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    data = load()
    return {"train": data["train"], "test": (data["test"][0][:0], data["test"][1][:0])}
