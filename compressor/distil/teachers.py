"""Where the teacher's signals come from during training: the bank, or the teacher itself on every batch."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from compressor.distil.bank import LIMIT_BYTES, Bank, BankKey, Layout, samples_first
from compressor.distil.stream import TrainingSet
from compressor.errors import StageError
from compressor.models.signals import ENCODER, output_mask
from compressor.types import Array

Tap = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
View = Callable[[Array, int], dict[str, Tensor]]  # (positions, view) -> augmented model inputs

CHECKED = 8  # samples on which an existing bank is compared with the teacher at hand
CHECK_TOLERANCE = 0.02  # of the largest value: far above float16 and summation order, far below another teacher


class TeacherSource(Protocol):
    """Gives the teacher's signals of a batch."""

    forwards: int  # samples the teacher was run on

    def prepare(self, view: int) -> None:
        """Be ready for an epoch that uses this view."""
        ...

    def signals(
        self,
        positions: Array,
        inputs: Mapping[str, Tensor],
        view: int,
        student: Mapping[str, Tensor] | None = None,
        epoch: int = 0,
    ) -> Mapping[str, Tensor]:
        """Signals of these samples; ``student``'s own and the epoch only matter where teachers are dropped."""
        ...


class NoTeacher:
    """Labels only: the teacher is never run."""

    forwards = 0

    def prepare(self, view: int) -> None:
        """Nothing to do."""

    def signals(
        self,
        positions: Array,
        inputs: Mapping[str, Tensor],
        view: int,
        student: Mapping[str, Tensor] | None = None,
        epoch: int = 0,
    ) -> Mapping[str, Tensor]:
        return {}


class OnlineTeacher:
    """Runs the teacher on every batch, under the numerics of the student; ``load`` gives it inputs of its own."""

    def __init__(self, tap: Tap, autocast: Callable[[], Any], load: View | None = None) -> None:
        self.forwards = 0
        self._tap, self._load = tap, load
        self._autocast = autocast

    def prepare(self, view: int) -> None:
        """Nothing to do."""

    def signals(
        self,
        positions: Array,
        inputs: Mapping[str, Tensor],
        view: int,
        student: Mapping[str, Tensor] | None = None,
        epoch: int = 0,
    ) -> Mapping[str, Tensor]:
        with torch.no_grad():
            self.forwards += len(positions)
            with self._autocast():
                return self._tap(inputs if self._load is None else self._load(positions, view))


class CachedTeacher:
    """Reads the bank; fills a view, in float32, before the first epoch that uses it."""

    def __init__(
        self,
        tap: Tap,
        root: Path,
        key: Callable[[int], BankKey],
        layouts: Mapping[str, Layout],
        load: View,
        data: TrainingSet,
        *,
        own_tokens: bool = False,
    ) -> None:
        """``own_tokens``: the teacher has a tokenizer of its own, so that the student's mask says nothing."""
        self.forwards = 0
        self._own_tokens = own_tokens
        self._tap, self._root, self._key, self._layouts = tap, root, key, dict(layouts)
        self._load, self._data = load, data
        self._banks: dict[int, Bank] = {}

    def prepare(self, view: int) -> None:
        if view in self._banks:
            return
        tokens = self._tokens(view) if any(layout.ragged for layout in self._layouts.values()) else None
        bank = Bank(self._root, self._key(view), self._layouts, tokens, len(self._data))
        seen = bank.fill(lambda positions, names: self._teach(positions, view, names))
        self.forwards += seen
        if not seen:
            self._compare(bank, view)
        self._banks[view] = bank

    def _tokens(self, view: int) -> Array:
        if "token-drop" not in self._key(view).augment and self._data.lengths is not None:
            return self._data.lengths
        chunks = np.array_split(np.arange(len(self._data)), -(-len(self._data) // 256))
        return np.concatenate([output_mask(self._load(chunk, view)).cpu().sum(1).numpy() for chunk in chunks])

    def _teach(self, positions: Array, view: int, names: tuple[str, ...]) -> tuple[dict[str, Tensor], Tensor | None]:
        with torch.no_grad():
            inputs = self._load(positions, view)
            signals = self._tap(inputs)
            mask = output_mask(inputs)
            return {name: signals[name].cpu() for name in names}, None if mask is None else mask.cpu()

    def _compare(self, bank: Bank, view: int) -> None:
        """A bank that is there already must be this teacher's."""
        positions = np.unique(np.linspace(0, len(self._data) - 1, CHECKED).astype(np.int64))
        fresh, mask = self._teach(positions, view, tuple(self._layouts))
        self.forwards += len(positions)
        for name, cached in bank.read(positions, mask).items():
            value = fresh[name].float()
            if self._layouts[name].ragged and mask is not None:
                keep = mask.flatten() != 0
                value, cached = (_tokens_first(name, x)[keep] for x in (value, cached))
            worst, size = float((value - cached.float()).abs().max()), float(value.abs().max())
            if worst > CHECK_TOLERANCE * size + 1e-3:
                raise StageError(
                    f"the teacher bank `{bank.folder}` is stale: `{name}` differs from this teacher's by {worst:.3g}",
                    hint=f"Delete `{bank.folder}`; the teacher's digest did not change although its outputs did.",
                )

    def signals(
        self,
        positions: Array,
        inputs: Mapping[str, Tensor],
        view: int,
        student: Mapping[str, Tensor] | None = None,
        epoch: int = 0,
    ) -> Mapping[str, Tensor]:
        device = next(iter(inputs.values())).device
        seen = self._load(positions, view) if self._own_tokens else inputs
        found = self._banks[view].read(positions, output_mask(seen))
        return found if device.type == "cpu" else {name: tensor.to(device) for name, tensor in found.items()}


def _tokens_first(name: str, signal: Tensor) -> Tensor:
    return samples_first(name, signal).flatten(0, 1)


@dataclass(frozen=True)
class CacheDecision:
    """Cache or online, with the size that was weighed and the reason."""

    cached: bool
    bytes: int
    reason: str


def decide(
    wanted: str, layouts: Mapping[str, Layout], data: TrainingSet, views: int, online: bool, root: Path
) -> CacheDecision:
    """Choose between bank and online teacher before anything is written.

    Args:
        wanted: ``auto``, ``on`` or ``off``.
        layouts: of the teacher's signals that the objectives read.
        data: the training samples.
        views: how many views will be used.
        online: an objective declares that its teacher must run online.
        root: where the bank would lie.

    Raises:
        StageError: ``on``, and the disk or an objective does not allow it.
    """
    ragged = any(layout.ragged for layout in layouts.values())
    tokens = int(data.lengths.sum()) if ragged and data.lengths is not None else 0
    size = views * sum(layout.bytes(len(data), tokens) for layout in layouts.values())
    root.mkdir(parents=True, exist_ok=True)
    room = shutil.disk_usage(root).free // 2
    limit = room if wanted == "on" else min(room, LIMIT_BYTES)
    if wanted == "off":
        return CacheDecision(False, 0, "the recipe says so")
    why = ""
    if online:
        why = "an objective needs the teacher online"
    elif any(layout.varies for layout in layouts.values()):
        why = "attention maps of texts are as wide as their batch"
    elif any(name.startswith(ENCODER) for name in layouts):
        why = "an encoder's signals are not kept"
    elif size > limit:
        why = f"the outputs would take {size / 2**20:.0f} MiB, more than {limit / 2**20:.0f} MiB"
    if why and wanted == "on":
        raise StageError(
            f"the teacher cannot be cached: {why}", hint='Set cache = "auto" or "off" in the distil stage.'
        )
    return (
        CacheDecision(False, 0, why) if why else CacheDecision(True, size, f"{size / 2**20:.1f} MiB in {views} views")
    )
