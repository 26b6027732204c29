"""Run an ONNX graph on the CPU and look at the tensors in its middle. numpy and ONNX Runtime only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto

from compressor.errors import StageError, sdk_errors
from compressor.models.onnx_graph import graph_inputs
from compressor.types import Array

FLOATS_AT_ONCE = 2**24  # 64 MiB of watched tensors at most, whatever the number of samples


class Watcher:
    """A session that also returns the named tensors inside the graph."""

    def __init__(self, model: ModelProto, watch: Sequence[str] = (), *, optimise: bool = True) -> None:
        opened = model
        own = {value.name for value in model.graph.output}
        more = [name for name in dict.fromkeys(watch) if name not in own]
        if more:
            opened = ModelProto()
            opened.CopyFrom(model)
            opened.graph.output.extend(onnx.ValueInfoProto(name=name) for name in more)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_BASIC if optimise else level.ORT_DISABLE_ALL
        with sdk_errors(StageError, "open the ONNX graph and watch its tensors"):
            blob = opened.SerializeToString()
            self._session = ort.InferenceSession(blob, options, providers=["CPUExecutionProvider"])
        self._inputs = [value.name for value in self._session.get_inputs()]
        self._outputs = [value.name for value in self._session.get_outputs()]

    def run(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Every output and watched tensor by name."""
        with sdk_errors(StageError, "run the ONNX graph"):
            found = self._session.run(self._outputs, {name: batch[name] for name in self._inputs})
        return {name: array for name, array in zip(self._outputs, found, strict=True) if isinstance(array, np.ndarray)}


def fixed_samples(model: ModelProto) -> int | None:
    """Samples in one batch when the file fixes them, otherwise None."""
    sizes = [spec.shape[0] for spec in graph_inputs(model) if spec.shape]
    return next((size for size in sizes if isinstance(size, int)), None)


def few_samples(model: ModelProto, example: Mapping[str, Array], count: int = 2) -> dict[str, Array]:
    """The first samples, as many as the file wants; two where it is free, because size 1 looks like a broadcast."""
    wanted = fixed_samples(model) or count
    cut = {}
    for name, array in example.items():
        take = np.arange(wanted) % max(1, min(wanted, len(array))) if array.ndim else 0
        cut[name] = array[take] if array.ndim else array
    return cut


def batches_of(model: ModelProto, batch: Mapping[str, Array], floats_per_sample: int) -> Iterator[dict[str, Array]]:
    """``batch`` in pieces that the file accepts and that keep the watched tensors small. A last piece that cannot
    fill the batch the file fixes is left out."""
    total = len(next(iter(batch.values())))
    fixed = fixed_samples(model)
    size = fixed or max(1, min(total, FLOATS_AT_ONCE // max(1, floats_per_sample)))
    for start in range(0, total, size):
        if fixed is None or start + size <= total:
            yield {name: np.ascontiguousarray(array[start : start + size]) for name, array in batch.items()}


def random_example(model: ModelProto, seed: int = 0) -> dict[str, Array]:
    """Inputs of the file's own shapes: normal floats, zeros for integers; 16 stands for a free size."""
    generator = np.random.default_rng(seed)
    made: dict[str, Array] = {}
    for spec in graph_inputs(model):
        shape = [size if isinstance(size, int) else (2 if axis == 0 else 16) for axis, size in enumerate(spec.shape)]
        noise = generator.normal(size=shape) if np.dtype(spec.dtype).kind == "f" else np.zeros(shape)
        made[spec.name] = noise.astype(spec.dtype)
    return made
