"""One function scores any callable: a torch module, an ONNX session, a device. numpy only.

A *run* takes model inputs by name and returns outputs by name. :func:`predict` feeds it an :class:`EvalSet`;
:func:`score` turns the predictions into the task's metric; :func:`loyalty` compares a student with its teacher.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from compressor.errors import RunError
from compressor.types import Array, Inputs, Task, TensorSpec

Run = Callable[[Inputs], Mapping[str, Array]]

PAIR_CAP = 200_000  # pairs of the similarity matrix that the rank correlation looks at: 1.6 MB of float64
PROBABILITY_TOLERANCE = 1e-2  # a row of a softmax output sums to 1 within this, int8 softmax (step 1/256) included


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
    """An :class:`EvalSet` over a split, in the split's own order."""

    split: BatchSource

    @property
    def labels(self) -> Array | None:
        return self.split.labels

    @cached_property
    def digest(self) -> str:
        """Of the model inputs themselves (:func:`content_digest`), made once."""
        return content_digest(self)

    def __len__(self) -> int:
        return len(self.split)

    def batches(self, size: int) -> Iterator[tuple[Inputs, Array | None]]:
        for start in range(0, len(self.split), size):
            index = np.arange(start, min(start + size, len(self.split)), dtype=np.int64)
            labels = self.split.labels
            yield self.split.batch(index), None if labels is None else labels[index]


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


def predict(
    run: Run,
    evalset: EvalSet,
    batch: int,
    output_name: str | None = None,
    specs: Sequence[TensorSpec] = (),
) -> Array:
    """The model's output for every sample, float32 (N, ...): (N, C) logits or (N, D) embeddings.

    ``specs`` are the model's declared inputs: with a static batch dimension the last batch is filled by repeating its
    last sample, and the surplus rows are cut off again. ``output_name`` defaults to the first output.
    """
    static = fixed_batch(specs)
    rows: list[Array] = []
    for inputs, _ in evalset.batches(static or batch):
        count = len(next(iter(inputs.values())))
        outputs = run(fill_batch(fit_inputs(inputs, specs), static))
        name = output_name if output_name is not None else next(iter(outputs))
        if name not in outputs:
            raise RunError(f"the model has no output `{name}`, only {', '.join(outputs)}")
        rows.append(_per_sample(outputs[name], static or count, name)[:count])
    if not rows:
        raise RunError("there is nothing to evaluate: the set is empty")
    return np.concatenate(rows)


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


def _per_sample(output: Array, count: int, name: str) -> Array:
    output = np.asarray(output, dtype=np.float32)
    if output.ndim == 0 or output.shape[0] != count:
        raise RunError(f"output `{name}` is {output.shape} for {count} samples: its first dimension is not the batch")
    return output


def metric_name(task: Task) -> str:
    """What :func:`score` measures, in words for a report."""
    match task:
        case "image-classification" | "text-classification":
            return "accuracy"
        case "sentence-embedding":
            return "Spearman against teacher"
        case "generic":
            return "agreement with the original"


def score(task: Task, outputs: Array, labels: Array | None, reference: Array | None = None) -> float:
    """The task's metric in 0..1 (Spearman: -1..1).

    - Classification: share of argmax equal to the label; without labels, equal to the argmax of ``reference``.
    - ``sentence-embedding``: Spearman's rank correlation between the pairwise cosine similarities of ``outputs`` and of
      ``reference`` over the set (:func:`similarity_correlation`).
    - ``generic``: with integer labels, accuracy. Without, agreement with ``reference``: the share of equal argmax when
      the reference's rows are probability distributions (rank 2, non-negative, sum 1), otherwise 1 - relative error
      (:func:`closeness`), because the argmax of a picture or a code means nothing.

    ``outputs`` and ``reference`` are (N, C); ValueError when neither labels nor reference allow a score.
    """
    if task == "sentence-embedding":
        return similarity_correlation(outputs, _needed(reference, task))
    if labels is not None:
        return float(np.mean(_argmax(outputs) == labels))
    reference = _needed(reference, task)
    if task == "generic" and not is_distribution(reference):
        return closeness(outputs, reference)
    return agreement(reference, outputs)


def _needed(reference: Array | None, task: Task) -> Array:
    if reference is None:
        raise ValueError(f"a score for {task} needs labels or the teacher's outputs")
    return reference


def _argmax(outputs: Array) -> Array:
    """Predicted class; a single output is the logit of class 1 (its probability, when the values stay within 0..1)."""
    flat = outputs.reshape(len(outputs), -1)
    if flat.shape[1] == 1:
        return np.asarray(flat[:, 0] > (0.5 if flat.min() >= 0 and flat.max() <= 1 else 0), dtype=np.int64)
    return np.asarray(np.argmax(flat, axis=1))


def is_distribution(outputs: Array) -> bool:
    """Are the rows of a rank 2 output probabilities: non-negative, sum 1?"""
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        return False
    return bool(outputs.min() >= 0 and np.allclose(outputs.sum(axis=1), 1, atol=PROBABILITY_TOLERANCE))


def agreement(reference: Array, outputs: Array) -> float:
    """Share of samples whose argmax is that of ``reference``; both (N, C)."""
    return float(np.mean(_argmax(reference) == _argmax(outputs)))


def closeness(outputs: Array, reference: Array) -> float:
    """Mean over samples of 1 - ||output - reference|| / ||reference||, each sample's value cut to 0..1."""
    flat, wanted = (array.reshape(len(array), -1).astype(np.float64) for array in (outputs, reference))
    error, size = np.linalg.norm(flat - wanted, axis=1), np.linalg.norm(wanted, axis=1)
    relative = np.divide(error, size, out=np.where(error > 0, np.inf, 0.0), where=size > 0)
    return float(np.mean(np.clip(1 - relative, 0, 1)))


def loyalty(teacher_logits: Array, student_logits: Array) -> tuple[float, float]:
    """Label and probability loyalty of (N, C) logits (or probabilities, which are taken as they are), temperature 1.

    Label: share of equal argmax. Probability: mean over samples of 1 - sqrt(JS(p, q)), with the Jensen-Shannon
    divergence in natural logarithms ("Beyond Preserved Accuracy", Xu et al., EMNLP 2021).
    """
    teacher, student = (
        _probabilities(np.asarray(logits, dtype=np.float64)) for logits in (teacher_logits, student_logits)
    )
    middle = (teacher + student) / 2
    divergence = (_kl(teacher, middle) + _kl(student, middle)) / 2
    return agreement(teacher_logits, student_logits), float(np.mean(1 - np.sqrt(np.maximum(divergence, 0))))


def _probabilities(logits: Array) -> Array:
    if is_distribution(logits):
        return np.asarray(logits / logits.sum(axis=1, keepdims=True))
    raised: Array = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True))


def _kl(first: Array, second: Array) -> Array:
    """Per row; a zero probability contributes nothing (x log x -> 0)."""
    ratio = np.divide(first, second, out=np.ones_like(first), where=first > 0)
    return np.asarray(np.sum(first * np.log(ratio), axis=1))


def similarity_correlation(outputs: Array, reference: Array, cap: int = PAIR_CAP) -> float:
    """Spearman's rank correlation of the pairwise cosine similarities of two sets of N embeddings (widths may differ).

    All N (N - 1) / 2 pairs, or ``cap`` of them drawn with a fixed seed that depends on N only: the same pairs for every
    model, so that scores compare. Ties get their mean rank. 1.0 when both are constant and equal.
    """
    first, second = _pairs(len(outputs), cap)
    mine, theirs = (
        _ranks(_cosines(np.asarray(array, dtype=np.float64), first, second)) for array in (outputs, reference)
    )
    mine, theirs = mine - mine.mean(), theirs - theirs.mean()
    size = np.sqrt(np.sum(mine**2) * np.sum(theirs**2))
    return float(np.sum(mine * theirs) / size) if size > 0 else float(np.array_equal(mine, theirs))


def _pairs(count: int, cap: int) -> tuple[Array, Array]:
    if count < 2:
        raise ValueError("a correlation of similarities needs at least two samples")
    if count * (count - 1) // 2 <= cap:
        first, second = np.triu_indices(count, k=1)
        return first, second
    random = np.random.Generator(np.random.PCG64(zlib.crc32(f"pairs-{count}".encode())))
    first = random.integers(0, count, cap)
    return first, (first + random.integers(1, count, cap)) % count  # never a sample with itself


def _cosines(embeddings: Array, first: Array, second: Array) -> Array:
    length = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unit = np.divide(embeddings, length, out=np.zeros_like(embeddings), where=length > 0)
    step = max(1, 4_000_000 // unit.shape[1])  # pairs at a time: two blocks of 32 MB
    parts = [
        np.einsum("ij,ij->i", unit[first[at : at + step]], unit[second[at : at + step]])
        for at in range(0, len(first), step)
    ]
    return np.concatenate(parts)


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse], dtype=np.float64)
