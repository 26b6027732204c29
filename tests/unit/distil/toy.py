"""Small real models and data for the tests of distillation; also a script, for runs that are killed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from compressor.data.types import DataBundle
from compressor.recipe import DistilStage


class Pictures:
    """Split of 12x12 grey pictures whose class is the quarter with the bright spot."""

    def __init__(self, name: str, count: int, seed: int, labelled: bool = True) -> None:
        random = np.random.default_rng(seed)
        labels = random.integers(0, 4, count)
        pictures = random.normal(0, 1, (count, 1, 12, 12)).astype(np.float32)
        for i, label in enumerate(labels):
            row, column = (label // 2) * 6, (label % 2) * 6
            pictures[i, 0, row : row + 6, column : column + 6] += 1.0
        self.name, self.pictures = name, pictures
        self.labels = labels.astype(np.int64) if labelled else None
        self.digests = np.array([f"{seed}-{i}".encode() for i in range(count)], dtype="S16")
        self.calls, self.die_at = 0, -1

    def __len__(self) -> int:
        return len(self.pictures)

    def batch(self, index: np.ndarray) -> dict[str, np.ndarray]:
        self.calls += 1
        if self.calls == self.die_at:
            os._exit(9)
        return {"image": self.pictures[index]}


class Sentences:
    """Sequences of 3 to 14 tokens between [CLS] = 1 and [SEP] = 2; the class: is the upper vocabulary frequent?"""

    def __init__(self, name: str, count: int, seed: int, labelled: bool = True) -> None:
        random = np.random.default_rng(seed)
        self.name = name
        self.tokens = [np.concatenate([[1], random.integers(3, 50, random.integers(3, 15)), [2]]) for _ in range(count)]
        labels = np.array([int((tokens > 26).mean() > 0.42) for tokens in self.tokens], dtype=np.int64)
        self.labels = labels if labelled else None
        self.digests = np.array([f"s{seed}-{i}".encode() for i in range(count)], dtype="S16")

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, index: np.ndarray) -> dict[str, np.ndarray]:
        rows = [self.tokens[i] for i in index]
        longest = max(len(row) for row in rows)
        ids = np.zeros((len(rows), longest), dtype=np.int64)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        return {"input_ids": ids, "attention_mask": mask}


def bundle(kind: type = Pictures, train: int = 96, transfer: int = 0) -> DataBundle:
    """Train, validation and perhaps transfer."""
    splits = {"train": kind("train", train, 1), "validation": kind("validation", 40, 2)}
    if transfer:
        splits["transfer"] = kind("transfer", transfer, 3, labelled=False)
    return DataBundle(splits, ("a", "b"), "toy", {name: name for name in splits})


class ConvNet(nn.Module):
    """Two stages and a linear head on 2x2 places, with batch norm and dropout."""

    def __init__(self, width: int, classes: int = 4) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.stage2 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU())
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(8 * width, classes)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stage2(self.stage1(image))
        return self.head(self.drop(nn.functional.avg_pool2d(x, 3).flatten(1)))


class Attention(nn.Module):
    """Plain self-attention with the usual names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_attention_heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            f(x).view(batch, tokens, self.num_attention_heads, -1).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=(mask != 0)[:, None, None, :])
        return mixed.transpose(1, 2).reshape(batch, tokens, width)


class Block(nn.Module):
    """Attention and feed-forward with residuals."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.norm = nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x), mask)
        return x + self.feed(x)


class Transformer(nn.Module):
    """Classifier of token sequences."""

    def __init__(self, layers: int, width: int = 16, heads: int = 2, classes: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, attention_mask)
        keep = attention_mask[..., None].float()
        return self.head((x * keep).sum(1) / keep.sum(1))


def convnet(width: int, seed: int) -> ConvNet:
    """A network with its own seed."""
    torch.manual_seed(seed)
    return ConvNet(width).eval()


def transformer(layers: int, seed: int, width: int = 16, heads: int = 2) -> Transformer:
    """A network with its own seed."""
    torch.manual_seed(seed)
    return Transformer(layers, width, heads).eval()


def main(settings: dict, folder: str, die_at: int) -> None:
    """One distillation; the process ends without warning at the given batch. Writes the student and its history."""
    from compressor.distil.loop import distil

    data, out = bundle(), Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    data.splits["train"].die_at = die_at
    student, config = convnet(3, 5), DistilStage.model_validate(settings)
    result = distil(
        student,
        convnet(8, 6),
        data,
        config,
        seed=3,
        work=out / "work",
        bank=out / "bank",
        teacher_digest="t",
        signals={},
        checkpoint_seconds=0.0 if die_at % 2 else 300.0,
    )
    torch.save(student.state_dict(), out / "student.pt")
    losses = [(record.loss, record.score, sorted(record.terms.items())) for record in result.history]
    (out / "history.json").write_text(json.dumps([result.best_epoch, result.steps, losses]))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
