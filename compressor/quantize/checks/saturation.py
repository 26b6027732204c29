"""What int8 sums lose on x86 processors without VNNI, emulated on any machine.

There ``vpmaddubsw`` multiplies an unsigned byte by a signed one and adds neighbouring products in 16 bits *with
saturation* (Intel 64 and IA-32 Architectures Software Developer's Manual, PMADDUBSW). Two products of 255 x 127 need 17
bits, so that a file which is right on a newer processor is wrong there, and no accuracy measured here shows it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, numpy_helper

from compressor.errors import StageError
from compressor.quantize.adjust.graph import attribute
from compressor.quantize.watch import Calibration, Noise, chunks, watch
from compressor.types import Array, LayerFact

SAMPLES = 4  # pictures or sentences
POSITIONS = 64  # rows of the unfolded input that are looked at per layer
CELLS = 4_000_000  # products held at once (32 MB)
HARMFUL_DB = 30.0  # int8 rounding itself leaves 30 to 40 dB in a layer; louder saturation decides the accuracy
LOWEST, HIGHEST = -(2**15), 2**15 - 1


@dataclass(frozen=True)
class Saturation:
    """One layer: the share of 16-bit sums that saturate, and how far the layer's result stays from the exact one."""

    layer: str
    share: float
    sqnr_db: float


@dataclass(frozen=True)
class _Layer:
    node: NodeProto
    name: str
    activation: str  # the 8-bit tensor
    weight: Array  # int8, as stored
    zero: int  # of the activation


def saturation(model: ModelProto, calibration: Calibration, samples: int = SAMPLES) -> tuple[Saturation, ...]:
    """Emulate the sums of every layer with 8-bit activations and int8 weights on the first calibration samples.

    Depthwise convolutions are left out: their kernels widen to 16 bits before they multiply. So are uint8 weights.
    """
    layers = _layers(model)
    run = watch(model, {layer.activation for layer in layers}, kinds=("tensor(uint8)", "tensor(int8)"))
    inputs = next(chunks(calibration, samples), None)
    if inputs is None:
        raise StageError("there is no calibration data", hint="Raise `data.calibration`, or give more samples.")
    found = dict(run(inputs))
    return tuple(_emulate(layer, found[layer.activation]) for layer in layers if layer.activation in found)


def saturation_facts(model: ModelProto, calibration: Calibration) -> tuple[LayerFact, ...]:
    """One fact per layer that saturates. Raises :class:`StageError` when one loses more than int8 itself costs."""
    facts = []
    for layer in saturation(model, calibration):
        if not layer.share:
            continue
        told = f"{layer.share:.2%} of its 16-bit sums saturate without VNNI ({layer.sqnr_db:.0f} dB to the exact sums)"
        if layer.sqnr_db < HARMFUL_DB:
            hint = "Set `reduce_range = true` in the profile's [quantization], or leave it out there."
            raise StageError(f"`{layer.layer}` would be wrong on this processor: {told}", hint=hint)
        facts.append(LayerFact("quantize", layer.layer, "saturates", "int8", "int8", told))
    return tuple(facts)


def pair_sums(activation: Array, weight: Array) -> tuple[Array, Array, int]:
    """(P, K) unsigned bytes times (M, K) signed bytes -> exact and saturated (P, M) sums, and how many pairs saturate.

    >>> exact, held, count = pair_sums(np.array([[255, 255]]), np.array([[127, 127]]))
    >>> int(exact[0, 0]), int(held[0, 0]), count
    (64770, 32767, 1)
    """
    products = activation[:, None, :].astype(np.int32) * weight[None].astype(np.int32)
    if products.shape[2] % 2:
        products = np.pad(products, ((0, 0), (0, 0), (0, 1)))
    pairs = products[:, :, 0::2] + products[:, :, 1::2]
    held = np.clip(pairs, LOWEST, HIGHEST)
    return pairs.sum(axis=2, dtype=np.int64), held.sum(axis=2, dtype=np.int64), int(np.count_nonzero(held != pairs))


def _layers(model: ModelProto) -> list[_Layer]:
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    made = {name: node for node in model.graph.node for name in node.output}
    found = []
    for node in model.graph.node:
        pair = _operands(node, made)
        if pair is None or pair[1] not in stored or stored[pair[1]].data_type != 3:
            continue
        weight = numpy_helper.to_array(stored[pair[1]])
        if node.op_type == "Conv" and attribute(node, "group", 1) > 1 and weight.shape[1] == 1:
            continue
        zero = pair[2]
        value = int(numpy_helper.to_array(stored[zero]).reshape(-1)[0]) if zero in stored else 0
        found.append(_Layer(node, node.name.removesuffix("_quant"), pair[0], weight, value))
    return found


def _operands(node: NodeProto, made: dict[str, NodeProto]) -> tuple[str, str, str] | None:
    """(8-bit activation, stored weight, zero point of the activation) of a quantized Conv, Gemm or MatMul."""
    if node.op_type == "MatMulInteger":
        return node.input[0], node.input[1], ""  # the zero point is computed; sums are compared without it
    if node.op_type not in ("Conv", "Gemm", "MatMul"):
        return None
    first, second = made.get(node.input[0]), made.get(node.input[1])
    if first is None or second is None or {first.op_type, second.op_type} != {"DequantizeLinear"}:
        return None
    return first.input[0], second.input[0], first.input[2] if len(first.input) > 2 else ""


def _emulate(layer: _Layer, activation: Array) -> Saturation:
    zero = layer.zero
    if activation.dtype == np.int8:  # the runtime's kernel shifts signed activations to unsigned ones
        activation, zero = activation.astype(np.int16) + 128, zero + 128
    noise, hit, total = Noise(), 0, 0
    for rows, columns in _matrices(layer, activation, zero):
        step = max(1, CELLS // max(1, columns.size))
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            exact, held, saturated = pair_sums(part, columns)
            shift = zero * columns.sum(axis=1, dtype=np.int64)
            noise.add(np.ravel(exact - shift), np.ravel(held - shift))
            hit += saturated
            total += len(part) * columns.shape[0] * ((columns.shape[1] + 1) // 2)
    return Saturation(layer.name, hit / max(1, total), noise.sqnr_db)


def _matrices(layer: _Layer, activation: Array, zero: int) -> list[tuple[Array, Array]]:
    """(rows, K) and (outputs, K) of the layer's matrix product, one pair a group, in the kernel's order of K."""
    weight, node = layer.weight, layer.node
    if node.op_type != "Conv":
        transposed = node.op_type == "Gemm" and attribute(node, "transB", 0)
        return [(_some(activation.reshape(-1, activation.shape[-1])), weight if transposed else weight.T)]
    group = attribute(node, "group", 1)
    pictures = np.split(activation, group, axis=1)
    kernels = np.split(weight, group, axis=0)
    order = (0, *range(2, weight.ndim), 1)  # channels last: neighbours in memory are neighbouring channels
    rows = [_some(_unfold(part, weight.shape[2:], node, zero)) for part in pictures]
    return [(row, kernel.transpose(order).reshape(len(kernel), -1)) for row, kernel in zip(rows, kernels, strict=True)]


def _unfold(pictures: Array, kernel: tuple[int, ...], node: NodeProto, zero: int) -> Array:
    """(N, C, H, W) -> (N H' W', kh kw C), padded with the zero point."""
    settings = {item.name: list(item.ints) for item in node.attribute}
    rank = len(kernel)
    pads, strides = settings.get("pads", [0] * 2 * rank), settings.get("strides", [1] * rank)
    dilations = settings.get("dilations", [1] * rank)
    around = [(0, 0), (0, 0), *((pads[axis], pads[axis + rank]) for axis in range(rank))]
    padded = np.pad(pictures, around, constant_values=zero)
    windows = tuple((size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True))
    axes = tuple(range(2, 2 + rank))
    view = np.lib.stride_tricks.sliding_window_view(padded, windows, axis=axes)
    steps = (slice(None), slice(None), *(slice(None, None, step) for step in strides))
    view = view[(*steps, *(slice(None, None, step) for step in dilations))]
    positions, inner = tuple(range(2, 2 + rank)), tuple(range(2 + rank, 2 + 2 * rank))
    flat = view.transpose(0, *positions, *inner, 1)
    return flat.reshape(int(np.prod(flat.shape[: 1 + rank])), -1)


def _some(rows: Array) -> Array:
    """At most ``POSITIONS`` rows, evenly spread."""
    if len(rows) <= POSITIONS:
        return rows
    chosen: Array = rows[np.linspace(0, len(rows) - 1, POSITIONS).astype(int)]
    return chosen
