"""Movie reviews: a six-layer MiniLM teaches three of its own layers; logits of the teacher are computed once."""

from __future__ import annotations

import copy
import csv
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from compressor.data.raw import RawPart
from compressor.data.split import split_indices
from compressor.data.text import TextSplit, token_store
from compressor.data.types import DataBundle
from compressor.distil.panel import Panel
from compressor.evaluate.agreement import loyalty
from compressor.models.load import load_model
from compressor.models.types import LoadedModel
from compressor.recipe import DataConfig, StudentStage, TeacherConfig
from compressor.students import make_student
from compressor.types import Array
from tools.bench_methods.arms import Arm

TEACHER, REVIEWS = Path("build/movie-teacher"), Path("build/movie-reviews")
KEPT = StudentStage(kind="student", keep_layers=(1, 3, 5))
DEVIATION = 0.02  # of new weights, as BERT draws them


def missing() -> str:
    """What has to be made first; empty when nothing is missing."""
    if (TEACHER / "config.json").is_file() and (REVIEWS / "test.csv").is_file():
        return ""
    return "run `python -m examples.movie_reviews.prepare` and `python -m examples.movie_reviews.train_teacher` first"


class Text:
    """The text fixture."""

    transient = True  # students weigh 50 MB each: they are not kept

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._splits: dict[str, TextSplit] = {}

    @cached_property
    def model(self) -> LoadedModel:
        return load_model(TeacherConfig(model=str(TEACHER), task="text-classification"), data=DataConfig())

    def settings(self) -> Mapping[str, Any]:
        return {"precision": "bf16", "freeze": ("*embeddings*",)}

    def teacher(self, name: str) -> nn.Module | None:  # noqa: ARG002
        return self.model.module

    def panel(self, name: str) -> Panel | None:  # noqa: ARG002
        return None

    def split(self, name: str) -> TextSplit:
        """``train``, ``validation`` (a tenth of the training file, as the teacher's was), ``transfer`` or ``test``."""
        if name not in self._splits:
            texts, labels = self._read("train" if name == "validation" else name)
            rows = np.arange(len(texts))
            if name in ("train", "validation"):
                held = {"validation": round(0.1 * len(texts)), "calibration": 256}
                rows = split_indices(len(texts), held, seed=0)[name]
            rows = np.random.default_rng(0).permutation(rows)  # the file is sorted, and arms take the first ones
            part = RawPart("texts", [texts[row] for row in rows])
            found = None if name == "transfer" else labels[rows]
            store = token_store(part, self.model)
            self._splits[name] = TextSplit(name, found, part.digests(), store, np.arange(len(part)))
        return self._splits[name]

    def _read(self, name: str) -> tuple[list[str], Array]:
        with (REVIEWS / f"{name}.csv").open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        found = [self.model.labels.index(row["label"]) if row.get("label") else -100 for row in rows]
        return [row["text"] for row in rows], np.array(found, np.int64)

    def bundle(self, arm: Arm) -> DataBundle:
        splits = {"train": _first(self.split("train"), arm.labelled), "validation": self.split("validation")}
        if arm.transfer:
            splits["transfer"] = _first(self.split("transfer"), arm.transfer)
        return DataBundle(splits, self.model.labels, "movie-reviews", {})

    def student(self, arm: Arm, seed: int, trained: Callable[[Arm, int], nn.Module]) -> nn.Module:  # noqa: ARG002
        assert self.model.module is not None
        example = {
            name: torch.from_numpy(array) for name, array in self.split("validation").batch(np.arange(4)).items()
        }
        module = make_student(self.model.module, KEPT, example, seed=seed).module
        return _redrawn(module, 100 + seed) if arm.start == "random" else module

    def held_out(self, module: nn.Module, arm: Arm) -> float:  # noqa: ARG002
        return _accuracy(outputs(module, self.split("validation")), self.split("validation"))

    def scores(self, module: nn.Module, arm: Arm) -> Mapping[str, float]:  # noqa: ARG002
        found = outputs(module, self.split("test"))
        label, probability = loyalty(self.taught(), found)
        accuracy = _accuracy(found, self.split("test"))
        return {"accuracy": accuracy, "label loyalty": 100 * label, "probability loyalty": 100 * probability}

    def taught(self) -> Array:
        """The teacher's logits on test, computed once."""
        path = self.folder / "teacher-shuffled-test.npy"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            assert self.model.module is not None
            np.save(path, outputs(self.model.module, self.split("test")))
        return np.asarray(np.load(path))

    def teachers(self) -> str:
        """What the teacher reaches on test."""
        return f"MiniLM-L6 {_accuracy(self.taught(), self.split('test')):.2f}"


def _first(split: TextSplit, count: int) -> TextSplit:
    labels = None if split.labels is None else split.labels[:count]
    return TextSplit(split.name, labels, split.digests[:count], split.store, split.rows[:count])


def _redrawn(module: nn.Module, seed: int) -> nn.Module:
    """New weights everywhere but in the embeddings."""
    made = copy.deepcopy(module)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for name, part in made.named_modules():
            if "embeddings" in name:
                continue
            if isinstance(part, nn.Linear):
                part.weight.normal_(0.0, DEVIATION)
                part.bias.zero_()
            elif isinstance(part, nn.LayerNorm):
                part.reset_parameters()
    return made


def outputs(module: nn.Module, split: TextSplit, batch: int = 64) -> Array:
    """Logits (N, C), in the split's order; texts of like length are run together."""
    order = np.argsort(split.lengths, kind="stable")
    found: list[Array] = []
    module.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):  # as they were trained
        for index in np.array_split(order, -(-len(order) // batch)):
            inputs = {name: torch.from_numpy(array) for name, array in split.batch(index).items()}
            found.append(module(**inputs).float().numpy())
    made = np.concatenate(found)
    return np.asarray(made[np.argsort(order, kind="stable")])


def _accuracy(found: Array, split: TextSplit) -> float:
    return 100 * float((found.argmax(1) == split.labels).mean())
