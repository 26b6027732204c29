"""What the training loop costs: ratios from one interleaved run, printed as a table (or JSON with ``--json``).

- ``step / hand-written``: an epoch of ``distil`` with an online teacher over a plain PyTorch loop that does the same
  (same student, teacher, data order size, loss, fused AdamW, clipping). Goal: at most 1.10.
- ``cached epoch / labels only``: the second epoch with the teacher in the bank over the second epoch of the null twin.
  Goal: at most 1.10.

    python tools/bench_distil.py [--rounds 7] [--samples 4096] [--batch 64] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from compressor.data.types import DataBundle
from compressor.distil.loop import distil
from compressor.recipe import DistilStage
from compressor.types import Array, Inputs

TEMPERATURE = 2.0


class Pictures:
    """28x28 grey noise with random labels: the time of a step does not depend on what is in a picture."""

    name = "train"

    def __init__(self, count: int) -> None:
        random = np.random.default_rng(0)
        self.pictures = random.normal(0, 1, (count, 1, 28, 28)).astype(np.float32)
        self.labels: Array | None = random.integers(0, 10, count)
        self.digests = np.arange(count).astype("S16")

    def __len__(self) -> int:
        return len(self.pictures)

    def batch(self, index: Array) -> Inputs:
        return {"image": self.pictures[index]}


class ConvNet(nn.Module):
    """Three 3x3 convolutions with batch norm, two of them strided, and a linear head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        stages = []
        for inputs, outputs, stride in ((1, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2)):
            stages.append(
                nn.Sequential(
                    nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
                    nn.BatchNorm2d(outputs),
                    nn.ReLU(),
                )
            )
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(4 * width, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.stages(image).mean(dim=(2, 3)))


def network(width: int, seed: int) -> ConvNet:
    """A network with a seed of its own."""
    torch.manual_seed(seed)
    return ConvNet(width)


class HandWritten:
    """The loop one would write for this one job, memory order and fused kernels included."""

    def __init__(self, data: Pictures, config: DistilStage, widths: tuple[int, int]) -> None:
        self.student = network(widths[0], 1).to(memory_format=torch.channels_last)
        self.teacher = network(widths[1], 2).eval()
        self.data, self.config = data, config
        decay = [p for p in self.student.parameters() if p.dim() > 1]
        plain = [p for p in self.student.parameters() if p.dim() <= 1]
        groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
        total = config.epochs * -(-len(data) // config.batch)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimiser, total)
        self.labels = torch.from_numpy(data.labels)

    def epoch(self) -> float:
        """Seconds of one epoch."""
        self.student.train()
        order = np.random.default_rng(0).permutation(len(self.data))
        parameters = list(self.student.parameters())
        start = time.perf_counter()
        for first in range(0, len(order), self.config.batch):
            index = order[first : first + self.config.batch]
            image = torch.from_numpy(self.data.batch(index)["image"]).to(memory_format=torch.channels_last)
            with torch.no_grad():
                taught = self.teacher(image)
            logits = self.student(image)
            soft = F.kl_div(
                F.log_softmax(logits / TEMPERATURE, -1), F.softmax(taught / TEMPERATURE, -1), reduction="batchmean"
            )
            loss = 0.5 * F.cross_entropy(logits, self.labels[index]) + 0.5 * TEMPERATURE**2 * soft
            self.optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
            self.optimiser.step()
            self.schedule.step()
            if first % (100 * self.config.batch) == 0 and not np.isfinite(loss.item()):
                raise RuntimeError("the loss is not finite")
        return time.perf_counter() - start


def ours(
    data: Pictures, config: DistilStage, widths: tuple[int, int], folder: Path, *, labels_only: bool
) -> list[float]:
    """Seconds of each epoch of ``distil``."""
    work = Path(tempfile.mkdtemp(dir=folder))
    result = distil(
        network(widths[0], 1), network(widths[1], 2), DataBundle({"train": data}, (), "bench", {}), config,
        seed=0, work=work, bank=folder / "bank", teacher_digest="bench", signals={}, labels_only=labels_only,
    )  # fmt: skip
    return [record.seconds for record in result.history]


def measure(rounds: int, samples: int, batch: int, widths: tuple[int, int]) -> dict[str, float]:
    """Medians of the ratios of neighbours in time, after one round that warms up."""
    data = Pictures(samples)

    def stage(cache: str) -> DistilStage:
        return DistilStage.model_validate(
            {"kind": "distil", "epochs": 2, "batch": batch, "precision": "fp32", "cache": cache}
        )

    hand = HandWritten(data, stage("off"), widths)
    ratios: dict[str, list[float]] = {"step": [], "cached": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def run(cache: str, twin: bool) -> float:
            return ours(data, stage(cache), widths, folder, labels_only=twin)[1]

        for number in range(rounds + 1):
            first, online, second = hand.epoch(), run("off", False), hand.epoch()
            before, cached, after = run("on", True), run("on", False), run("on", True)
            if number:
                ratios["step"].append(online / ((first + second) / 2))
                ratios["cached"].append(cached / ((before + after) / 2))
    return {
        "step over hand-written": statistics.median(ratios["step"]),
        "cached epoch over labels only": statistics.median(ratios["cached"]),
        "steps an epoch": -(-samples // batch),
        "hand-written ms a step": 1000 * second / -(-samples // batch),
        "rounds": rounds,
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--widths", type=int, nargs=2, default=(8, 24), metavar=("STUDENT", "TEACHER"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = measure(arguments.rounds, arguments.samples, arguments.batch, tuple(arguments.widths))
    if arguments.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:32s} {value:8.3f}" if isinstance(value, float) else f"{name:32s} {value:8d}")


if __name__ == "__main__":
    main()
