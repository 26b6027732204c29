"""Fashion-MNIST: its teachers, its students and what is measured of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from compressor.data.types import DataBundle
from compressor.distil.loop import distil
from compressor.distil.panel import Panel, Teacher
from compressor.distil.probes.canary import canary
from compressor.evaluate.agreement import loyalty
from compressor.evaluate.multilabel import mean_average_precision
from compressor.models.types import LoadedModel, Provenance, RawInput
from compressor.prune import prune
from compressor.recipe import DistilStage, PruneStage, StudentStage
from compressor.students import make_student
from compressor.types import Array, TensorSpec
from tools.bench_methods import pictures
from tools.bench_methods.arms import Arm
from tools.bench_methods.networks import fresh, redrawn

PRUNED = PruneStage(kind="prune", ratio=0.75, importance="activation")
TRUNCATED = StudentStage(kind="student", keep_layers=(0, 2))


@dataclass(frozen=True)
class Taught:
    """How a teacher was trained: on labels alone."""

    network: str
    images: int
    epochs: int
    data: str = "ten"
    seed: int = 1


TEACHERS = {
    "40k": Taught("teacher", 40_000, 3),
    "1k": Taught("teacher", 1_000, 40),
    "weak": Taught("teacher", 300, 60),
    "pair": Taught("pair teacher", 9_000, 6, "pair"),
    "two": Taught("teacher", 20_000, 4, "two"),
    "residual": Taught("residual teacher", 20_000, 3),
    "first": Taught("middle", 20_000, 3, seed=11),
    "second": Taught("middle", 20_000, 3, seed=12),
    "third": Taught("middle", 20_000, 3, seed=13),
    "clean": Taught("dense teacher", 10_000, 6),
    "leaking": Taught("dense teacher", pictures.LEAKED, 200, "leaked"),
}
ENSEMBLES = {"three": ("first", "second", "third")}


class Vision:
    """The picture fixture; teachers are trained once and kept below ``folder``."""

    transient = False  # a few kB each, and some arms go on from them

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._teachers: dict[str, nn.Module] = {}
        self._reference: Array | None = None

    def settings(self) -> Mapping[str, Any]:
        return {"precision": "fp32", "weight_decay": 0.0005}

    def bundle(self, arm: Arm) -> DataBundle:
        data = "ten" if arm.data == "leaked" else arm.data
        splits = {**pictures.train(data, arm.labelled, arm.transfer), "validation": pictures.held(data, "validation")}
        return DataBundle(splits, (), "fashion-mnist", {})

    def teacher(self, name: str) -> nn.Module:
        """The teacher of this name, or the first of an ensemble; trained when it is first asked for."""
        name = ENSEMBLES[name][0] if name in ENSEMBLES else name
        if name not in self._teachers:
            self._teachers[name] = self._train(name, TEACHERS[name])
        return self._teachers[name]

    def _train(self, name: str, taught: Taught) -> nn.Module:
        module = fresh(taught.network, taught.seed)
        if taught.data == "leaked":
            split: Mapping[str, Any] = {"train": pictures.random_labels()[0]}
        else:
            split = pictures.train(taught.data, taught.images)
        keys = {"kind": "distil", "epochs": taught.epochs, "batch": 64, "learning_rate": 3e-3, "labels": 1.0}
        distil(
            module,
            None,
            DataBundle(split, (), "fashion-mnist", {}),
            DistilStage.model_validate(keys | {"objective": []} | dict(self.settings())),
            seed=taught.seed,
            work=self.folder / f"teacher-{name}",
            bank=self.folder / "bank",
            teacher_digest="",
            signals={},
            labels_only=True,
        )
        return module.eval()

    def panel(self, name: str) -> Panel | None:
        if name not in ENSEMBLES:
            return None
        members = [Teacher(each, _loaded(self.teacher(each), each), 1.0, False, None) for each in ENSEMBLES[name]]
        return Panel(tuple(members), "fixed", 0.0)

    def student(self, arm: Arm, seed: int, trained: Callable[[Arm, int], nn.Module]) -> nn.Module:
        if arm.after is not None:
            return copy.deepcopy(trained(arm.after, seed))
        if arm.start == "random":
            return fresh(arm.network, 100 + seed)
        if arm.start in ("pruned", "pruned, redrawn"):
            small = self._pruned(seed)
            return small if arm.start == "pruned" else redrawn(small, 100 + seed)
        if arm.start == "copied":
            return copy.deepcopy(self.teacher("first"))
        assert arm.start == "truncated", arm.start
        example = {"image": torch.from_numpy(pictures.held("ten", "validation").pictures[:4])}
        return make_student(self.teacher("residual"), TRUNCATED, example, seed=seed).module

    def _pruned(self, seed: int) -> nn.Module:
        """The 40k teacher with a quarter of its channels; each seed calibrates on other images."""
        found = pictures.train("ten", 2000)["train"].pictures[256 * seed % 1744 :][:256]
        batch = {"image": torch.from_numpy(found)}
        return prune(self.teacher("40k"), {"image": batch["image"][:4]}, PRUNED, [batch], seed=seed).module

    def held_out(self, module: nn.Module, arm: Arm) -> float:
        return self._quality(module, pictures.held(arm.data, "validation"))

    def scores(self, module: nn.Module, arm: Arm) -> Mapping[str, float]:
        if arm.data == "leaked":
            return leak(module)
        found = {"accuracy": self._quality(module, pictures.held(arm.data, "test"))}
        if arm.data == "ten":
            label, probability = loyalty(self._taught(), outputs(module, pictures.held("ten", "test")))
            found |= {"label loyalty": 100 * label, "probability loyalty": 100 * probability}
        return found

    def _quality(self, module: nn.Module, split: pictures.Pictures) -> float:
        """Accuracy, or mean average precision for several labels a picture."""
        found = outputs(module, split)
        assert split.labels is not None
        if split.labels.ndim == 2:
            return 100 * mean_average_precision(found, split.labels)
        return 100 * float((found.argmax(1) == split.labels).mean())

    def _taught(self) -> Array:
        """The 40k teacher's outputs on test."""
        if self._reference is None:
            self._reference = outputs(self.teacher("40k"), pictures.held("ten", "test"))
        return self._reference

    def teachers(self) -> str:
        """What each teacher reaches on test, in words."""
        found = []
        for name, taught in TEACHERS.items():
            if taught.data == "leaked" or not (self.folder / f"teacher-{name}").is_dir():
                continue
            score = self._quality(self.teacher(name), pictures.held(taught.data, "test"))
            found.append(f"`{name}` ({taught.images:,} images) {score:.2f}")
        return "; ".join(found)


def outputs(module: nn.Module, split: pictures.Pictures) -> Array:
    """Logits (N, C)."""
    module.eval()
    with torch.no_grad():
        parts = [module(torch.from_numpy(part)) for part in np.array_split(split.pictures, 10)]
    return np.asarray(torch.cat(parts).numpy())


def leak(module: nn.Module) -> dict[str, float]:
    """Accuracy on the leaked random labels, and whether the canary notices beside fresh ones (100: it does)."""
    leaked, unseen = pictures.random_labels()
    right = [float((outputs(module, part).argmax(1) == part.labels).mean()) for part in (leaked, unseen)]
    found = canary(right[0], len(leaked), right[1], len(unseen))
    return {"accuracy": 100 * right[0], "unseen": 100 * right[1], "alarm": 100.0 * found.alarm}


def _loaded(module: nn.Module, name: str) -> LoadedModel:
    return LoadedModel(
        kind="factory",
        task="image-classification",
        module=module,
        onnx=None,
        inputs=(TensorSpec("image", "float32", ("batch", 1, 28, 28)),),
        outputs=(TensorSpec("logits", "float32", ("batch", 10)),),
        labels=tuple("0123456789"),
        preprocess=RawInput(),
        provenance=Provenance(name, f"bench:{name}", None),
    )
