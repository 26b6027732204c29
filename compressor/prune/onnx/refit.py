"""Weights fitted again after a cut: each layer learns to give what the original's layer gave. No labels, no gradients.

Source: He, Zhang and Sun, "Channel Pruning for Accelerating Very Deep Neural Networks" (ICCV 2017), section 3.2: what
is left of a layer's inputs is fitted by least squares to the layer's own outputs in the original network. Here layer
after layer, in the graph's order, on the inputs that the cut graph really has by then, so that errors do not add up;
and as a ridge towards the weights as they are, so that few samples cannot ruin them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, ValueInfoProto, numpy_helper

from compressor.models.onnx_graph import constants
from compressor.models.structure.groups import Cut, Floats, Index, Key, removed_positions
from compressor.prune.onnx.graph import Structure
from compressor.prune.onnx.runtime import Watcher, batches_of
from compressor.types import Array

WAY = "weights fitted again to the original's outputs, layer by layer"
SAMPLES = 96  # of the calibration data
ROWS = 6_000  # equations a layer is fitted by, about
RIDGE = 1e-3  # of the mean squared input: the pull towards the weights as they are
SAME = 1e-10  # relative error below which a layer needs nothing


@dataclass(frozen=True)
class _Layer:
    """A node as a matrix: ``weight`` is (outputs, inputs x taps), its bias one more column."""

    node: NodeProto
    weight: Floats
    bias: Floats
    inputs: Index  # columns that are still there
    outputs: Index  # rows that are still there


def refit(
    structure: Structure, masked: ModelProto, cuts: Sequence[Cut], batches: Sequence[Mapping[str, Array]]
) -> tuple[ModelProto, list[str]]:
    """A copy of ``masked`` with fitted weights, and the nodes that were fitted; removed units stay zero.

    Convolutions of one group, Gemm and MatMul with a constant. ``batches`` are inputs by name; about ``SAMPLES``
    samples are read.
    """
    changed = ModelProto()
    changed.CopyFrom(masked)
    removed, done = removed_positions(cuts), []
    for name in [node.name for node in changed.graph.node]:
        node = next(each for each in changed.graph.node if each.name == name)
        layer = _layer(changed, node, removed)
        if layer is None:
            continue
        fitted = _fit(structure, changed, layer, batches)
        if fitted is not None:
            _write(changed, layer, fitted)
            done.append(name)
    return changed, done


def _layer(model: ModelProto, node: NodeProto, removed: Mapping[Key, Index]) -> _Layer | None:
    tensors = constants(model.graph)
    weight = tensors.get(node.input[1]) if node.op_type in ("Conv", "Gemm", "MatMul") and len(node.input) > 1 else None
    bias = tensors.get(node.input[2]) if weight is not None and len(node.input) > 2 else None
    if weight is None or _unlike(node) or (node.op_type != "MatMul" and bias is None):
        return None
    array = numpy_helper.to_array(weight).astype(np.float64)
    reads = _input_axis(node)
    if array.ndim > 4 or (node.op_type != "Conv" and array.ndim != 2):
        return None
    rows, columns = (
        np.setdiff1d(np.arange(array.shape[axis]), removed.get(Key(f"{node.name}.1", axis), []))
        for axis in (1 - reads, reads)
    )
    matrix = np.moveaxis(array, reads, 1)
    taps = int(np.prod(matrix.shape[2:], dtype=np.int64))
    columns = (columns[:, None] * taps + np.arange(taps)).reshape(-1)
    vector = numpy_helper.to_array(bias).astype(np.float64).reshape(-1) if bias is not None else np.empty(0)
    if bias is not None and vector.size != matrix.shape[0]:
        return None
    return _Layer(node, matrix.reshape(len(matrix), -1), vector, columns, rows)


def _unlike(node: NodeProto) -> bool:
    """Attributes under which the node is not the plain matrix it is taken for."""
    values = {each.name: each for each in node.attribute}
    if node.op_type == "Gemm":
        scales = [values[name].f for name in ("alpha", "beta") if name in values]
        return any(scale != 1.0 for scale in scales) or ("transA" in values and values["transA"].i != 0)
    return "group" in values and values["group"].i != 1


def _input_axis(node: NodeProto) -> int:
    if node.op_type == "Conv":
        return 1
    turned = next((each.i for each in node.attribute if each.name == "transB"), 0)
    return 1 if node.op_type == "Gemm" and turned else 0


def _fit(
    structure: Structure, changed: ModelProto, layer: _Layer, batches: Sequence[Mapping[str, Array]]
) -> tuple[Floats, Floats] | None:
    """New weight and bias by ridge regression of what is still wrong; None when nothing is."""
    node, size = layer.node, len(layer.inputs) + (1 if layer.bias.size else 0)
    square, cross = np.zeros((size, size)), np.zeros((size, len(layer.outputs)))
    wrong = total = 0.0
    count = 0
    own = layer.weight[np.ix_(layer.outputs, layer.inputs)]
    for data, wanted in _pairs(structure.trace.model, changed, node, batches):
        x, y = _equations(node, data, wanted, layer)
        if layer.bias.size:
            x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
        start = np.concatenate([own, layer.bias[layer.outputs, None]], axis=1) if layer.bias.size else own
        error = y - x @ start.T
        wrong, total, count = wrong + float(np.square(error).sum()), total + float(np.square(y).sum()), count + len(x)
        square += x.T @ x
        cross += x.T @ error
    if not count or wrong <= SAME * max(total, 1e-30):
        return None
    pull = RIDGE * float(np.trace(square)) / size + 1e-12
    step = np.linalg.solve(square + pull * np.eye(size), cross).T
    weight, bias = layer.weight.copy(), layer.bias.copy()
    weight[np.ix_(layer.outputs, layer.inputs)] += step[:, : len(layer.inputs)]
    if bias.size:
        bias[layer.outputs] += step[:, -1]
    return weight, bias


def _pairs(
    original: ModelProto, changed: ModelProto, node: NodeProto, batches: Sequence[Mapping[str, Array]]
) -> Iterator[tuple[Array, Array]]:
    """What the node reads in the cut graph and what it gave in the original, batch by batch."""
    reads, gave = node.input[0], node.output[0]
    wanted = Watcher(_only(original, gave))
    read = None if any(value.name == reads for value in changed.graph.input) else Watcher(_only(changed, reads))
    seen = 0
    for batch in batches:
        if seen >= SAMPLES:
            return
        for piece in batches_of(original, batch, 2**18):
            seen += len(next(iter(piece.values())))
            yield (piece[reads] if read is None else read.run(piece)[reads]), wanted.run(piece)[gave]


def _only(model: ModelProto, tensor: str) -> ModelProto:
    """The graph with one tensor as its output: the runtime leaves out what comes after it."""
    opened = ModelProto()
    opened.CopyFrom(model)
    del opened.graph.output[:]
    opened.graph.output.append(ValueInfoProto(name=tensor))
    return opened


def _equations(node: NodeProto, data: Array, wanted: Array, layer: _Layer) -> tuple[Floats, Floats]:
    """Rows of inputs that are left and the outputs they should give, at positions drawn for the batch."""
    if node.op_type != "Conv":
        x = data.reshape(-1, data.shape[-1])
        y = wanted.reshape(-1, wanted.shape[-1])
        take = _draw(len(x), ROWS * len(data) // SAMPLES)
        return x[take][:, layer.inputs].astype(np.float64), y[take][:, layer.outputs].astype(np.float64)
    places = wanted.shape[2:]
    drawn = np.unravel_index(_draw(int(np.prod(places)), max(1, ROWS // SAMPLES)), places)
    x = _patches(node, data, drawn, layer)
    y = np.moveaxis(wanted.reshape(*wanted.shape[:2], -1)[:, :, np.ravel_multi_index(drawn, places)], 1, 2)
    return x.astype(np.float64), y.reshape(-1, y.shape[-1])[:, layer.outputs].astype(np.float64)


def _draw(count: int, wanted: int) -> Index:
    return np.sort(np.random.default_rng(count).permutation(count)[: max(1, wanted)])


def _patches(node: NodeProto, data: Array, take: Sequence[Any], layer: _Layer) -> Array:
    """(samples x positions, inputs x taps) that a convolution sees at these output positions."""
    values = {each.name: list(each.ints) or each.s for each in node.attribute}
    kernel, rank = values.get("kernel_shape"), data.ndim - 2
    kernel = kernel or _kernel(layer, data)
    strides, dilations = values.get("strides") or [1] * rank, values.get("dilations") or [1] * rank
    pads = _pads(values, data.shape[2:], kernel, strides, dilations)
    padded = np.pad(data, [(0, 0), (0, 0), *pads])
    index = [
        place[:, None] * stride + np.arange(size) * dilation
        for place, stride, size, dilation in zip(take, strides, kernel, dilations, strict=True)
    ]
    columns = index if rank == 1 else [index[0][:, :, None], index[1][:, None, :]]
    found = padded[(slice(None), slice(None), *columns)]
    rows = np.moveaxis(found, 2, 1).reshape(data.shape[0] * len(take[0]), -1)
    return rows[:, layer.inputs]


def _kernel(layer: _Layer, data: Array) -> list[int]:
    taps = layer.weight.shape[1] // data.shape[1]
    side = round(taps ** (1 / (data.ndim - 2)))
    return [side] * (data.ndim - 2)


def _pads(
    values: Mapping[str, Any],
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> list[tuple[int, int]]:
    mode = values.get("auto_pad", b"NOTSET")
    if mode == b"VALID":
        return [(0, 0)] * len(sizes)
    if mode in (b"SAME_UPPER", b"SAME_LOWER"):
        made = []
        for size, taps, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
            missing = max(0, (-(-size // stride) - 1) * stride + (taps - 1) * dilation + 1 - size)
            small = missing // 2
            made.append((small, missing - small) if mode == b"SAME_UPPER" else (missing - small, small))
        return made
    given = values.get("pads") or [0] * (2 * len(sizes))
    return list(zip(given[: len(sizes)], given[len(sizes) :], strict=True))


def _write(model: ModelProto, layer: _Layer, fitted: tuple[Floats, Floats]) -> None:
    tensors = constants(model.graph)
    weight = tensors[layer.node.input[1]]
    old = numpy_helper.to_array(weight)
    reads = _input_axis(layer.node)
    turned = np.moveaxis(old, reads, 1).shape
    new = np.moveaxis(fitted[0].reshape(turned), 1, reads)
    weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(new.astype(old.dtype)), weight.name))
    if fitted[1].size:
        bias = tensors[layer.node.input[2]]
        shape, dtype = numpy_helper.to_array(bias).shape, numpy_helper.to_array(bias).dtype
        bias.CopyFrom(numpy_helper.from_array(fitted[1].reshape(shape).astype(dtype), bias.name))


__all__ = ["WAY", "refit"]
