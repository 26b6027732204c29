"""The 8-bit weights of a quantized file, the layer that reads each, and X'X of what the layer multiplies them by."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from compressor.quantize.adjust.graph import Wiring, attribute
from compressor.quantize.coverage import MOVED_ACROSS
from compressor.quantize.promise.sensitivity import LAYERS
from compressor.quantize.watch import Calibration, chunks, watch
from compressor.types import Array

EIGHT_BITS = (TensorProto.INT8, TensorProto.UINT8)
LEAST = 256  # elements; a smaller tensor has more bytes in names than in codes
ROWS = 16384  # of inputs that make a Gram matrix, at most
POSITIONS = 128  # of a picture's, evenly spread


@dataclass(frozen=True)
class Weight:
    """One 8-bit initializer. ``layer`` is the node that reads it, by its name in the float model; ``reads`` the float
    tensor that this node multiplies by (empty: a table, or not to be had); ``node`` it itself, None for tables."""

    name: str
    layer: str
    zero: int
    inputs_first: bool = False
    reads: str = ""
    node: NodeProto | None = None


def eight_bit_weights(model: ModelProto, layers: Collection[str]) -> tuple[Weight, ...]:
    """Every 8-bit weight of at least ``LEAST`` elements that one of ``layers`` (nodes of the float model) reads, with a
    zero point that all of its channels share. A tensor of several readers is told of the first."""
    wiring = Wiring(model)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    found = []
    for tensor in model.graph.initializer:
        if tensor.data_type not in EIGHT_BITS or np.prod(tensor.dims) < LEAST:
            continue
        weight = next(_read(tensor.name, wiring, tensors, layers), None)
        if weight is not None:
            found.append(weight)
    return tuple(found)


def _read(name: str, wiring: Wiring, tensors: Mapping[str, TensorProto], layers: Collection[str]) -> Iterator[Weight]:
    for user in wiring.users.get(name, []):
        if user.op_type == "DequantizeLinear" and user.input[0] == name:
            zero = _zero(user, 2, tensors)
            if zero is not None:
                yield from _behind(name, user, zero, wiring, layers)
        elif user.op_type == "MatMulInteger" and user.input[1] == name:
            zero, layer = _zero(user, 3, tensors), _owner(user.name, layers)
            source = wiring.made.get(user.input[0])
            if zero is not None and layer:
                reads = source.input[0] if source is not None and source.op_type == "DynamicQuantizeLinear" else ""
                yield Weight(name, layer, zero, True, reads, user)
        elif user.op_type == "Gather" and user.input[0] == name and user.name in layers:
            after = next((node for node in wiring.users[user.output[0]] if node.op_type == "DequantizeLinear"), None)
            zero = None if after is None else _zero(after, 2, tensors)
            if zero is not None:
                yield Weight(name, user.name, zero)


def _behind(name: str, pair: NodeProto, zero: int, wiring: Wiring, layers: Collection[str]) -> Iterator[Weight]:
    """Readers of a dequantized weight, also beyond operators that only move it."""
    pending = [(node, True) for node in wiring.users.get(pair.output[0], [])]
    while pending:
        node, direct = pending.pop()
        if node.op_type in LAYERS and node.name in layers:
            first = direct and (
                node.op_type == "MatMul" or (node.op_type == "Gemm" and not attribute(node, "transB", 0))
            )
            yield Weight(name, node.name, zero, first, node.input[0] if direct else "", node)
        elif node.op_type == "Gather" and node.name in layers:
            yield Weight(name, node.name, zero)
        elif node.op_type in MOVED_ACROSS:
            pending += [(after, False) for after in wiring.users.get(node.output[0], [])]


def _owner(name: str, layers: Collection[str]) -> str:
    """The float node that an integer node was made of: the quantizer adds to its name."""
    return max((layer for layer in layers if name == layer or name.startswith(f"{layer}_")), key=len, default="")


def _zero(node: NodeProto, position: int, tensors: Mapping[str, TensorProto]) -> int | None:
    """The zero point; None where channels differ in it or it is computed."""
    if len(node.input) <= position or not node.input[position]:
        return 0
    tensor = tensors.get(node.input[position])
    values = None if tensor is None else numpy_helper.to_array(tensor).astype(int)
    return int(values.flat[0]) if values is not None and values.size and np.all(values == values.flat[0]) else None


def grams(model: ModelProto, weights: Collection[Weight], calibration: Calibration) -> dict[str, Array]:
    """X'X of the inputs of every weight's layer, (inputs, inputs) float32, by weight. Grouped and transposed layers,
    and those whose inputs lie on no plain axis, are left out."""
    wanted = [weight for weight in weights if weight.reads and weight.node is not None]
    run = watch(model, {weight.reads for weight in wanted})
    kernels = {tensor.name: list(tensor.dims[2:]) for tensor in model.graph.initializer}
    made: dict[str, Array] = {}
    seen: dict[str, int] = {}
    for inputs in chunks(calibration):
        tensors = dict(run(inputs))
        for weight in wanted:
            enough = seen.get(weight.name, 0) >= ROWS
            rows = None if enough else _rows(weight.node, tensors.get(weight.reads), kernels[weight.name])
            if rows is not None:
                product = rows.T @ rows
                made[weight.name] = product + made[weight.name] if weight.name in made else product
                seen[weight.name] = seen.get(weight.name, 0) + len(rows)
    return made


def _rows(node: NodeProto | None, array: Array | None, kernel: Sequence[int]) -> Array | None:
    """What each output of the layer is a product with: (positions, inputs)."""
    if node is None or array is None:
        return None
    if node.op_type == "Conv":
        return _patches(node, array, kernel)
    if node.op_type == "ConvTranspose" or (node.op_type == "Gemm" and attribute(node, "transA", 0)):
        return None
    rows = np.ascontiguousarray(array.reshape(-1, array.shape[-1]), np.float32)
    size = np.sqrt(np.mean(np.square(rows), axis=1, keepdims=True))  # no position outweighs the rest (weights.stream)
    return np.asarray(rows / np.maximum(size, 1e-12)) if array.ndim > 2 else rows


def _patches(node: NodeProto, array: Array, kernel: Sequence[int]) -> Array | None:
    """The patches under a convolution's kernel, (samples * positions, channels * kernel), as its weight is laid out."""
    settings = {item.name: item for item in node.attribute}
    rank = array.ndim - 2
    plain = "auto_pad" not in settings or settings["auto_pad"].s == b"NOTSET"
    if attribute(node, "group", 1) != 1 or len(kernel) != rank or not plain:
        return None
    pads, steps, holes = (
        list(settings[name].ints) if name in settings else [default] * count
        for name, default, count in (("pads", 0, 2 * rank), ("strides", 1, rank), ("dilations", 1, rank))
    )
    padded = np.pad(array, [(0, 0), (0, 0), *((pads[at], pads[rank + at]) for at in range(rank))])
    spans = [(size - 1) * hole + 1 for size, hole in zip(kernel, holes, strict=True)]
    view = np.lib.stride_tricks.sliding_window_view(padded, spans, axis=tuple(range(2, 2 + rank)))
    strided: Any = (slice(None), slice(None), *(slice(None, None, step) for step in steps))
    spread: Any = (..., *(slice(None, None, hole) for hole in holes))
    view = view[strided][spread]
    samples, channels, places = array.shape[0], array.shape[1], int(np.prod(view.shape[2 : 2 + rank]))
    moved = np.moveaxis(view, 1, 1 + rank)  # samples, positions..., channels, kernel...
    chosen = np.unravel_index(np.linspace(0, places - 1, min(POSITIONS, places)).astype(int), view.shape[2 : 2 + rank])
    places_taken: Any = (slice(None), *chosen)
    found = moved[places_taken]
    return np.ascontiguousarray(found, np.float32).reshape(samples * len(chosen[0]), channels * int(np.prod(kernel)))
