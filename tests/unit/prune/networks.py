"""Small networks after well-known designs, each written here: what a user's own module may look like."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.unit.prune.topologies import conv


def conv_bn(
    inputs: int, outputs: int, kernel: int = 3, act: type[nn.Module] = nn.ReLU, **options: int
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options), nn.BatchNorm2d(outputs), act()
    )


class Excite(nn.Module):
    """Squeeze and excite with convolutions and a hard gate."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 8, 1), nn.Conv2d(8, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Inverted(nn.Module):
    """Expand, depthwise, (excite,) project; a residual connection where the shape allows one."""

    def __init__(self, inputs: int, outputs: int, *, excite: bool, act: type[nn.Module], stride: int = 1) -> None:
        super().__init__()
        wide = 2 * inputs
        self.residual = stride == 1 and inputs == outputs
        self.body = nn.Sequential(
            conv_bn(inputs, wide, 1, act),
            conv_bn(wide, wide, 3, act, groups=wide, stride=stride),
            Excite(wide) if excite else nn.Identity(),
            conv_bn(wide, outputs, 1, nn.Identity),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


def _mobile(*, excite: bool, act: type[nn.Module]) -> nn.Module:
    blocks = [Inverted(16, 16, excite=excite, act=act), Inverted(16, 24, excite=excite, act=act, stride=2)]
    head = [conv_bn(24, 32, 1, act), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(32, 4)]
    return nn.Sequential(conv_bn(3, 16, 3, act), *blocks, Inverted(24, 24, excite=excite, act=act), *head)


class ConvNeXtLike(nn.Module):
    """Depthwise 7x7, layer norm over channels-last, inverted bottleneck, layer scale, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 16, 4, stride=4), conv(16, 16, 7, groups=16)
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)
        self.scale, self.head = nn.Parameter(torch.full((16,), 0.5)), nn.Linear(16, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        y = self.down(F.gelu(self.up(self.norm(self.deep(x).permute(0, 2, 3, 1)))))
        x = x + (self.scale * y).permute(0, 3, 1, 2)
        return self.head(x.mean(dim=(2, 3)))


class UNetLike(nn.Module):
    """Down, up by a transposed convolution, concatenated with what was skipped; a map of 3 classes comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.low = conv_bn(3, 16), conv_bn(16, 32)
        self.up, self.right, self.head = nn.ConvTranspose2d(32, 16, 2, stride=2), conv_bn(32, 16), nn.Conv2d(16, 3, 1)

    def forward(self, image: Tensor) -> Tensor:
        skipped = self.left(image)
        raised = self.up(self.low(F.max_pool2d(skipped, 2)))
        return self.head(self.right(torch.cat([raised, skipped], dim=1)))


class DenseNetLike(nn.Module):
    """Every layer reads all before it, norm first; a transition halves the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16)
        self.norms = nn.ModuleList([nn.BatchNorm2d(16 + 8 * step) for step in range(3)])
        self.convs = nn.ModuleList([conv(16 + 8 * step, 8) for step in range(3)])
        self.last, self.transition, self.head = nn.BatchNorm2d(40), conv(40, 20, 1), nn.Linear(20, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        for norm, layer in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, layer(F.relu(norm(x)))], dim=1)
        return self.head(F.relu(self.transition(F.relu(self.last(x)))).mean(dim=(2, 3)))


class ShuffleNetLike(nn.Module):
    """Half of the channels pass, the other half is worked on, then the two are shuffled into each other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv_bn(3, 32), nn.Linear(32, 4)
        self.branches = nn.ModuleList(
            [nn.Sequential(conv_bn(16, 16, 1), conv_bn(16, 16, 3, groups=16), conv_bn(16, 16, 1)) for _ in range(2)]
        )

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        for branch in self.branches:
            passed, worked = x.chunk(2, dim=1)
            x = torch.cat([passed, branch(worked)], dim=1)
            batch, channels, height, width = x.shape
            x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        return self.head(x.mean(dim=(2, 3)))


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


class MixtureOfExperts(nn.Module):
    """Each token goes to the two best of six experts; all are computed, which any runtime can do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(12, 16), nn.Linear(16, 4)
        self.num_experts, self.k = 6, 2
        self.gate = nn.Linear(16, 6, bias=False)
        self.experts = nn.ModuleList([Expert() for _ in range(6)])

    def forward(self, image: Tensor) -> Tensor:
        x = self.inner(image.flatten(2)[:, :, :12])
        weights, chosen = self.gate(x).softmax(dim=-1).topk(self.k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        for number in range(self.num_experts):
            share = (weights * (chosen == number)).sum(dim=-1, keepdim=True)
            x = x + share * self.experts[number](x)
        return self.head(x.mean(dim=1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mobilenet-v3": lambda: _mobile(excite=True, act=nn.Hardswish),
    "efficientnet-lite": lambda: _mobile(excite=False, act=nn.ReLU6),
    "convnext": ConvNeXtLike,
    "u-net": UNetLike,
    "densenet": DenseNetLike,
    "shufflenet": ShuffleNetLike,
    "mixture-of-experts": MixtureOfExperts,
}


def build(name: str) -> nn.Module:
    """With drawn weights and batch-norm statistics that are not the neutral ones."""
    torch.manual_seed(0)
    module = NETWORKS[name]()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(), part.running_var.uniform_(0.5, 2)
            nn.init.normal_(part.weight), nn.init.normal_(part.bias)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return module.eval()
