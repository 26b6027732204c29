"""Latency of single layers in ONNX Runtime on this machine: the cost table of latency-aware pruning."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

ROUNDS = 8  # of which the fastest counts: on a shared machine the others were disturbed
ROUND_SECONDS = 0.002
COPIES = 4  # of the layer in the larger of the two graphs whose difference is taken


class Shape(Protocol):
    """See ``compressor.prune.latency.LayerShape``."""

    @property
    def outputs(self) -> int: ...
    @property
    def inputs(self) -> int: ...
    @property
    def kernel(self) -> tuple[int, ...]: ...
    @property
    def groups(self) -> int: ...
    @property
    def size(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class LayerCost:
    """Milliseconds of a layer inside a network, float32, batch 1. A convolution has stride 1 over its output's size.

    What a call costs by itself, and moving data into the kernels' blocked layout and back, is paid once a network and
    would hide what a narrower layer saves: the layer alone is taken from four of it side by side. With one thread the
    thread's processor time is read, which other processes do not disturb.
    """

    threads: int = 1
    clock: Callable[[], float] | None = None

    def __call__(self, shape: Shape) -> float:
        clock = self.clock or (time.thread_time if self.threads == 1 else time.perf_counter)
        sessions = [self._session(layer_model(shape, copies)) for copies in (1, COPIES)]
        data = {"x": np.ones(_input_shape(shape), np.float32)}
        best = [float("inf")] * len(sessions)
        for _ in range(ROUNDS):
            for number, session in enumerate(sessions):
                session.run(None, data)
                start, runs = clock(), 0
                while runs == 0 or clock() - start < ROUND_SECONDS:
                    session.run(None, data)
                    runs += 1
                best[number] = min(best[number], (clock() - start) / runs)
        return 1000 * max((best[1] - best[0]) / (COPIES - 1), best[1] / COPIES / 10)

    def _session(self, model: bytes) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = self.threads, 3
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _input_shape(shape: Shape) -> tuple[int, ...]:
    return (1, shape.inputs * shape.groups, *shape.size) if shape.kernel else (*shape.size, shape.inputs)


def layer_model(shape: Shape, copies: int = 1) -> bytes:
    """An ONNX file of Conv or MatMul nodes that read the same input, and the sum of their outputs."""
    from onnx import TensorProto, helper, numpy_helper

    kernel = list(shape.kernel)
    dims = (shape.outputs, shape.inputs, *kernel) if kernel else (shape.inputs, shape.outputs)
    options = {"kernel_shape": kernel, "group": shape.groups, "auto_pad": "SAME_UPPER"} if kernel else {}
    nodes, weights = [], []
    for copy in range(copies):  # different weights, so that no optimiser takes them for one
        weights.append(numpy_helper.from_array(np.full(dims, (1 + copy) / 64, np.float32), f"w{copy}"))
        nodes.append(helper.make_node("Conv" if kernel else "MatMul", ["x", f"w{copy}"], [f"y{copy}"], **options))
        if copy:
            nodes.append(helper.make_node("Add", [f"s{copy - 1}" if copy > 1 else "y0", f"y{copy}"], [f"s{copy}"]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, _input_shape(shape))
    y = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "layer", [x], [y], weights)
    made: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()
    return made
