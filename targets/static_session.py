"""Any batch and any sequence length through a model whose shapes are fixed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from compressor.errors import RunError
from compressor.types import Array, Artifact

Call = Callable[[Mapping[str, Array]], Mapping[str, Array]]  # inputs of exactly the fixed shapes


class StaticSession:
    """Cuts a batch into pieces of the model's size, fills the last one up, pads token inputs with zeros.

    ``shapes`` are the fixed input shapes; ``call`` runs one piece, or where ``stacked`` any number of whole pieces one
    after the other. Outputs lose what was filled up: rows beyond the batch, and places beyond the sequence that was fed
    where an output has the same free dimension.
    """

    def __init__(
        self, artifact: Artifact, shapes: Mapping[str, tuple[int, ...]], call: Call, stacked: bool = False
    ) -> None:
        self._artifact, self._shapes, self._call, self._stacked = artifact, shapes, call, stacked
        self._size = next(iter(shapes.values()))[0]
        self._free = {
            spec.name: {axis: size for axis, size in enumerate(spec.shape) if axis and isinstance(size, str)}
            for spec in artifact.outputs
        }

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Every output by name."""
        if all(inputs[name].shape == shape for name, shape in self._shapes.items()):
            return self._call(inputs)
        fitted = {name: self._fit(name, inputs[name]) for name in self._shapes}
        count = len(next(iter(fitted.values())))
        step = -(-count // self._size) * self._size if self._stacked else self._size
        pieces = [self._piece(fitted, start, step) for start in range(0, count, step)]
        joined = {name: np.concatenate([piece[name] for piece in pieces])[:count] for name in pieces[0]}
        return {name: self._cut(name, array, inputs) for name, array in joined.items()}

    def fitted(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Inputs of one piece in exactly the model's shapes."""
        part = {name: self._fit(name, inputs[name])[: self._size] for name in self._shapes}
        return self._filled(part, self._size)

    def _piece(self, inputs: Mapping[str, Array], start: int, step: int) -> dict[str, Array]:
        return dict(
            self._call(self._filled({name: array[start : start + step] for name, array in inputs.items()}, step))
        )

    def _filled(self, part: Mapping[str, Array], size: int) -> dict[str, Array]:
        """Contiguous, the last row repeated up to ``size`` rows."""
        missing = size - len(next(iter(part.values())))
        if missing:
            part = {name: np.concatenate([array, np.repeat(array[-1:], missing, 0)]) for name, array in part.items()}
        return {name: np.ascontiguousarray(array) for name, array in part.items()}

    def _fit(self, name: str, array: Array) -> Array:
        wanted = self._shapes[name]
        if array.ndim != len(wanted) or any(
            size > most or (size < most and array.dtype.kind not in "iub")
            for size, most in zip(array.shape[1:], wanted[1:], strict=False)
        ):
            raise RunError(
                f"input `{name}` is {array.shape}, the compiled model takes {wanted}",
                hint="Raise `options.max_sequence` of the profile, or feed shorter inputs.",
            )
        edges = [(0, 0), *((0, most - size) for size, most in zip(array.shape[1:], wanted[1:], strict=True))]
        return np.pad(array, edges) if any(after for _, after in edges) else array

    def _cut(self, name: str, array: Array, inputs: Mapping[str, Array]) -> Array:
        lengths = {
            size: inputs[spec.name].shape[axis]
            for spec in self._artifact.inputs
            for axis, size in enumerate(spec.shape)
            if axis and isinstance(size, str) and spec.name in inputs
        }
        index: list[Any] = [slice(None)] * array.ndim
        for axis, dimension in self._free.get(name, {}).items():
            if dimension in lengths:
                index[axis] = slice(lengths[dimension])
        cut: Array = array[tuple(index)]
        return cut
