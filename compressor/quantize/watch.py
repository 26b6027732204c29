"""Run a model and see every float tensor inside it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto

from compressor.errors import StageError, sdk_errors
from compressor.models.onnx_graph import save_model
from compressor.types import Array, Inputs

Watched = Callable[[Inputs], Iterator[tuple[str, Array]]]
Calibration = Callable[[], Iterator[Inputs]]

CHUNK = 8  # samples run at once
LOUDEST_DB = 200.0  # what float64 can tell from equal; an exact copy counts as this much
QUIETEST_DB = -200.0  # no signal at all


FLOATS = ("tensor(float)",)


def watch(model: ModelProto, wanted: Collection[str] | None = None, kinds: Collection[str] = FLOATS) -> Watched:
    """A function from inputs to (name, array) of every float tensor: inputs first, then in graph order.

    ``wanted`` narrows it to these tensors, ``kinds`` are element types in ONNX Runtime's words. The graph runs as it is
    written, without the runtime's optimisations, so that every tensor of the file exists. Raises :class:`StageError`
    when ONNX Runtime cannot load or run the model.
    """
    watched = ModelProto()
    watched.CopyFrom(model)
    taken = {value.name for value in model.graph.output}
    names = [name for node in model.graph.node for name in node.output if name and name not in taken]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if wanted is None or name in wanted)
    session = _session(watched)
    order = {name: position for position, name in enumerate(name for node in model.graph.node for name in node.output)}
    floats = [value.name for value in session.get_outputs() if value.type in kinds]
    floats = sorted((name for name in floats if wanted is None or name in wanted), key=lambda name: order.get(name, -1))
    fed = {value.name for value in session.get_inputs()}

    def run(inputs: Inputs) -> Iterator[tuple[str, Array]]:
        known = {name: array for name, array in inputs.items() if name in fed}
        with sdk_errors(StageError, "run the calibration data", hint="Calibration inputs must fit the model's inputs."):
            results = session.run(floats, known) if floats else []
        for name, array in known.items():
            if f"tensor({_type(array)})" in kinds and (wanted is None or name in wanted):
                yield name, array
        yield from zip(floats, results, strict=True)

    return run


def _type(array: Array) -> str:
    return {"float32": "float"}.get(array.dtype.name, array.dtype.name)


def outputs_of(model: ModelProto) -> Callable[[Inputs], dict[str, Array]]:
    """A function from inputs to the model's float outputs by name."""
    run = watch(model, {value.name for value in model.graph.output})

    def call(inputs: Inputs) -> dict[str, Array]:
        return {name: array for name, array in run(inputs) if name not in inputs}

    return call


def _session(model: ModelProto) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    with (
        tempfile.TemporaryDirectory(prefix="watch-") as folder,
        sdk_errors(StageError, "load the model for calibration", hint="Does the fp32 file run in ONNX Runtime?"),
    ):
        path = Path(folder) / "watched.onnx"
        save_model(model, path)
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def chunks(calibration: Calibration, dims: int = CHUNK) -> Iterator[Inputs]:
    """Batches cut to at most ``dims`` samples."""
    for batch in calibration():
        size = max((len(array) for array in batch.values()), default=0)
        even = all(len(array) == size for array in batch.values())
        if not even:
            yield batch
            continue
        for start in range(0, size, dims):
            yield {name: np.ascontiguousarray(array[start : start + dims]) for name, array in batch.items()}


class Noise:
    """Adds up signal and error energy of a tensor over batches. Infinite entries of the reference (masks) are left
    out: no difference can be taken from them."""

    def __init__(self) -> None:
        self.signal = 0.0
        self.error = 0.0

    def add(self, reference: Array, other: Array) -> None:
        first, second = reference.astype(np.float64), other.astype(np.float64)
        shown = np.isfinite(first) & (np.abs(first) < np.finfo(np.float32).max / 4)
        first, second = first[shown], second[shown]
        self.signal += float(first @ first)
        self.error += float(np.sum((first - second) ** 2))

    @property
    def sqnr_db(self) -> float:
        """10 log10(signal energy / error energy), within -200..200 dB."""
        if not np.isfinite(self.error):
            return QUIETEST_DB
        if self.error == 0:
            return LOUDEST_DB
        if self.signal == 0:
            return QUIETEST_DB
        return float(np.clip(10 * np.log10(self.signal / self.error), QUIETEST_DB, LOUDEST_DB))


def sqnr_db(reference: Array, other: Array) -> float:
    """Signal-to-quantization-noise ratio of one pair of arrays in dB.

    >>> round(sqnr_db(np.array([1.0, 1.0]), np.array([1.1, 0.9])), 3)
    20.0
    """
    noise = Noise()
    noise.add(np.ravel(reference), np.ravel(other))
    return noise.sqnr_db


def output_sqnr_db(reference: ModelProto, other: ModelProto, calibration: Calibration) -> float:
    """SQNR of a model's outputs against a reference's over the whole calibration set; the worst output counts."""
    before, after = outputs_of(reference), outputs_of(other)
    noises: dict[str, Noise] = {}
    for inputs in chunks(calibration, 64):
        found: Mapping[str, Array] = after(inputs)
        for name, array in before(inputs).items():
            if name in found and found[name].shape == array.shape:
                noises.setdefault(name, Noise()).add(array, found[name])
    if not noises:
        raise StageError("the two models share no float output", hint="They must come from the same fp32 file.")
    return min(noise.sqnr_db for noise in noises.values())


def element_types(model: ModelProto) -> dict[str, str]:
    """Element type of every input, stored tensor and node output at the top level, in ONNX Runtime's words
    (``tensor(float)``), also of operators that ONNX itself does not know."""
    watched = ModelProto()
    watched.CopyFrom(model)
    taken = {value.name for value in model.graph.output}
    names = [name for node in model.graph.node for name in node.output if name and name not in taken]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = _session(watched)
    found = {value.name: value.type for value in (*session.get_inputs(), *session.get_outputs())}
    kinds = {tensor.name: np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).name
             for tensor in model.graph.initializer}  # fmt: skip
    words = {"float32": "float", "float64": "double"}
    return found | {name: f"tensor({words.get(kind, kind)})" for name, kind in kinds.items()}
