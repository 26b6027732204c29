"""The teacher bank: a teacher's outputs on disk, computed once per view and shared between runs.

One folder per (teacher, samples, augmentation, view): ``key.json`` with that key, and per signal a memory-mapped
``<signal>.npy`` with a ``<signal>.done.npy`` that marks the chunks already computed, so that filling can be
interrupted. Logits of up to 1024 classes are float32, everything else float16: relative error at most 2^-11, about 0.05
%. Of a large vocabulary the k largest logits may be kept instead (``compressor.distil.top``).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from compressor.distil.checkpoint import disk_errors
from compressor.errors import StageError
from compressor.types import Array, write_atomic

EXACT_CLASSES = 1024  # logits up to this width are kept in float32
CHUNK = 256  # samples of one teacher call while filling
FLUSH_CHUNKS = 16  # chunks between two marks of progress
LIMIT_BYTES = 4 * 2**30  # a larger bank is refused unless the recipe insists


@dataclass(frozen=True)
class BankKey:
    """Everything a cached output depends on."""

    teacher: str  # digest of its weights
    samples: str  # digest of samples and of their preprocessed form
    augment: tuple[str, ...]
    seed: int  # of the augmentation; 0 without one
    view: int
    tokenizer: str = ""  # digest of the teacher's own, where it sees other tokens than its student

    def text(self) -> str:
        """Canonical JSON."""
        fields = {"format": 2, "teacher": self.teacher, "samples": self.samples, "augment": list(self.augment)}
        fields |= {"seed": self.seed, "view": self.view, "tokenizer": self.tokenizer}
        return json.dumps(fields, sort_keys=True)

    def folder(self, root: Path) -> Path:
        """Where this key lives below ``root``."""
        return root / hashlib.sha256(self.text().encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Layout:
    """How one signal lies in its file: a row per sample, or a row per real token of every sample (ragged text)."""

    name: str
    dtype: str
    row: tuple[int, ...]
    ragged: bool
    varies: bool = False  # a row is as wide as its batch: attention maps of texts, which no file can hold

    @classmethod
    def of(cls, name: str, signal: Tensor, mask: Tensor | None) -> Self:
        """The layout of a signal, from its values for one batch."""
        rows = samples_first(name, signal)
        ragged = mask is not None and rows.dim() >= 3 and rows.shape[1] == mask.shape[1]
        exact = (name == "logits" and rows.shape[-1] <= EXACT_CLASSES) or name.startswith("logits.rest")
        kind = "<i4" if name == "logits.index" else "<f4" if exact else "<f2"
        varies = name.startswith("attn[") and mask is not None
        return cls(name, kind, tuple(rows.shape[2 if ragged else 1 :]), ragged, varies)

    def bytes(self, samples: int, tokens: int) -> int:
        """Size of the file for so many samples with so many real tokens in all."""
        return (tokens if self.ragged else samples) * int(np.prod(self.row)) * int(self.dtype[-1])


def samples_first(name: str, signal: Tensor) -> Tensor:
    """Batch (and token) axes in front: ``qkv`` (3, B, H, T, d) becomes (B, T, 3, H, d), ``q`` (B, T, H, d)."""
    if name.startswith("qkv["):
        return signal.permute(1, 3, 0, 2, 4)
    if name[:2] in {"q[", "k[", "v["}:
        return signal.transpose(1, 2)
    return signal


def samples_back(name: str, rows: Tensor) -> Tensor:
    """The inverse of :func:`samples_first`."""
    if name.startswith("qkv["):
        return rows.permute(2, 0, 3, 1, 4)
    if name[:2] in {"q[", "k[", "v["}:
        return rows.transpose(1, 2)
    return rows


class Bank:
    """The cached signals of one key.

    Args:
        root: folder shared by all banks.
        key: what the outputs depend on.
        layouts: of the signals that are wanted.
        tokens: real tokens of each sample for this view (int64), or None when no layout is ragged.
        samples: number of samples.

    Raises:
        StageError: the folder holds another key (stale or copied), or a file of another size.
    """

    def __init__(
        self, root: Path, key: BankKey, layouts: Mapping[str, Layout], tokens: Array | None, samples: int
    ) -> None:
        self.folder = key.folder(root)
        self._layouts = dict(layouts)
        self._samples = samples
        self._starts = None if tokens is None else np.concatenate([[0], np.cumsum(tokens)])
        self._tokens = tokens
        self.folder.mkdir(parents=True, exist_ok=True)
        note = self.folder / "key.json"
        if not note.exists():
            write_atomic(note, key.text())
        elif note.read_text(encoding="utf-8") != key.text():
            raise self._stale("was made for another teacher, other data or another augmentation")
        self._files: dict[str, Array] = {}

    def _stale(self, why: str) -> StageError:
        return StageError(f"the teacher bank `{self.folder}` is stale: it {why}", hint=f"Delete `{self.folder}`.")

    def missing(self) -> tuple[str, ...]:
        """Signals that are not complete."""
        return tuple(name for name in self._layouts if not self._complete(name))

    def _complete(self, name: str) -> bool:
        done = self._path(name, ".done.npy")
        return done.exists() and bool(np.load(done, mmap_mode="r").all())

    def _path(self, name: str, suffix: str = ".npy") -> Path:
        return self.folder / f"{name.replace('[', '-').replace(']', '')}{suffix}"

    def fill(self, teacher: Callable[[Array, tuple[str, ...]], tuple[Mapping[str, Tensor], Tensor | None]]) -> int:
        """Compute what is missing in one pass; returns how many samples the teacher saw.

        ``teacher(positions, names)`` gives the signals and the token mask of these samples. Two runs at once take
        turns.

        Raises:
            StageError: the disk is full, or an output does not fit float16.
        """
        with disk_errors(self.folder), FileLock(self.folder / ".lock"):
            names = self.missing()
            if not names:
                return 0
            files = {name: self._open(name) for name in names}
            seen, chunks = 0, self._chunks()
            for number, chunk in enumerate(chunks):
                todo = tuple(name for name in names if not files[name][1][number])
                if todo:
                    signals, mask = teacher(chunk, todo)
                    seen += len(chunk)
                    for name in todo:
                        self._write(name, files[name][0], chunk, signals[name], mask)
                if number % FLUSH_CHUNKS == FLUSH_CHUNKS - 1 or number == len(chunks) - 1:
                    _mark(files, number + 1)
            return seen

    def _chunks(self) -> list[Array]:
        """Samples in the order of filling: text by length, so that little padding is computed."""
        order = np.arange(self._samples) if self._tokens is None else np.argsort(self._tokens, kind="stable")
        return [order[start : start + CHUNK] for start in range(0, self._samples, CHUNK)]

    def _shape(self, name: str) -> tuple[int, ...]:
        layout = self._layouts[name]
        rows = int(self._starts[-1]) if layout.ragged and self._starts is not None else self._samples
        return (rows, *layout.row)

    def _open(self, name: str) -> tuple[Any, Any]:
        """Memory maps of the values and of the marks, made when they are not there."""
        path, done = self._path(name), self._path(name, ".done.npy")
        if not done.exists() or not path.exists():
            done.unlink(missing_ok=True)
            shape = self._shape(name)
            values = np.lib.format.open_memmap(path, "w+", dtype=self._layouts[name].dtype, shape=shape)
            _reserve(path)
            marks = np.lib.format.open_memmap(done, "w+", dtype="|b1", shape=(-(-self._samples // CHUNK),))
            marks.flush()
            return values, marks
        return self._mapped(name, "r+"), np.load(done, mmap_mode="r+")

    def _mapped(self, name: str, mode: Any) -> Any:
        try:
            values = np.load(self._path(name), mmap_mode=mode)
        except (OSError, ValueError) as error:
            raise self._stale(f"has a damaged file for `{name}`: {error}") from error
        if values.shape != self._shape(name) or values.dtype.str != self._layouts[name].dtype:
            raise self._stale(f"holds `{name}` as {values.dtype} {values.shape}, not {self._shape(name)}")
        return values

    def _write(self, name: str, file: Any, positions: Array, signal: Tensor, mask: Tensor | None) -> None:
        made = samples_first(name, signal)
        rows = (made.float() if made.is_floating_point() else made).numpy()
        with np.errstate(over="ignore"):  # looked at in the next line
            stored = rows.astype(self._layouts[name].dtype)
        if not np.isfinite(stored).all():
            raise StageError(
                f"the teacher's `{name}` holds values that cannot be cached (not finite in {stored.dtype})",
                hint='Set cache = "off" in the distil stage.',
            )
        if self._layouts[name].ragged and mask is not None:
            keep = mask.numpy() != 0
            file[self._token_rows(positions, keep)] = stored[keep]
        else:
            file[positions] = stored

    def _token_rows(self, positions: Array, keep: Array) -> Array:
        """File rows of the real tokens of these samples, in reading order."""
        if self._starts is None:
            raise ValueError("a ragged signal needs the tokens of each sample")
        if not (keep.sum(1) == self._starts[positions + 1] - self._starts[positions]).all():
            raise self._stale("was made with another tokenizer or another augmentation")
        inside = np.cumsum(keep, axis=1) - 1
        found: Array = (self._starts[positions][:, None] + inside)[keep]
        return found

    def read(self, positions: Array, mask: Tensor | None) -> dict[str, Tensor]:
        """Cached signals of these samples, shaped as the teacher would give them; padding is 0."""
        found = {}
        for name, layout in self._layouts.items():
            if name not in self._files:
                self._files[name] = np.asarray(self._mapped(name, "r"))
            file = self._files[name]
            if layout.ragged and mask is not None:
                keep = mask.cpu().numpy() != 0
                rows = np.zeros((*keep.shape, *layout.row), dtype=layout.dtype)
                rows[keep] = file[self._token_rows(positions, keep)]
            else:
                rows = file[positions]
            found[name] = samples_back(name, torch.from_numpy(rows))
        return found


def _reserve(path: Path) -> None:
    """Take the disk space of a sparse file now: a memory map that outgrows the disk would kill the process."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        with path.open("r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, max(1, path.stat().st_size))
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _mark(files: Mapping[str, tuple[Any, Any]], chunks: int) -> None:
    """Values reach the disk before the marks that vouch for them."""
    for values, _ in files.values():
        values.flush()
    for _, marks in files.values():
        marks[:chunks] = True
        marks.flush()
