"""Operators that move values about: reshape, transpose, gather, concatenate, cut, pad. int8 stays int8."""

from __future__ import annotations

from typing import Any

import numpy as np

from targets.static_graph import Node
from targets.tflite.builder import Quantization, Tensor
from targets.tflite.convert import LAST, Converter, refuse


def reshape(state: Converter, node: Node) -> None:
    """Reshape, Flatten, Squeeze, Unsqueeze: the values stay in order, so int8 stays int8."""
    source = state.get(node.input(0), quantized=state.is_quantized(node.input(0)))
    state.reshape(source, state.result(node.outputs[0], params=source.quantization))


def identity(state: Converter, node: Node) -> None:
    state.alias(node.outputs[0], node.input(0))


def transpose(state: Converter, node: Node) -> None:
    rank = state.rank(node.input(0))
    order = tuple(int(axis) for axis in node.attributes.get("perm", range(rank)[::-1]))
    source = state.get(node.input(0), quantized=state.is_quantized(node.input(0)))
    state.move(source, state.result(node.outputs[0], params=source.quantization), order)


def gather(state: Converter, node: Node) -> None:
    """Gather: rows of a stored int8 table are gathered as int8 and dequantized after, so that the table stays small."""
    axis = int(node.attributes.get("axis", 0)) % state.rank(node.input(0))
    options = state.schema.GatherOptionsT()
    options.axis = axis
    indices, stored = _indices(state, node), state.stored.get(node.input(0))
    if stored is None or stored.scales.size > 1 or stored.values.dtype != np.int8:
        quantized = not state.is_constant(node.input(0)) and state.is_quantized(node.input(0))
        table = state.get(node.input(0), quantized=quantized)
    else:
        params = Quantization((float(stored.scales[0]),), (int(stored.zero_points[0]),))
        table = state.builder.constant(node.input(0), stored.values, params)
    state.builder.add("GATHER", [table, indices], [state.result(node.outputs[0], params=table.quantization)], options)


def _indices(state: Converter, node: Node) -> Tensor:
    """TFLite does not count from the end."""
    array = state.array(node.input(1))
    if array is None:
        return state.get(node.input(1))
    size = state.graph.shape(node.input(0))[int(node.attributes.get("axis", 0))]
    return state.constant(np.asarray(np.where(array < 0, array + size, array), np.int32))


def gather_nd(state: Converter, node: Node) -> None:
    """GatherND; stored indices that visit everything in order are a reshape (transformers' masks are written so)."""
    index = state.array(node.input(1))
    source = state.get(node.input(0))
    if index is not None and not node.attributes.get("batch_dims", 0) and index.shape[-1] == len(source.shape):
        places = np.ravel_multi_index(tuple(np.moveaxis(index, -1, 0)), source.shape, mode="wrap").reshape(-1)
        if np.array_equal(places, np.arange(np.prod(source.shape))):
            state.reshape(source, state.result(node.outputs[0]))
            return
    if node.attributes.get("batch_dims", 0):
        raise refuse(node, "GatherND with batch dimensions has no TFLite form here")
    indices = state.get(node.input(1))
    state.builder.add("GATHER_ND", [source, indices], [state.result(node.outputs[0])], state.schema.GatherNdOptionsT())


def concat(state: Converter, node: Node) -> None:
    """Concat; int8 when all parts are, each brought to the scale of the result first."""
    rank = state.rank(node.outputs[0])
    axis = int(node.attributes["axis"]) % rank
    last = rank == 4 and any(state.is_last(name) for name in node.inputs)
    params = state.int8_result(node, node.outputs[0]) if not any(map(state.is_constant, node.inputs)) else None
    parts = []
    for name in node.inputs:
        part = state.get(name, last, quantized=params is not None)
        if part.quantization != params:
            same = state.builder.tensor(f"{name}/rescaled", part.shape, "int8", params)
            state.builder.add("QUANTIZE", [part], [same], state.schema.QuantizeOptionsT())
            part = same
        parts.append(part)
    options = state.schema.ConcatenationOptionsT()
    options.axis = LAST.index(axis) if last else axis
    state.builder.add("CONCATENATION", parts, [state.result(node.outputs[0], last, params)], options)


def slice_(state: Converter, node: Node) -> None:
    """Slice with stored bounds: STRIDED_SLICE."""
    given = [state.array(node.input(position)) for position in range(1, 5)]
    if given[0] is None or given[1] is None:
        raise refuse(node, "Slice with computed bounds has no TFLite form here")
    shape = state.graph.shape(node.input(0))
    axes = range(len(given[0])) if given[2] is None else [int(axis) % len(shape) for axis in given[2]]
    steps = np.ones(len(given[0]), int) if given[3] is None else given[3]
    begin, end, stride = [0] * len(shape), list(shape), [1] * len(shape)
    for axis, first, stop, step in zip(axes, given[0], given[1], steps, strict=True):
        if step < 1:
            raise refuse(node, "Slice with a negative step has no TFLite form here")
        begin[axis], end[axis], _ = slice(int(first), int(stop)).indices(shape[axis])
        stride[axis] = int(step)
    _strided(state, node.input(0), node.outputs[0], begin, end, stride)


def _strided(state: Converter, name: str, output: str, begin: Any, end: Any, stride: Any) -> None:
    source = state.get(name, quantized=state.is_quantized(name))
    bounds = [state.constant(np.asarray(values, np.int32)) for values in (begin, end, stride)]
    result = state.result(output, params=source.quantization)
    state.builder.add("STRIDED_SLICE", [source, *bounds], [result], state.schema.StridedSliceOptionsT())


def split(state: Converter, node: Node) -> None:
    """Split: one STRIDED_SLICE a part."""
    shape = state.graph.shape(node.input(0))
    axis, at = int(node.attributes.get("axis", 0)) % len(shape), 0
    for output in node.outputs:
        size = state.graph.shape(output)[axis]
        begin, end = [0] * len(shape), list(shape)
        begin[axis], end[axis], at = at, at + size, at + size
        _strided(state, node.input(0), output, begin, end, [1] * len(shape))


def pad(state: Converter, node: Node) -> None:
    """Pad with zeros."""
    edges, value = state.array(node.input(1)), state.array(node.input(2)) if node.input(2) else None
    plain = node.attributes.get("mode", "constant") == "constant" and (value is None or not value.any())
    if edges is None or not plain or node.input(3):
        raise refuse(node, "only Pad with zeros and stored sizes has a TFLite form here")
    last = state.is_last(node.input(0))
    source = state.get(node.input(0), last, quantized=state.is_quantized(node.input(0)))
    pairs = np.asarray(edges, np.int32).reshape(2, -1).T
    sizes = state.constant(np.ascontiguousarray(pairs[list(LAST)] if last else pairs))
    result = state.result(node.outputs[0], last, source.quantization)
    state.builder.add("PAD", [source, sizes], [result], state.schema.PadOptionsT())
