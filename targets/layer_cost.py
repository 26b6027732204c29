"""Latency of single layers in ONNX Runtime on this machine: the cost table of latency-aware pruning."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

ROUNDS = 5  # of which the fastest counts: on a shared machine the others were disturbed
ROUND_SECONDS = 0.004


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
    """Milliseconds of a layer alone, float32, batch 1. A convolution runs with stride 1 over its output's size."""

    threads: int = 1
    clock: Callable[[], float] = time.perf_counter

    def __call__(self, shape: Shape) -> float:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = self.threads, 3
        session = onnxruntime.InferenceSession(layer_model(shape), options, providers=["CPUExecutionProvider"])
        data = {"x": np.ones(_input_shape(shape), np.float32)}
        session.run(None, data)
        best = float("inf")
        for _ in range(ROUNDS):
            start, runs = self.clock(), 0
            while runs == 0 or self.clock() - start < ROUND_SECONDS:
                session.run(None, data)
                runs += 1
            best = min(best, (self.clock() - start) / runs)
        return 1000 * best


def _input_shape(shape: Shape) -> tuple[int, ...]:
    return (1, shape.inputs * shape.groups, *shape.size) if shape.kernel else (*shape.size, shape.inputs)


def layer_model(shape: Shape) -> bytes:
    """An ONNX file of one Conv or MatMul with weights of one."""
    from onnx import TensorProto, helper, numpy_helper

    kernel = list(shape.kernel)
    dims = (shape.outputs, shape.inputs, *kernel) if kernel else (shape.inputs, shape.outputs)
    weight = numpy_helper.from_array(np.full(dims, 1 / 64, np.float32), "w")
    if kernel:
        node = helper.make_node(
            "Conv", ["x", "w"], ["y"], kernel_shape=kernel, group=shape.groups, auto_pad="SAME_UPPER"
        )  # fmt: skip
    else:
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, _input_shape(shape))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "layer", [x], [y], [weight])
    made: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()
    return made
