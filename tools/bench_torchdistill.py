"""The same distillation by this tool and by torchdistill, step by step in turns: time of a step, final accuracy.

    pip install --no-deps --target build/torchdistill torchdistill==1.1.5 torchvision==0.28.0
    python -m tools.bench_torchdistill build/torchdistill [--rounds 3] [--epochs 4]

Both train the same student from the same weights on the same batches of Fashion-MNIST, taught by the same online
teacher: 0.5 cross-entropy + 0.5 tau^2 KL at tau 2, fused AdamW, cosine decay. torchdistill runs its
DistillationBox, WeightedSumLoss of one KDLoss and its data loader, in the loop of its image-classification example. Its
step is given twice: whole, and without its data loader (ours always includes the loading).

torchdistill imports torchvision for its models. PyPI's Linux wheels of torchvision link to CUDA, so beside a CPU build
of torch their compiled detection operators cannot be loaded: two of their signatures are declared, so that the Python
part can be imported. Nothing of torchvision takes part in the comparison.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import logging
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from compressor.data.types import DataBundle
from compressor.distil.loop import distil
from compressor.distil.result import ignore
from compressor.distil.setup import seed_of
from compressor.distil.stream import TrainingSet
from compressor.recipe import DistilStage
from compressor.types import Array, Inputs
from tools.bench_distil import network, now
from tools.bench_methods.pictures import Pictures, raw, split

TEMPERATURE, RATE, BATCH = 2.0, 2e-3, 64
WIDTHS = 8, 24  # student, teacher
NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def load_rival(folder: Path) -> str:
    """Make torchdistill importable from its folder; its version and torchvision's."""
    sys.path.append(str(folder.resolve()))
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", NMS)
        importlib.import_module("torchvision")
    importlib.import_module("torchdistill.losses.mid_level")  # registers KDLoss
    logging.getLogger("torchdistill").setLevel(logging.WARNING)
    found = {name: importlib.metadata.version(name) for name in ("torchdistill", "torchvision")}
    return ", ".join(f"{name} {version}" for name, version in found.items())


def rival_config(epochs: int, order: list[int]) -> dict[str, Any]:
    """What a torchdistill YAML file of this experiment would hold."""
    logits = {"student_module_path": ".", "student_module_io": "output"}
    logits |= {"teacher_module_path": ".", "teacher_module_io": "output"}
    kd = {"key": "KDLoss", "kwargs": {**logits, "temperature": TEMPERATURE, "alpha": 0.5}}
    return {
        "num_epochs": epochs,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": lambda _dataset: order},
            "kwargs": {"batch_size": BATCH, "num_workers": 0},
        },
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "scheduler": {
            "key": "CosineAnnealingLR",
            "kwargs": {"T_max": epochs * len(order) // BATCH},
            "scheduling_step": 1,
        },
        "optimizer": {"key": "AdamW", "kwargs": {"lr": RATE, "weight_decay": 0.0, "fused": True}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": kd, "weight": 1.0}}},
        },
    }


class Rival:
    """torchdistill's training, advanced one step at a time."""

    def __init__(self, student: nn.Module, teacher: nn.Module, data: Pictures, orders: list[list[int]]) -> None:
        core = importlib.import_module("torchdistill.core.distillation")
        assert data.labels is not None
        dataset = TensorDataset(torch.from_numpy(data.pictures), torch.from_numpy(data.labels))
        self._orders, self._current = orders, list(orders[0])
        config = rival_config(len(orders), self._current)
        self.box = core.get_distillation_box(
            teacher.eval(), student, {"train": dataset}, config, torch.device("cpu"), None, False, 1
        )
        self.whole: list[float] = []
        self.computed: list[float] = []
        self._batches = self._loop()

    def _loop(self) -> Iterator[tuple[Any, Any, Any]]:
        for epoch, order in enumerate(self._orders):
            self._current[:] = order
            self.box.pre_epoch_process(epoch=epoch)
            yield from self.box.train_data_loader
            self.box.post_epoch_process()

    def step(self, labels: Array) -> None:
        """One batch, which must be the one with these labels."""
        start = now()
        pictures, targets, more = next(self._batches)
        loaded = now()
        loss = self.box.forward_process(pictures, targets, more)
        self.box.post_forward_process(loss=loss)
        self.whole.append(now() - start)
        self.computed.append(now() - loaded)
        assert np.array_equal(targets.numpy(), labels), "the two arms see different batches"


class Turns(Pictures):
    """Our data: asked for a batch, it first lets the rival take its step on the same samples."""

    def __init__(self, source: Pictures) -> None:
        super().__init__(source.name, source.pictures, source.labels, source.digests)
        self.rival: Rival | None = None
        self.racing = False
        self.ours: list[float] = []
        self._left: float | None = None

    def start(self, kind: str, _fields: Mapping[str, Any]) -> None:
        """Once the precision is decided, every request is a step."""
        self.racing = self.racing or kind == "precision"

    def batch(self, index: Array) -> Inputs:
        asked = now()
        if self.rival is None or not self.racing:
            return super().batch(index)
        if self._left is not None:
            self.ours.append(asked - self._left)
        assert self.labels is not None
        torch.use_deterministic_algorithms(False)  # a cost of ours alone
        self.rival.step(self.labels[index])
        torch.use_deterministic_algorithms(True, warn_only=True)
        self._left = now()
        return super().batch(index)


def settings(epochs: int) -> DistilStage:
    """The stage of our arm, equal to the rival's configuration."""
    kd = {"use": "kd", "weight": 0.5, "options": {"temperature": TEMPERATURE}}
    keys = {"learning_rate": RATE, "weight_decay": 0.0, "schedule": "cosine", "warmup": 0.0, "clip": None}
    more = {"kind": "distil", "epochs": epochs, "batch": BATCH, "labels": 0.5, "precision": "fp32", "cache": "off"}
    return DistilStage.model_validate(keys | more | {"objective": [kd]})


def train(student: nn.Module, teacher: nn.Module | None, data: Pictures, stage: DistilStage, seed: int) -> None:
    """Our arm (or, without a teacher, training on the labels)."""
    with tempfile.TemporaryDirectory() as folder:
        distil(
            student, teacher, DataBundle({"train": data}, (), "fashion-mnist", {}), stage, seed=seed,
            work=Path(folder) / "work", bank=Path(folder) / "bank", teacher_digest="bench", signals={},
            labels_only=teacher is None, on_event=data.start if isinstance(data, Turns) else ignore,
        )  # fmt: skip


def accuracy(module: nn.Module, test: Pictures) -> float:
    """Right answers in per cent."""
    module.eval()
    with torch.no_grad():
        parts = [module(torch.from_numpy(part)).argmax(-1) for part in np.array_split(test.pictures, 20)]
    return 100 * float((torch.cat(parts).numpy() == test.labels).mean())


def race(teacher: nn.Module, data: Pictures, test: Pictures, epochs: int, seed: int) -> dict[str, float]:
    """Both arms once: median steps in ms after the first epoch, and accuracies."""
    orders = [
        [int(i) for batch in TrainingSet([data]).order(epoch, BATCH, seed_of(seed, "order")) for i in batch]
        for epoch in range(epochs)
    ]
    turns, theirs, ours = Turns(data), network(WIDTHS[0], 100 + seed), network(WIDTHS[0], 100 + seed)
    turns.rival = Rival(theirs, teacher, data, orders)
    train(ours, teacher, turns, settings(epochs), seed)
    warm = len(data) // BATCH
    steps = {name: 1000 * statistics.median(values[warm:]) for name, values in
             (("ours", turns.ours), ("whole", turns.rival.whole), ("computed", turns.rival.computed))}  # fmt: skip
    return steps | {"accuracy": accuracy(ours, test), "their accuracy": accuracy(theirs, test)}


def main() -> None:
    """Parse, race, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where torchdistill and torchvision were installed")
    parser.add_argument("--rounds", type=int, default=3, help="seeds")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, default=9984, help="a multiple of the batch of 64")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    versions = load_rival(arguments.folder)
    pictures, labels = raw("train")
    data = split("train", pictures[: arguments.images], labels[: arguments.images])
    test = split("test", *raw("t10k"))
    teacher = network(WIDTHS[1], 1)
    train(teacher, None, data, settings(4), 0)
    print(
        f"{versions}; teacher {accuracy(teacher, test):.2f} % on {len(test):,} test images; {arguments.epochs} epochs"
    )
    print("\n| seed | ours, ms | torchdistill, ms | without its loader, ms | ratio | ratio without its loader "
          "| our accuracy | its accuracy |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    rows = [race(teacher, data, test, arguments.epochs, seed) for seed in range(arguments.rounds)]
    for seed, row in enumerate([*rows, {key: statistics.fmean(r[key] for r in rows) for key in rows[0]}]):
        name = str(seed) if seed < len(rows) else "mean"
        print(f"| {name} | {row['ours']:.2f} | {row['whole']:.2f} | {row['computed']:.2f} "
              f"| {row['ours'] / row['whole']:.3f} | {row['ours'] / row['computed']:.3f} "
              f"| {row['accuracy']:.2f} % | {row['their accuracy']:.2f} % |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
