"""Do the objectives help? Paired seeds on Fashion-MNIST, each row an objective against its null twin.

    python -m tools.bench_methods [ROW ...] [--seeds 5] [--steps 300] [--out docs/evidence/methods.md] [--list]

Both arms of a row share student, initial weights, images, order and steps; settings are fixed in advance, the same for
all rows, and the test images only score the result. The verdict is `5/5` when every seed wins, `better` or `worse` when
the 90 % interval of the mean difference lies on one side of 0, and `no difference shown` otherwise.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from compressor.data.types import DataBundle
from compressor.distil.loop import distil
from compressor.distil.probes.paired import interval, verdict
from compressor.recipe import DistilStage
from compressor.types import Array, Inputs

FOLDER = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist
TEST_IMAGES = 5000
BATCH = 64


def read(name: str, offset: int) -> Array:
    """Bytes of an IDX file behind its header."""
    return np.frombuffer(gzip.decompress((FOLDER / name).read_bytes()), np.uint8, offset=offset)


class Pictures:
    """A range of Fashion-MNIST as a split."""

    def __init__(self, name: str, part: str, start: int, stop: int) -> None:
        self.name = name
        raw = read(f"{part}-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)[start:stop]
        self.pictures = (raw.astype(np.float32) / 255 - 0.286) / 0.353  # mean and deviation of the training set
        self.labels: Array | None = read(f"{part}-labels-idx1-ubyte.gz", 8)[start:stop].astype(np.int64)
        self.digests = np.array([hashlib.sha256(picture.tobytes()).digest()[:16] for picture in raw], dtype="S16")

    def __len__(self) -> int:
        return len(self.pictures)

    def batch(self, index: Array) -> Inputs:
        return {"image": self.pictures[index]}


class ConvNet(nn.Module):  # type: ignore[misc]  # torch is not typed here
    """Three 3x3 convolutions with batch norm, two of them strided, and a linear head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths, stages = [1, width, 2 * width, 4 * width], []
        for place, stride in enumerate((2, 1, 2)):
            convolution = nn.Conv2d(widths[place], widths[place + 1], 3, stride=stride, padding=1, bias=False)
            stages.append(nn.Sequential(convolution, nn.BatchNorm2d(widths[place + 1]), nn.ReLU()))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(4 * width, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.stages(image).mean(dim=(2, 3)))


def network(width: int, seed: int) -> ConvNet:
    """A network with weights of its own seed."""
    torch.manual_seed(seed)
    return ConvNet(width)


def accuracy(module: nn.Module, test: Pictures) -> float:
    """Right answers, in per cent."""
    module.eval()
    with torch.no_grad():
        parts = [module(torch.from_numpy(part)).argmax(-1) for part in np.array_split(test.pictures, 10)]
    return 100 * float((torch.cat(parts).numpy() == test.labels).mean())


@dataclass(frozen=True)
class Arm:
    """How one student is trained: its images, and the keys of the distil stage."""

    images: int
    stage: Mapping[str, Any]


def objective(use: str, weight: float = 1.0, **options: Any) -> dict[str, Any]:
    """One table of a recipe."""
    return {"use": use, "weight": weight, "options": options}


def labels_only(images: int) -> Arm:
    return Arm(images, {"labels": 1.0, "objective": []})


@dataclass(frozen=True)
class Row:
    """A claim: the arm is better than its null twin, with a teacher that saw so many images."""

    claim: str
    arm: Arm
    twin: Arm
    teacher_images: int = 10_000


def rows() -> dict[str, Row]:
    """The rows by name; unlabelled means that the student is shown the images alone."""
    kd = {"labels": 0.5, "objective": [objective("kd", 0.5, temperature=2.0)]}
    found = {}
    for images in (500, 2000):
        twin = labels_only(images)
        ranked = Arm(images, {"labels": 0.0, "objective": [objective("plackett-luce")]})
        found[f"kd-{images}"] = Row(f"kd > labels, {images} images", Arm(images, kd), twin)
        found[f"plackett-luce-{images}"] = Row(f"plackett-luce > labels, {images} images", ranked, twin)
    unlabelled = Arm(5000, {"labels": 0.0, "objective": [objective("symmetric-kl")]})
    claim = "symmetric-kl on 5000 unlabelled images > 1000 labels, teacher of the same 1000"
    found["symmetric-kl"] = Row(claim, unlabelled, labels_only(1000), teacher_images=1000)
    return found


class Bench:
    """Trains each arm once a seed, however many rows share it."""

    def __init__(self, steps: int, folder: Path) -> None:
        self.steps, self.folder = steps, folder
        self.test = Pictures("test", "t10k", 0, TEST_IMAGES)
        self._teachers: dict[int, nn.Module] = {}
        self._scores: dict[tuple[str, int], float] = {}

    def teacher(self, images: int) -> nn.Module:
        """A network four times as wide, trained on labels; one for all seeds."""
        if images not in self._teachers:
            teacher = network(24, 1)
            epochs = max(4, 20_000 // images)
            stage = {"labels": 1.0, "objective": [], "epochs": epochs}
            self._train(teacher, None, Arm(images, stage), 0, f"teacher-{images}")
            self._teachers[images] = teacher
        return self._teachers[images]

    def score(self, arm: Arm, teacher_images: int, seed: int) -> float:
        """Test accuracy of the student of this arm and seed."""
        plain = not arm.stage["objective"]
        key = f"{arm}{'' if plain else teacher_images}"
        if (key, seed) not in self._scores:
            student = network(6, 100 + seed)
            teacher = None if plain else self.teacher(teacher_images)
            name = hashlib.sha256(f"{key}{seed}".encode()).hexdigest()[:12]
            self._train(student, teacher, arm, seed, name, teacher_images)
            self._scores[key, seed] = accuracy(student, self.test)
        return self._scores[key, seed]

    def _train(
        self, model: nn.Module, teacher: nn.Module | None, arm: Arm, seed: int, name: str, teacher_images: int = 0
    ) -> None:
        epochs = max(1, round(self.steps * BATCH / arm.images))
        keys = {"kind": "distil", "epochs": epochs, "batch": BATCH, "learning_rate": 3e-3, "precision": "fp32"}
        distil(
            model,
            teacher,
            DataBundle({"train": Pictures("train", "train", 0, arm.images)}, (), "fashion-mnist", {}),
            DistilStage.model_validate(keys | dict(arm.stage)),
            seed=seed,
            work=self.folder / name,
            bank=self.folder / "bank",
            teacher_digest=f"teacher-{teacher_images}",
            signals={},
            labels_only=teacher is None,
        )
        model.eval()


def measure(row: Row, bench: Bench, seeds: int) -> str:
    """One line of the table."""
    pairs = [
        (bench.score(row.arm, row.teacher_images, seed), bench.score(row.twin, row.teacher_images, seed))
        for seed in range(seeds)
    ]
    ours, theirs = (statistics.fmean(side) for side in zip(*pairs, strict=True))
    differences = [a - b for a, b in pairs]
    low, high = interval(differences)
    wins = sum(d > 0 for d in differences)
    return (
        f"| {row.claim} | {ours:.2f} | {theirs:.2f} | {statistics.fmean(differences):+.2f} | {wins}/{seeds} "
        f"| {low:+.2f} to {high:+.2f} | {verdict(differences)} |"
    )


def page(names: Sequence[str], seeds: int, steps: int, told: Callable[[str], None]) -> str:
    """The whole table as Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(steps, Path(folder))
        lines = []
        for name in names:
            lines.append(measure(rows()[name], bench, seeds))
            told(lines[-1])
        teachers = [f"{images} images: {accuracy(net, bench.test):.2f} %" for images, net in bench._teachers.items()]
    sizes = [sum(p.numel() for p in network(width, 0).parameters()) for width in (6, 24)]
    head = (
        f"# Objectives against their null twins\n\n`python -m tools.bench_methods --seeds {seeds} --steps {steps}` on "
        f"Fashion-MNIST: students of {sizes[0]:,} parameters, a teacher of {sizes[1]:,} ({'; '.join(teachers)}), about "
        f"{steps} steps of {BATCH} images, {seeds} paired seeds, accuracy in per cent on {TEST_IMAGES:,} test "
        "images.\n\n"
        "| claim | with | twin | difference | wins | 90 % interval | verdict |\n|---|---|---|---|---|---|---|\n"
    )
    return head + "\n".join(lines) + "\n"


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW")
    parser.add_argument("--seeds", type=int, default=5, choices=range(2, 11))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(f"{name:22s} {row.claim}" for name, row in rows().items()))
        return
    if unknown := set(arguments.rows) - set(rows()):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; see --list")
    torch.set_num_threads(1)
    names = arguments.rows or list(rows())
    text = page(names, arguments.seeds, arguments.steps, lambda line: print(line, flush=True))
    if arguments.out:
        arguments.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
