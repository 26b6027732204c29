"""Batch norms that follow a convolution become part of it, before anything is quantized.

Exports of this tool are folded already; files of others often are not. ONNX Runtime folds them while it loads a float
file, but cannot once pairs stand between: the int8 file would return to float behind every convolution.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from compressor.models.onnx_graph import constants
from compressor.types import Array

EPSILON = 1e-5  # of the standard


def fold_batch_norms(model: ModelProto) -> int:
    """Fold in place; how many. A norm is left where its numbers or the weight are computed, or something else reads the
    convolution."""
    fixed = constants(model.graph)
    made = {name: node for node in model.graph.node for name in node.output}
    reads = [name for node in model.graph.node for name in node.input] + [value.name for value in model.graph.output]
    gone: list[NodeProto] = []
    for norm in model.graph.node:
        conv = made.get(norm.input[0]) if norm.op_type == "BatchNormalization" else None
        if conv is None or conv.op_type != "Conv" or len(norm.output) != 1 or reads.count(norm.input[0]) != 1:
            continue
        if any(name not in fixed for name in (*norm.input[1:], *conv.input[1:])):
            continue
        _fold(model, conv, norm, fixed)
        gone.append(norm)
    for norm in gone:
        model.graph.node.remove(norm)
    return len(gone)


def _fold(model: ModelProto, conv: NodeProto, norm: NodeProto, fixed: Mapping[str, TensorProto]) -> None:
    scale, shift, mean, variance = (_array(fixed[name]) for name in norm.input[1:5])
    epsilon = next((item.f for item in norm.attribute if item.name == "epsilon"), EPSILON)
    factor = scale / np.sqrt(variance + epsilon)
    weight = _array(fixed[conv.input[1]])
    bias = _array(fixed[conv.input[2]]) if len(conv.input) > 2 else np.zeros_like(mean)
    folded = {
        f"{norm.output[0]}_weight": weight * factor.reshape(-1, *(1,) * (weight.ndim - 1)),
        f"{norm.output[0]}_bias": (bias - mean) * factor + shift,
    }
    model.graph.initializer.extend(
        numpy_helper.from_array(array.astype(np.float32), name) for name, array in folded.items()
    )
    source = conv.input[0]
    del conv.input[:]
    conv.input.extend([source, *folded])
    conv.output[0] = norm.output[0]


def _array(tensor: TensorProto) -> Array:
    return np.asarray(numpy_helper.to_array(tensor), np.float64)
