"""Small networks, one for each way in which layers can hang together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv(inputs: int, outputs: int, kernel: int = 3, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


class Net(nn.Module):
    """Stem of 3 -> 16 channels, something, head of pooled features -> 4 classes."""

    def __init__(self, features: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 16), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.head = nn.Linear(features, 4)

    def body(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.body(self.stem(image)).mean(dim=(2, 3)))


class Chain(Net):
    def __init__(self) -> None:
        super().__init__(24)
        self.middle = nn.Sequential(conv(16, 32), nn.BatchNorm2d(32), nn.PReLU(32), nn.MaxPool2d(2), conv(32, 24))

    def body(self, x: Tensor) -> Tensor:
        return self.middle(x).sigmoid()


class Residual(Net):
    def __init__(self) -> None:
        super().__init__(32)
        self.one, self.two, self.short = conv(16, 24), conv(24, 32), conv(16, 32, 1)

    def body(self, x: Tensor) -> Tensor:
        y = self.short(x)
        y += self.two(F.silu(self.one(x)))
        return F.gelu(y)


class Concat(Net):
    def __init__(self) -> None:
        super().__init__(16)
        self.left, self.right, self.join = conv(16, 12), conv(16, 20), conv(48, 16)

    def body(self, x: Tensor) -> Tensor:
        return self.join(F.relu(torch.cat([self.left(x), x, self.right(x)], dim=1)))


class Chunk(Net):
    def __init__(self) -> None:
        super().__init__(16)
        self.wide, self.after = conv(16, 32), conv(16, 16)

    def body(self, x: Tensor) -> Tensor:
        value, gate = self.wide(x).chunk(2, dim=1)
        return self.after(value * gate.sigmoid())


class SplitAttribute(Net):
    """The size of the parts is an attribute of the module."""

    def __init__(self) -> None:
        super().__init__(32)
        self.wide, self.after, self.part_channels = conv(16, 32), conv(16, 16), 16

    def body(self, x: Tensor) -> Tensor:
        one, two = self.wide(x).split(self.part_channels, dim=1)
        return torch.cat([one, self.after(two)], dim=1)


class Depthwise(Net):
    def __init__(self) -> None:
        super().__init__(24)
        self.expand, self.deep, self.project = conv(16, 32, 1), conv(32, 32, groups=32), conv(32, 16, 1)
        self.norm = nn.BatchNorm2d(32)
        self.multiplied, self.last = conv(16, 32, groups=16), conv(32, 24, 1)

    def body(self, x: Tensor) -> Tensor:
        x = x + self.project(F.relu6(self.norm(self.deep(F.relu6(self.expand(x))))))
        return self.last(F.hardswish(self.multiplied(x), inplace=True))


class Grouped(Net):
    def __init__(self) -> None:
        super().__init__(32)
        self.wide, self.grouped = conv(16, 32, 1), conv(32, 32, groups=4)

    def body(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.grouped(F.relu(self.wide(x))))


class Transposed(Net):
    def __init__(self) -> None:
        super().__init__(16)
        self.up = nn.ConvTranspose2d(16, 24, 2, stride=2)
        self.grouped = nn.ConvTranspose2d(24, 32, 2, stride=2, groups=2)
        self.deep = nn.ConvTranspose2d(32, 32, 3, padding=1, groups=32)
        self.last = conv(32, 16, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.deep(F.relu(self.grouped(F.relu(self.up(F.avg_pool2d(x, 4))))))))


class SqueezeExcite(Net):
    def __init__(self) -> None:
        super().__init__(32)
        self.wide, self.down, self.up = conv(16, 32), nn.Linear(32, 8), conv(8, 32, 1)

    def body(self, x: Tensor) -> Tensor:
        x = self.wide(x)
        squeezed = F.relu(self.down(F.adaptive_avg_pool2d(x, 1).flatten(1)))
        return x * self.up(squeezed[:, :, None, None]).sigmoid()


class GroupNormed(Net):
    """Two channels a normalisation group."""

    def __init__(self) -> None:
        super().__init__(32)
        self.wide, self.norm, self.last = conv(16, 32), nn.GroupNorm(16, 32), conv(32, 32)

    def body(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.norm(self.wide(x))))


class Shuffled(Net):
    """Upsampling by pixel shuffle, then nearest, then padding."""

    def __init__(self) -> None:
        super().__init__(16)
        self.wide, self.shuffle, self.last = conv(16, 32), nn.PixelShuffle(2), conv(8, 16)

    def body(self, x: Tensor) -> Tensor:
        x = F.interpolate(self.shuffle(self.wide(F.avg_pool2d(x, 2))), scale_factor=2.0)
        return self.last(F.pad(x, (1, 1, 1, 1)))


class FlattenLinear(Net):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(16 * 16, 32), nn.Linear(32, 24), nn.Linear(24, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(image), 2).flatten(1)
        return self.head(F.relu(self.fc2(F.relu(self.fc1(x)))))


class Reused(Net):
    """One convolution applied twice: its input and output channels are the same units."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.norm = conv(16, 16), nn.BatchNorm2d(16)

    def body(self, x: Tensor) -> Tensor:
        return self.norm(self.shared(F.relu(self.norm(self.shared(x)))))


class Tied(nn.Module):
    """Encoder and decoder share one weight matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.encode, self.decode = nn.Linear(12, 24), nn.Linear(24, 16), nn.Linear(16, 24, bias=False)
        self.decode.weight = nn.Parameter(torch.empty(24, 16))
        self.again = nn.Linear(24, 16)
        self.again.weight = self.encode.weight
        self.head = nn.Linear(16, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.first(image.flatten(1)[:, :12]))
        x = F.relu(self.decode(F.relu(self.encode(x)))) + x
        return self.head(F.relu(self.again(x)))


class GatedFeedForward(nn.Module):
    """SwiGLU over tokens with separate and with fused projections; RMS norm; residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 16)
        self.norm = nn.RMSNorm(16)
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)
        self.fused, self.down2, self.head = nn.Linear(16, 64, bias=False), nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = self.inner(image.flatten(2)[:, :, :12])
        y = self.norm(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        one, two = self.fused(self.norm(x)).chunk(2, dim=-1)
        return self.head((x + self.down2(F.gelu(one) * two)).mean(dim=1))


class FusedAttention(nn.Module):
    """ViT-style fused query-key-value projection; heads are an attribute."""

    def __init__(self, *, hand_written: bool = False) -> None:
        super().__init__()
        self.hand_written = hand_written
        self.inner, self.num_heads, self.head_dim = nn.Linear(12, 32), 8, 4
        self.qkv, self.proj, self.head = nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(32, 4)
        self.norm = nn.LayerNorm(32)

    def forward(self, image: Tensor) -> Tensor:
        x = self.inner(image.flatten(2)[:, :, :12])
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        if self.hand_written:
            attention = (query @ key.transpose(-2, -1) * self.head_dim**-0.5).softmax(dim=-1) @ value
        else:
            attention = F.scaled_dot_product_attention(query, key, value)
        x = x + self.proj(attention.transpose(1, 2).reshape(batch, tokens, -1))
        return self.head(self.norm(x).mean(dim=1))


class GroupedQueryAttention(nn.Module):
    """Four key-value heads for eight query heads, with rotary positions: a key-value head goes with its two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.num_heads, self.num_kv_heads, self.head_dim = nn.Linear(12, 32), 8, 4, 4
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)
        self.o_proj, self.head, self.norm = nn.Linear(32, 32), nn.Linear(32, 4), nn.LayerNorm(32)

    def rotate(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[2])[:, None] * torch.ones(self.head_dim) * 0.1
        half = x.shape[-1] // 2
        return x * angle.cos() + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * angle.sin()

    def forward(self, image: Tensor) -> Tensor:
        x = self.inner(image.flatten(2)[:, :, :12])
        shape = (*x.shape[:-1], -1, self.head_dim)
        query = self.rotate(self.q_proj(x).view(shape).transpose(1, 2))
        key = self.rotate(self.k_proj(x).view(shape).transpose(1, 2))
        value = self.v_proj(x).view(shape).transpose(1, 2)
        key, value = (
            kv[:, :, None].expand(-1, -1, 2, -1, -1).reshape(kv.shape[0], -1, *kv.shape[2:]) for kv in (key, value)
        )
        attention = F.scaled_dot_product_attention(query, key, value)
        x = x + self.o_proj(attention.transpose(1, 2).reshape(*x.shape[:-1], -1))
        return self.head(self.norm(x).mean(dim=1))


TOPOLOGIES: dict[str, Callable[[], nn.Module]] = {
    "chain": Chain,
    "residual": Residual,
    "concat": Concat,
    "chunk": Chunk,
    "split-attribute": SplitAttribute,
    "depthwise": Depthwise,
    "grouped": Grouped,
    "transposed": Transposed,
    "squeeze-excite": SqueezeExcite,
    "group-norm": GroupNormed,
    "pixel-shuffle": Shuffled,
    "flatten-linear": FlattenLinear,
    "reused": Reused,
    "tied": Tied,
    "gated-ffn": GatedFeedForward,
    "fused-attention": FusedAttention,
    "hand-written-attention": lambda: FusedAttention(hand_written=True),
    "grouped-query-attention": GroupedQueryAttention,
}


def build(name: str, seed: int = 0) -> nn.Module:
    """A network with drawn weights and batch-norm statistics that are not the neutral ones."""
    torch.manual_seed(seed)
    module = TOPOLOGIES[name]()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(), part.running_var.uniform_(0.5, 2)
            nn.init.normal_(part.weight), nn.init.normal_(part.bias)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return module.eval()


def images(count: int = 4, seed: int = 0) -> dict[str, Tensor]:
    return {"image": torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))}
