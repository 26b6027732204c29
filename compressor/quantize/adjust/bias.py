"""Bias correction: rounding a weight shifts the mean of what it computes; the shift is taken off the bias
(Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, with means from
calibration data)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import ModelProto, NodeProto, numpy_helper

from compressor.quantize.adjust.graph import Wiring, attribute, bias_of, output_axis
from compressor.quantize.watch import Calibration, chunks, watch
from compressor.types import Array, LayerFact

CORRECTED = ("Conv", "Gemm", "MatMul")


def correct_bias(model: ModelProto, quantized: ModelProto, calibration: Calibration) -> tuple[LayerFact, ...]:
    """Correct the biases of ``model`` in place, given the int8 file that was made of it.

    Each layer takes off its own shift, ``(W_int8 - W) E[x]``, so that all layers can be corrected at once. A MatMul
    without a bias behind it is left alone.
    """
    wiring = Wiring(model)
    rounded = dequantized_weights(quantized)
    nodes = [node for node in model.graph.node if node.op_type in CORRECTED and node.name in rounded]
    nodes = [node for node in nodes if bias_of(node, wiring) is not None and _plain(node)]
    means = _means(model, calibration, nodes)
    facts = []
    for node in nodes:
        weight = wiring.array(node.input[1])
        if weight is None or node.input[0] not in means or weight.shape != rounded[node.name].shape:
            continue
        shift = _shift(node, rounded[node.name] - weight, means[node.input[0]])
        place = bias_of(node, wiring)
        assert place is not None
        name = place[0].input[place[1]]
        stored = wiring.array(name)
        if stored is None or stored.shape != shift.shape:
            continue
        wiring.set(name, stored - shift)
        reason = f"bias moved by at most {np.abs(shift).max():.2g} against the rounding of the weights"
        facts.append(LayerFact("quantize", node.name, "bias-corrected", "float32", "float32", reason))
    return tuple(facts)


def dequantized_weights(quantized: ModelProto) -> dict[str, Array]:
    """Node name -> its weight as the quantize-dequantize file computes with it."""
    stored = {tensor.name: tensor for tensor in quantized.graph.initializer}
    made = {name: node for node in quantized.graph.node for name in node.output}
    found: dict[str, Array] = {}
    for node in quantized.graph.node:
        source = made.get(node.input[1]) if node.op_type in CORRECTED and len(node.input) > 1 else None
        if source is None or source.op_type != "DequantizeLinear" or source.input[0] not in stored:
            continue
        values = numpy_helper.to_array(stored[source.input[0]]).astype(np.float32)
        scale = numpy_helper.to_array(stored[source.input[1]])
        zero = numpy_helper.to_array(stored[source.input[2]]).astype(np.float32) if len(source.input) > 2 else 0 * scale
        if scale.ndim:
            shape = [1] * values.ndim
            shape[attribute(source, "axis", 1)] = -1
            scale, zero = scale.reshape(shape), zero.reshape(shape)
        found[node.name] = (values - zero) * scale
    return found


def _plain(node: NodeProto) -> bool:
    return all(item.f == 1.0 for item in node.attribute if item.name in ("alpha", "beta"))


def _means(model: ModelProto, calibration: Calibration, nodes: list[NodeProto]) -> Mapping[str, Array]:
    """Mean per channel of every input: axis 1 of pictures, the last axis of matrices."""
    pictures = {node.input[0] for node in nodes if node.op_type == "Conv"}
    names = {node.input[0] for node in nodes}
    sums: dict[str, Array] = {}
    counts: dict[str, int] = {}
    run = watch(model, names)
    for inputs in chunks(calibration):
        for name, array in run(inputs):
            if name not in names or not array.size:
                continue
            axis = 1 if name in pictures else array.ndim - 1
            others = tuple(other for other in range(array.ndim) if other != axis)
            sums[name] = sums.get(name, 0.0) + array.sum(axis=others, dtype=np.float64)
            counts[name] = counts.get(name, 0) + array.size // array.shape[axis]
    return {name: total / counts[name] for name, total in sums.items()}


def _shift(node: NodeProto, error: Array, mean: Array) -> Array:
    """E[y_int8 - y] per output channel from the weights' rounding error and the mean input."""
    if node.op_type != "Conv":
        return np.asarray(error @ mean if output_axis(node) == 0 else mean @ error)
    group = attribute(node, "group", 1)
    kernel = error.reshape(error.shape[0], error.shape[1], -1).sum(axis=2)  # out, in / group
    per_group = mean.reshape(group, -1)  # group, in / group
    rows = kernel.reshape(group, -1, kernel.shape[1])  # group, out / group, in / group
    return np.asarray(np.einsum("goi,gi->go", rows, per_group).reshape(-1))
