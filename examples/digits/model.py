"""The teacher for the digits: a small residual network that trains itself on first use and is cached.

Use it as ``--model examples.digits.model:teacher``. The weights are kept as safetensors below
``~/.cache/compress-for-device`` or in the folder named by ``COMPRESS_FOR_DEVICE_CACHE``.
``python -m examples.digits.model`` prints its accuracy.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples import digits

EPOCHS, BATCH, LEARNING_RATE, SEED = 20, 64, 4e-3, 0


def conv_bn(inputs: int, outputs: int) -> nn.Sequential:
    """3x3 convolution, batch norm, ReLU; spatial size kept."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class Residual(nn.Module):
    """``x + body(x)`` with two 3x3 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(channels, channels), conv_bn(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class DigitNet(nn.Module):
    """Input ``image``: float32 (N, 1, 8, 8) in 0..1. Output: logits (N, 10)."""

    def __init__(self, stem: int = 24, widths: tuple[int, int] = (56, 72), classes: int = 10) -> None:
        super().__init__()
        self.stem = conv_bn(1, stem)
        self.stage1 = nn.Sequential(conv_bn(stem, widths[0]), Residual(widths[0]), nn.MaxPool2d(2))
        self.stage2 = nn.Sequential(conv_bn(widths[0], widths[1]), nn.MaxPool2d(2))
        self.head = nn.Linear(widths[1], classes)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stage2(self.stage1(self.stem(image)))
        return self.head(x.mean(dim=(2, 3)))


def cache_file() -> Path:
    """Where the weights lie; the name changes when this file or the cut changes."""
    root = os.environ.get("COMPRESS_FOR_DEVICE_CACHE")
    folder = Path(root) if root else Path.home() / ".cache" / "compress-for-device"
    code = inspect.getsource(sys.modules[__name__]) + inspect.getsource(digits)
    return folder / f"digits-teacher-{hashlib.sha256(code.encode()).hexdigest()[:12]}.safetensors"


def warp(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture turned by up to 10 degrees, scaled by up to 10 % and shifted by up to one pixel."""
    count = len(images)

    def uniform(limit: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * limit

    angle, zoom = uniform(0.175), 1 + uniform(0.1)
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = torch.cos(angle) * zoom
    matrix[:, 0, 1], matrix[:, 1, 0] = -torch.sin(angle) * zoom, torch.sin(angle) * zoom
    matrix[:, 0, 2], matrix[:, 1, 2] = uniform(0.25), uniform(0.25)  # the grid spans -1..1, so 0.25 is one pixel of 8
    return F.grid_sample(images, F.affine_grid(matrix, list(images.shape), align_corners=False), align_corners=False)


def _tensors(part: digits.Part) -> tuple[Tensor, Tensor]:
    pixels, labels = part
    return torch.from_numpy(pixels.astype(np.float32).transpose(0, 3, 1, 2) / 255), torch.from_numpy(labels)


def train() -> DigitNet:
    """Train on the ``train`` part only: about 20 s on two cores. The same seed gives the same weights."""
    images, labels = _tensors(digits.load()["train"])
    generator = torch.Generator().manual_seed(SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        module = DigitNet()
    module = module.to(memory_format=torch.channels_last).train()
    steps = EPOCHS * (len(labels) // BATCH)
    optimiser = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=LEARNING_RATE, total_steps=steps, pct_start=0.2)
    for _ in range(EPOCHS):
        order = torch.randperm(len(labels), generator=generator)
        for index in order.split(BATCH)[: len(labels) // BATCH]:
            logits = module(warp(images[index], generator).contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, labels[index], label_smoothing=0.05)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
    return module.to(memory_format=torch.contiguous_format).eval()


def teacher() -> nn.Module:
    """The trained teacher in evaluation mode; trains it first when the cache has none."""
    from safetensors.torch import load_file, save

    from compressor.types import write_atomic

    path = cache_file()
    if not path.is_file():
        state = {name: tensor.contiguous() for name, tensor in train().state_dict().items()}
        write_atomic(path, save(state, metadata={"licence": "Apache-2.0", "data": "UCI digits of scikit-learn"}))
    module = DigitNet()
    module.load_state_dict(load_file(path))
    return module.eval()


@torch.inference_mode()
def accuracy(module: nn.Module, part: str) -> float:
    """Share of a part's pictures that the module names rightly."""
    images, labels = _tensors(digits.load()[part])
    return float((module.eval()(images).argmax(1) == labels).float().mean())


if __name__ == "__main__":
    trained = teacher()
    count = sum(parameter.numel() for parameter in trained.parameters())
    print(f"{count} parameters, validation {accuracy(trained, 'validation'):.4f}, test {accuracy(trained, 'test'):.4f}")
    print(cache_file())
