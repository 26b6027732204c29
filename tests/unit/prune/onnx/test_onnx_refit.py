"""Weights fitted again: exact where what went can be had from what stays, and never worse on data it did not see."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from compressor.models.onnx_graph import constants
from compressor.prune.onnx import prune
from compressor.prune.onnx.refit import WAY
from compressor.prune.onnx.runtime import Watcher
from compressor.recipe import PruneStage
from tests.unit.prune.onnx.graphs import Builder


def narrow(kind: str, **attributes: Any) -> tuple[ModelProto, tuple[int, ...]]:
    """Three inputs, eight hidden channels that are linear in them: any four of these say all."""
    builder = Builder()
    if kind == "gemm":
        hidden = builder.linear("wide", "x", 8, 3)
        builder.linear("read", hidden, 5, 8)
        shape: tuple[int, ...] = (3,)
    elif kind == "matmul":
        hidden = builder.add("MatMul", "wide", "x", builder.weight("wide.weight", 3, 8))
        builder.add("MatMul", "read", hidden, builder.weight("read.weight", 8, 5))
        shape = (4, 3)
    else:
        flat = len(attributes["kernel_shape"])
        hidden = builder.add("Conv", "wide", "x", builder.weight("wide.weight", 8, 3, *[1] * flat))
        weight = builder.weight("read.weight", 5, 8, *attributes["kernel_shape"])
        builder.add("Conv", "read", hidden, weight, builder.weight("read.bias", 5), **attributes)
        shape = (3, *[9] * flat)
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *shape])]
    free = ["n", *(f"d{axis}" for axis in range(len(shape)))]
    outputs = [helper.make_tensor_value_info("read", TensorProto.FLOAT, free)]
    graph = helper.make_graph(builder._nodes, kind, inputs, outputs, builder._tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), shape


CASES = {
    "gemm": ("gemm", {}),
    "matmul": ("matmul", {}),
    "strided": ("conv", {"kernel_shape": [3, 3], "strides": [2, 1], "pads": [1, 0, 1, 2]}),
    "dilated": ("conv", {"kernel_shape": [3, 3], "dilations": [2, 2], "pads": [2, 2, 2, 2]}),
    "same": ("conv", {"kernel_shape": [3, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    "one dimension": ("conv", {"kernel_shape": [5], "pads": [2, 2]}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_can_be_had_from_the_rest_is_had(case: str) -> None:
    model, shape = narrow(CASES[case][0], **CASES[case][1])
    random = np.random.default_rng(0)
    data = [{"x": random.normal(size=(32, *shape)).astype(np.float32)} for _ in range(5)]
    config = PruneStage(kind="prune", ratio=0.5, importance="magnitude")
    done = prune(model, {"x": data[0]["x"][:2]}, config, data)
    assert done.way == WAY
    assert done.distances[WAY] < 1e-4 * done.distances["nothing"]
    small = numpy_helper.to_array(constants(done.model.graph)["read.weight"])
    assert small.shape[0 if case == "matmul" else 1] == 4
    fresh = {"x": random.normal(size=(8, *shape)).astype(np.float32)}
    wanted, found = (Watcher(each).run(fresh)["read"] for each in (model, done.model))
    assert np.abs(wanted - found).max() < 0.05 * np.abs(wanted).max()
    assert [fact.after for fact in done.facts if fact.action == "fitted"] == ["1 layers"]


def test_too_few_samples_are_not_fitted() -> None:
    model, shape = narrow("gemm")
    data = {"x": np.random.default_rng(0).normal(size=(8, *shape)).astype(np.float32)}
    done = prune(model, data, PruneStage(kind="prune", ratio=0.5, importance="magnitude"), [data])
    assert WAY not in done.distances
