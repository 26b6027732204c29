"""Samples as model inputs: the set protocol, its two implementations, and inputs fitted to a model's declaration."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from compressor.errors import RunError
from compressor.types import Array, Inputs, TensorSpec


class EvalSet(Protocol):
    """Labelled samples as model inputs."""

    @property
    def labels(self) -> Array | None:
        """int64 (N,); None when there are none."""
        ...

    def __len__(self) -> int: ...

    def batches(self, size: int) -> Iterator[tuple[Inputs, Array | None]]:
        """All samples in order, ``size`` at a time (the last batch may be smaller), with their labels."""
        ...


class BatchSource(Protocol):
    """What :class:`SplitEvalSet` needs of a split of the data; :class:`compressor.data.types.Split` fits."""

    @property
    def labels(self) -> Array | None: ...

    def __len__(self) -> int: ...

    def batch(self, index: Array) -> Inputs: ...


@dataclass(frozen=True)
class SplitEvalSet:
    """An :class:`EvalSet` over a split, in the split's own order. Judgements of pairs stand in for labels."""

    split: BatchSource

    @property
    def labels(self) -> Array | None:
        judged: Array | None = getattr(self.split, "judgements", None)
        return self.split.labels if judged is None else judged

    @property
    def targets(self) -> Any:
        """What an encoder-decoder model shall write: :class:`compressor.evaluate.written.Targets`, or None."""
        return getattr(self.split, "targets", None)

    @cached_property
    def digest(self) -> str:
        """Of the model inputs themselves (:func:`content_digest`) and of target texts, made once."""
        found = content_digest(self)
        if self.targets is None:
            return found
        return found + "-" + hashlib.sha256("\n".join(self.targets.references).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.split)

    def batches(self, size: int) -> Iterator[tuple[Inputs, Array | None]]:
        for start in range(0, len(self.split), size):
            index = np.arange(start, min(start + size, len(self.split)), dtype=np.int64)
            labels = self.labels
            yield self.split.batch(index), None if labels is None else labels[index]


@dataclass(frozen=True)
class FirstSamples:
    """The first ``count`` samples of an :class:`EvalSet`."""

    whole: EvalSet
    count: int

    @property
    def labels(self) -> Array | None:
        found = self.whole.labels
        return None if found is None else found[: self.count]

    @cached_property
    def digest(self) -> str:
        """Of the model inputs themselves."""
        return content_digest(self)

    def __len__(self) -> int:
        return min(self.count, len(self.whole))

    def batches(self, size: int) -> Iterator[tuple[Inputs, Array | None]]:
        left = len(self)
        for inputs, labels in self.whole.batches(size):
            yield {name: array[:left] for name, array in inputs.items()}, None if labels is None else labels[:left]
            left -= min(size, left)
            if not left:
                return


@dataclass(frozen=True)
class ArrayEvalSet:
    """An :class:`EvalSet` over arrays that share their first dimension."""

    arrays: Mapping[str, Array]
    labels: Array | None = None

    @cached_property
    def digest(self) -> str:
        """Of the model inputs themselves (:func:`content_digest`), made once."""
        return content_digest(self)

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def batches(self, size: int) -> Iterator[tuple[Inputs, Array | None]]:
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            inputs = {name: array[part] for name, array in self.arrays.items()}
            yield inputs, None if self.labels is None else self.labels[part]


def content_digest(evalset: EvalSet) -> str:
    """SHA-256 over all model inputs, after preprocessing: a key for stored predictions no setting slips past."""
    digest = hashlib.sha256()
    for inputs, _ in evalset.batches(64):
        for name in sorted(inputs):
            array = np.ascontiguousarray(inputs[name])
            digest.update(f"{name}{array.dtype.str}{array.shape}".encode())
            digest.update(array.data)
    return "sha256:" + digest.hexdigest()


def fixed_batch(specs: Sequence[TensorSpec]) -> int | None:
    """The batch size that a model with static shapes insists on; None when its first dimension is free."""
    sizes = {spec.shape[0] for spec in specs if spec.shape and isinstance(spec.shape[0], int)}
    return int(min(sizes)) if len(sizes) == 1 else None


def fit_inputs(inputs: Inputs, specs: Sequence[TensorSpec]) -> dict[str, Array]:
    """Make a batch fit a model's declared inputs without changing what it says.

    Integer kinds are cast to the declared one, token inputs shorter than a static sequence length are padded with
    zeros (masked positions), inputs that the model does not have are left out. The batch dimension is not touched.
    Raises :class:`RunError` when an input is missing or longer than a static dimension.
    """
    if not specs:
        return dict(inputs)
    fitted = {}
    for spec in specs:
        if spec.name not in inputs:
            raise RunError(
                f"the model wants input `{spec.name}`, the data has {', '.join(sorted(inputs)) or 'none'}",
                hint="Name the columns of the data after the model's inputs.",
            )
        fitted[spec.name] = _fit(inputs[spec.name], spec)
    return fitted


def _fit(array: Array, spec: TensorSpec) -> Array:
    if array.dtype != spec.dtype and (array.dtype.kind in "iub") == (np.dtype(spec.dtype).kind in "iub"):
        array = array.astype(spec.dtype)
    missing = [(0, 0)] * array.ndim
    for axis, (size, wanted) in enumerate(zip(array.shape, spec.shape, strict=False)):
        if axis == 0 or not isinstance(wanted, int) or size == wanted:
            continue
        if size > wanted or array.dtype.kind not in "iub":
            raise RunError(
                f"input `{spec.name}` is {array.shape}, the model takes {spec.shape}",
                hint="The model has static shapes: export it with dynamic axes or cut the data to its size.",
            )
        missing[axis] = (0, wanted - size)
    return np.pad(array, missing) if any(after for _, after in missing) else array


def fill_batch(inputs: dict[str, Array], static: int | None) -> dict[str, Array]:
    """Repeat the last sample until the batch has ``static`` samples; None leaves it as it is."""
    if static is None:
        return inputs
    return {
        name: np.concatenate([array, np.repeat(array[-1:], static - len(array), axis=0)])
        if 0 < len(array) < static
        else array
        for name, array in inputs.items()
    }
