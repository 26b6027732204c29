"""A ResNet-9 type network for 28x28 grey images: the Fashion-MNIST teacher.

Use it from the command line as ``--model examples.fashion_mnist.model:teacher``; the weights lie beside this file and
were trained by ``train_teacher.py``.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

WEIGHTS = Path(__file__).with_name("teacher.safetensors")


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


class ResNet9(nn.Module):
    """Stem, three stages of halved resolution with a residual block each, linear head.

    Input ``image``: float32 (N, 1, 28, 28), scaled to mean 0 and standard deviation 1. Output ``logits``: (N, 10).
    """

    def __init__(self, stem: int = 24, widths: tuple[int, int, int] = (48, 96, 192), classes: int = 10) -> None:
        super().__init__()
        w1, w2, w3 = widths
        self.stem = conv_bn(1, stem)
        self.stage1 = nn.Sequential(conv_bn(stem, w1), nn.MaxPool2d(2), Residual(w1))
        self.stage2 = nn.Sequential(conv_bn(w1, w2), nn.MaxPool2d(2), Residual(w2))
        self.stage3 = nn.Sequential(conv_bn(w2, w3), nn.MaxPool2d(2), Residual(w3))
        self.head = nn.Linear(w3, classes)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(self.stem(image))))
        return self.head(x.mean(dim=(2, 3)))


def teacher() -> nn.Module:
    """The trained teacher, in evaluation mode."""
    from safetensors.torch import load_file

    module = ResNet9()
    module.load_state_dict(load_file(WEIGHTS))
    return module.eval()
