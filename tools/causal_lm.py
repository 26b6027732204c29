"""What the benchmarks of the causal language model share: teacher, text in blocks, short trainings that can resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor.data.blocks import BlockSplit, packed
from compressor.data.read import read_raw
from compressor.data.text import token_store
from compressor.data.types import DataBundle
from compressor.distil.loop import distil
from compressor.distil.precision import Numerics
from compressor.models import LoadedModel, load_model
from compressor.recipe import DataConfig, DistilStage, TeacherConfig
from compressor.types import write_atomic

BLOCK = 64  # tokens
BATCH = 8  # blocks
CHUNK = 16  # blocks that are evaluated at a time
DOCUMENTS = 12_000  # of the training text: enough for every seed


@dataclass(frozen=True)
class World:
    """The teacher and the text, from ``examples.smollm2.prepare``."""

    model: LoadedModel
    text: Path

    @property
    def teacher(self) -> nn.Module:
        """In evaluation mode, float32."""
        assert self.model.module is not None
        return self.model.module

    @cached_property
    def train(self) -> BlockSplit:
        return self._blocks("train")

    @cached_property
    def validation(self) -> BlockSplit:
        return self._blocks("validation")

    @cached_property
    def test(self) -> BlockSplit:
        return self._blocks("test")

    def _blocks(self, name: str) -> BlockSplit:
        config = DataConfig(source=str(self.text / f"{name}.txt"), text="text", limit=DOCUMENTS)
        part = read_raw(config).parts["train"]
        part = replace(part, samples=list(part.samples[:DOCUMENTS]))
        store = token_store(part, self.model)
        return packed(name, store, np.arange(len(part)), self.model.inputs, labelled=True)

    def prompts(self, count: int, tokens: int) -> Tensor:
        """Beginnings of test blocks, int64 (count, tokens)."""
        step = len(self.test) // count
        return torch.from_numpy(self.test.ids[: step * count : step, :tokens].astype(np.int64))


def open_world(build: Path) -> World:
    """Load what prepare wrote below ``build``."""
    config = TeacherConfig(model=str(build / "smollm2"))
    return World(load_model(config, data=DataConfig(max_length=BLOCK)), build / "debian-text")


def drawn(split: BlockSplit, count: int, seed: int, *, skip: int = 0) -> BlockSplit:
    """``count`` blocks after the first ``skip``, drawn by the seed."""
    rows = skip + np.random.Generator(np.random.PCG64(seed)).permutation(len(split) - 1 - skip)[:count]
    assert split.labels is not None
    return replace(
        split, ids=split.ids[rows], labels=split.labels[rows], lengths=split.lengths[rows], digests=split.digests[rows]
    )


def train(
    student: nn.Module,
    teacher: nn.Module | None,
    split: BlockSplit,
    settings: Mapping[str, Any],
    *,
    seed: int,
    work: Path,
    digest: str = "",
) -> float:
    """One distil stage, or with no teacher plain training on labels; resumes in ``work``. Returns its seconds."""
    stage = DistilStage.model_validate(
        {"kind": "distil", "epochs": 1, "batch": BATCH, "precision": "bf16", "cache": "off", "labels": 0.0, **settings}
    )
    name = f"{split.name}-{len(split)}-{split.ids[:, 0].sum()}"
    data = DataBundle({"train": split}, (), "text", {"train": name})
    result = distil(
        student, teacher, data, stage, seed=seed, work=work, bank=work.parent / "bank", teacher_digest=digest,
        signals={}, labels_only=teacher is None,
    )  # fmt: skip
    return result.seconds


def log_likelihoods(module: nn.Module, ids: Tensor, *, bf16: bool = False) -> Tensor:
    """Log-probability of each next token, float32 (B, T - 1); ``ids`` int64 (B, T)."""
    numerics = Numerics("bf16" if bf16 else "fp32", channels_last=False)
    found = []
    with torch.no_grad(), numerics.autocast(ids.device):
        for part in ids.split(CHUNK):
            logits = module(part, torch.ones_like(part)).float()[:, :-1].log_softmax(-1)
            found.append(logits.gather(2, part[:, 1:, None]).squeeze(2))
    return torch.cat(found)


def perplexity(module: nn.Module, split: BlockSplit, blocks: int) -> float:
    """Of the first ``blocks`` blocks, in float32."""
    assert split.labels is not None
    whole = np.concatenate([split.ids[:blocks], split.labels[:blocks, -1:]], axis=1)
    return float(log_likelihoods(module.eval(), torch.from_numpy(whole.astype(np.int64))).mean().neg().exp())


class Results:
    """Rows by name in one file, written after each, so that a run that was stopped goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        self._read()

    def _read(self) -> None:
        """Another process may have added rows."""
        self.rows |= json.loads(self.path.read_text()) if self.path.is_file() else {}

    def add(self, name: str, row: dict[str, Any]) -> None:
        self._read()
        self.rows[name] = row
        write_atomic(self.path, json.dumps(self.rows, indent=1) + "\n")
        print(name, json.dumps(row), flush=True)

    def column(self, names: Sequence[str], key: str) -> list[float]:
        """One figure of several rows."""
        return [float(self.rows[name][key]) for name in names]


def forget(folder: Path) -> None:
    """Remove a training's checkpoint, half a gigabyte, once its figures are written."""
    shutil.rmtree(folder, ignore_errors=True)
