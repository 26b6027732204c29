"""Parity: does the exported file compute what the original computes?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compressor.errors import StageError, sdk_errors
from compressor.types import Array, Inputs

DEFAULT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Parity:
    """One output of an exported file against its original, over real samples."""

    artifact: str
    output: str
    worst: float  # largest absolute difference; infinite when one side is NaN or a shape differs
    tolerance: float  # absolute: the asked one times max(1, largest |reference|)
    samples: int
    passed: bool


def verify(
    reference: Callable[[Inputs], Mapping[str, Array]],
    path: Path,
    batches: Iterable[Inputs],
    *,
    tolerance: float = DEFAULT_TOLERANCE,
    artifact: str = "",
) -> tuple[Parity, ...]:
    """Run both on the same inputs and compare every output.

    Besides each batch as it is, its first sample alone, its first three samples and (where the file has a dynamic axis
    named like a sequence) a shortened sequence are compared, so that a specialised batch or length cannot hide.

    ``tolerance`` is relative to ``max(1, largest |reference|)``. Raises :class:`StageError` if the file does not run.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    hint = "The export is not usable; look for dimensions that were fixed while tracing."
    with sdk_errors(StageError, f"run `{path.name}` with ONNX Runtime", hint=hint):
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_outputs()]
        axes = {value.name: value.shape for value in session.get_inputs()}
        found = _compare(reference, lambda inputs: session.run(names, dict(inputs)), names, axes, batches)
    if not found:
        raise StageError("nothing to verify with: no batches were given", hint="Give at least one batch of real data.")
    label = artifact or path.stem
    rows = []
    for name, (worst, peak, samples) in found.items():
        limit = tolerance * max(1.0, peak)
        rows.append(Parity(label, name, worst, limit, samples, bool(worst <= limit)))
    return tuple(rows)


def _compare(
    reference: Callable[[Inputs], Mapping[str, Array]],
    run: Callable[[Inputs], list[Array]],
    names: list[str],
    axes: Mapping[str, list[int | str | None]],
    batches: Iterable[Inputs],
) -> dict[str, tuple[float, float, int]]:
    found: dict[str, tuple[float, float, int]] = {}
    for batch in batches:
        for inputs in variations(batch, axes):
            expected = reference(inputs)
            for name, got in zip(names, run(inputs), strict=True):
                if name not in expected:
                    raise StageError(f"the original gives no output `{name}`", hint=f"It gives: {', '.join(expected)}.")
                worst, peak, samples = found.get(name, (0.0, 0.0, 0))
                want = np.asarray(expected[name])
                size = want[np.isfinite(want)]
                peak = max(peak, float(np.abs(size).max()) if size.size else 0.0)
                found[name] = (max(worst, difference(want, got)), peak, samples + len(next(iter(inputs.values()))))
    return found


def difference(want: Array, got: Array) -> float:
    """Largest absolute difference; infinite for another shape or a NaN on one side only."""
    if want.shape != got.shape or np.any(np.isnan(want) != np.isnan(got)):
        return float("inf")
    with np.errstate(invalid="ignore"):
        gap = np.abs(want.astype(np.float64) - got.astype(np.float64))
    gap[want == got] = 0.0  # equal infinities
    return float(np.nan_to_num(gap, nan=0.0, posinf=np.inf).max(initial=0.0))


def variations(batch: Inputs, axes: Mapping[str, list[int | str | None]]) -> Iterator[Inputs]:
    """The batch, and smaller ones cut from it along axes that the file leaves open."""
    yield batch
    size = min(len(array) for array in batch.values())
    if all(isinstance(axes[name][0], int) for name in batch if name in axes):
        return
    for count in (1, 3):
        if count < size:
            yield {name: np.ascontiguousarray(array[:count]) for name, array in batch.items()}
    shorter = {name: _halve(array, axes.get(name, [])) for name, array in batch.items()}
    if any(shorter[name].shape != batch[name].shape for name in batch):
        yield shorter


def _halve(array: Array, axes: list[int | str | None]) -> Array:
    for axis, dim in enumerate(axes):
        if axis and isinstance(dim, str) and "seq" in dim.lower() and array.shape[axis] > 3:
            array = np.take(array, range(array.shape[axis] // 2), axis=axis)
    return np.ascontiguousarray(array)
