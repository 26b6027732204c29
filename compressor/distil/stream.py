"""The training samples as one sequence, and the deterministic order in which they are seen."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressor.data.pairs import Groups
from compressor.data.types import DataBundle, Split
from compressor.errors import StageError
from compressor.models.signals import output_mask
from compressor.types import Array

UNLABELLED = -100  # torch's ignore index of cross-entropy
UNKNOWN = -1  # domain of samples whose source has none
POOL_BATCHES = 16  # samples of this many batches are grouped by length


class TrainingSet:
    """``train`` and then ``transfer`` (whose labels are unknown), addressed by one position."""

    def __init__(self, parts: Sequence[Split]) -> None:
        self._parts = tuple(parts)
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        known = _labels(parts[0])  # (N,), (N, C) for several labels a sample, or (N, L) for one a token
        given = parts[0].labels
        self.by_token = given is not None and given.ndim == 2 and np.issubdtype(given.dtype, np.integer)
        unknown = [np.full((len(part), *known.shape[1:]), UNLABELLED, dtype=np.int64) for part in parts[1:]]
        self.labels = np.concatenate([known, *unknown])
        self._known = self.labels  # the digest is of these: the teacher's outputs do not depend on labels made later
        self.digests = np.concatenate([np.asarray(part.digests, dtype="S16") for part in parts])
        self.owners = np.repeat(np.arange(len(parts)), np.diff(self._starts))  # 0: train, 1: transfer
        self.domains: Array | None = None  # int64 (N,): `data.domain`
        self._rows: Array | None = None  # of the parts, when only some take part
        self.groups: Groups | None = getattr(parts[0], "groups", None)  # of the labelled part

    @classmethod
    def of(cls, data: DataBundle, which: str = "all") -> TrainingSet:
        """The training samples of ``data``: ``all``, ``train`` or ``transfer``.

        Raises:
            StageError: the part is missing or empty.
        """
        train, transfer = data.splits.get("train"), data.splits.get("transfer")
        if which == "transfer" and (transfer is None or len(transfer) == 0):
            raise StageError("the data has no transfer part", hint='Give `data.transfer`, or set data = "train".')
        if train is None or len(train) == 0:
            raise StageError("there is nothing to train on", hint="The train part of the data is empty.")
        found = cls([train] if transfer is None or len(transfer) == 0 else [train, transfer])
        if data.domains:
            sizes = {name: len(data.splits[name]) for name in ("train", "transfer")[: len(found._parts)]}
            parts = [data.domains.get(name, np.full(size, UNKNOWN)) for name, size in sizes.items()]
            found.domains = np.concatenate(parts)
        if which == "all" or transfer is None:
            return found
        return found.take(np.flatnonzero(found.owners == (1 if which == "transfer" else 0)))

    @property
    def rows(self) -> Array | None:
        """Which samples of ``train`` and then ``transfer`` this set holds, in order; None: all of them."""
        return self._rows

    def take(self, kept: Array, labels: Array | None = None) -> TrainingSet:
        """These samples alone, addressed from 0; with ``labels`` (one for each of ours) in the place of their own."""
        made = copy.copy(self)
        for name in ("lengths", "digest"):
            made.__dict__.pop(name, None)
        made._rows = np.asarray(kept) if self._rows is None else self._rows[kept]
        made._known = self._known[kept]
        made.labels = (self.labels if labels is None else labels)[kept]
        made.digests, made.owners = self.digests[kept], self.owners[kept]
        made.domains = None if self.domains is None else self.domains[kept]
        left = None if self.groups is None else self.groups.among(np.asarray(kept), len(self))
        made.groups = left if left is not None and len(left) else None
        return made

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def labelled(self) -> bool:
        """Is there a sample with a label, or a text that is known to answer another?"""
        return bool((self.labels != UNLABELLED).any()) or self.answers

    @property
    def answers(self) -> bool:
        """Are the labels right answers to texts rather than classes?"""
        return self.groups is not None and self.groups.answers

    def batch(self, positions: Array) -> dict[str, Tensor]:
        """Model inputs of these samples, in their order; text from both parts is padded to one length."""
        return self._gathered(positions, lambda part, index: part.batch(index))

    @property
    def mask_id(self) -> int | None:
        """The token that stands for a hidden one, where the tokenizer has such a token."""
        store = getattr(self._parts[0], "store", None)
        found = getattr(getattr(store, "preprocess", None), "mask_id", None)
        return found if isinstance(found, int) else None

    def fields(self, positions: Array) -> dict[str, Tensor]:
        """What the parts say of these samples beside inputs and labels (see ``Split.fields``); empty for most data."""
        if not all(hasattr(part, "fields") for part in self._parts):
            return {}
        return self._gathered(positions, lambda part, index: part.fields(index))

    def _gathered(self, positions: Array, of: Callable[[Any, Array], Mapping[str, Array]]) -> dict[str, Tensor]:
        if self._rows is not None:
            positions = self._rows[positions]
        if len(self._parts) == 1:
            return _tensors(of(self._parts[0], positions))
        owner = np.searchsorted(self._starts[1:], positions, side="right")
        groups = [np.flatnonzero(owner == part) for part in range(len(self._parts))]
        made = [
            _tensors(of(part, positions[rows] - self._starts[i]))
            for i, (part, rows) in enumerate(zip(self._parts, groups, strict=True))
            if len(rows)
        ]
        if len(made) == 1:
            return made[0]
        back = torch.from_numpy(np.argsort(np.concatenate(groups), kind="stable"))
        return {name: _stack([part[name] for part in made])[back] for name in made[0]}

    @cached_property
    def lengths(self) -> Array | None:
        """Real tokens of each sample (int64; of its target, where it has one), or None when the inputs have no mask."""
        if output_mask(self.batch(np.arange(1))) is None:
            return None
        chunks = np.array_split(np.arange(len(self)), -(-len(self) // 256))
        return np.concatenate([output_mask(self.batch(chunk)).sum(1).numpy() for chunk in chunks])

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the samples' digests, their labels and the model inputs of 32 samples spread over the set.

        The last part notices another tokenizer or other preprocessing of the same raw samples.
        """
        found = hashlib.sha256(self.digests.tobytes() + self._known.tobytes())
        for name, tensor in sorted(self.batch(np.unique(np.linspace(0, len(self) - 1, 32).astype(np.int64))).items()):
            found.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            found.update(tensor.contiguous().numpy().tobytes())
        return found.hexdigest()

    def order(self, epoch: int, batch: int, seed: int) -> list[Array]:
        """Batches of positions for one epoch; the same for the same arguments.

        Text is grouped by length inside pools of ``POOL_BATCHES`` batches and the batches are shuffled again, so
        padding shrinks while every batch still is a random part of the data.
        """
        random = np.random.Generator(np.random.PCG64([seed, epoch]))
        shuffled = random.permutation(len(self))
        if self.lengths is None:
            return _cut(shuffled, batch)
        pool = batch * POOL_BATCHES
        batches = []
        for start in range(0, len(self), pool):
            part = shuffled[start : start + pool]
            part = part[np.argsort(self.lengths[part], kind="stable")]
            batches += _cut(part, batch)
        return [batches[i] for i in random.permutation(len(batches))]


def _cut(positions: Array, batch: int) -> list[Array]:
    """Pieces of ``batch`` positions; a single one left over joins the last piece, as batch norm needs two."""
    edges = list(range(batch, len(positions), batch))
    if edges and batch > 1 and len(positions) - edges[-1] == 1:
        edges.pop()
    return [piece for piece in np.split(positions, edges) if len(piece)]


def _labels(part: Split) -> Array:
    if part.labels is None:
        return np.full(len(part), UNLABELLED, dtype=np.int64)
    return np.asarray(part.labels, dtype=np.int64)


def _tensors(inputs: Mapping[str, Array]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()}


def _stack(parts: Sequence[Tensor]) -> Tensor:
    if parts[0].dim() != 2 or len({part.shape[1] for part in parts}) == 1:
        return torch.cat(list(parts))
    longest = max(int(part.shape[1]) for part in parts)
    # padded tokens are masked, so their ids do not matter
    return torch.cat([torch.nn.functional.pad(part, (0, longest - int(part.shape[1]))) for part in parts])
