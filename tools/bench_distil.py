"""What the training loop costs: ratios from one interleaved run, printed as a table (or JSON with ``--json``).

- ``step over hand-written``: a step of ``distil`` with an online teacher over a plain PyTorch step that does the same
  (same student, teacher, batch, loss, fused AdamW, schedule, clipping). Goal: at most 1.05.
- ``cached step over labels only``: a step with the teacher in the bank over a plain step without a teacher. Goal: 1.10.

    python -m tools.bench_distil [--rounds 3] [--samples 4096] [--batch 64] [--json]
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


def now() -> float:
    """Processor seconds with one thread, which other programs do not lengthen; wall-clock seconds with several."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class HandWritten:
    """The step one would write for this one job, memory order and fused kernels included."""

    def __init__(self, config: DistilStage, widths: tuple[int, int], steps: int, *, teacher: bool) -> None:
        self.student = network(widths[0], 1).to(memory_format=torch.channels_last).train()
        self.teacher = network(widths[1], 2).eval() if teacher else None
        self.parameters = list(self.student.parameters())
        decay = [p for p in self.parameters if p.dim() > 1]
        plain = [p for p in self.parameters if p.dim() <= 1]
        groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimiser, steps)

    def step(self, pictures: Array, labels: Array) -> None:
        """Train on one batch."""
        image = torch.from_numpy(pictures).to(memory_format=torch.channels_last)
        logits = self.student(image)
        loss = F.cross_entropy(logits, torch.from_numpy(labels))
        if self.teacher is not None:
            with torch.no_grad():
                taught = self.teacher(image)
            soft = F.kl_div(
                F.log_softmax(logits / TEMPERATURE, -1), F.softmax(taught / TEMPERATURE, -1), reduction="batchmean"
            )
            loss = 0.5 * loss + 0.5 * TEMPERATURE**2 * soft
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimiser.step()
        self.schedule.step()


class Interleaved(Pictures):
    """Asked for a batch, it first runs one hand-written step: the two loops take turns step by step.

    A step of ``distil`` lasts from one request to the next, so both are timed under the same load of the machine.
    """

    def __init__(self, count: int, size: int, rival: HandWritten) -> None:
        super().__init__(count)
        self.size, self.rival = size, rival
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self._left: float | None = None

    def batch(self, index: Array) -> Inputs:
        asked = now()
        if len(index) != self.size:  # the bank is being filled, or shapes are looked at
            self._left = None
            return super().batch(index)
        if self._left is not None:
            self.ours.append(asked - self._left)
        torch.use_deterministic_algorithms(False)  # a cost of ours alone
        start = now()
        self.rival.step(self.pictures[index], self.labels[index])
        self.theirs.append(now() - start)
        torch.use_deterministic_algorithms(True, warn_only=True)
        self._left = now()
        return super().batch(index)

    def ratio(self, warm: int) -> float:
        """Median step of ours over median step of theirs, without the first ones."""
        return statistics.median(self.ours[warm:]) / statistics.median(self.theirs[warm:])


def race(cache: str, samples: int, batch: int, widths: tuple[int, int], folder: Path) -> Interleaved:
    """Two epochs of ``distil`` against the hand-written step: with its teacher, or without when ours is cached."""
    config = DistilStage.model_validate(
        {"kind": "distil", "epochs": 2, "batch": batch, "precision": "fp32", "cache": cache}
    )
    rival = HandWritten(config, widths, 2 * (samples // batch), teacher=cache == "off")
    data = Interleaved(samples, batch, rival)
    distil(
        network(widths[0], 1),
        network(widths[1], 2),
        DataBundle({"train": data}, (), "bench", {}),
        config,
        seed=0,
        work=Path(tempfile.mkdtemp(dir=folder)),
        bank=folder / "bank",
        teacher_digest="bench",
        signals={},
    )
    return data


def measure(rounds: int, samples: int, batch: int, widths: tuple[int, int]) -> dict[str, float]:
    """Medians over rounds of the ratios of the second epoch."""
    found: dict[str, list[float]] = {"off": [], "on": []}
    steps = samples // batch
    with tempfile.TemporaryDirectory() as name:
        for _ in range(rounds):
            for cache, ratios in found.items():
                data = race(cache, steps * batch, batch, widths, Path(name))
                ratios.append(data.ratio(steps))
    return {
        "step over hand-written": statistics.median(found["off"]),
        "cached step over labels only": statistics.median(found["on"]),
        "labels-only step (ms)": 1000 * statistics.median(data.theirs[steps:]),
        "steps": steps,
        "rounds": rounds,
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--widths", type=int, nargs=2, default=(8, 24), metavar=("STUDENT", "TEACHER"))
    parser.add_argument("--threads", type=int, default=1)
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
