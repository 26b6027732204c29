"""Where few-bit weights lie in an ONNX file: 8-bit tensors for integer kernels, INT4 and INT2 tensors, MatMulNBits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from compressor.models.rounded import RoundedLayer
from compressor.profile import QuantizationRules
from compressor.qat import BITS
from compressor.types import Array

Kind = Literal["tensor", "nbits"]
NBITS = (2, 4, 8)  # what MatMulNBits takes
LARGEST_BLOCK, SMALLEST_BLOCK = 256, 16
NAMES = {
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "uint8",
    TensorProto.INT4: "int4",
    TensorProto.UINT4: "uint4",
    TensorProto.INT2: "int2",
    TensorProto.UINT2: "uint2",
}
FIRST_OPSET = {TensorProto.INT4: 21, TensorProto.UINT4: 21, TensorProto.INT2: 25, TensorProto.UINT2: 25}
BLOCKS = 21  # first opset whose DequantizeLinear has a scale a block
INTEGER = "multiplied by the runtime's 8-bit kernels: bytes and time are those of int8"
UNPACKED = "unpacked to float at every call: the file is smaller, nothing is faster"
FLOAT = "dequantized at every call, float arithmetic"


@dataclass(frozen=True)
class Container:
    """A tensor type with its bits, or the codes of a MatMulNBits; ``note`` says what size and speed get out of it."""

    kind: Kind
    bits: int
    type: int = TensorProto.UINT8
    note: str = ""

    @property
    def shown(self) -> str:
        return f"MatMulNBits, {self.bits} bits" if self.kind == "nbits" else NAMES[self.type]


def container_of(layer: RoundedLayer, operator: str, rules: QuantizationRules, *, packed: bool) -> Container:
    """The container of one layer's weight."""
    bits = BITS[layer.precision]
    if packed and layer.reads is None and operator in ("Gemm", "MatMul"):
        return Container("nbits", next(size for size in NBITS if size >= bits), note="float activations")
    # ONNX Runtime 1.31 fuses INT2 behind quantized activations into an integer kernel that does not take it, and then
    # refuses the file: two bits lie in INT4 there
    small = 2 if bits <= 2 and layer.reads is None else 4
    if packed and bits <= 4 and layer.steps == 1 and layer.per in ("channel", "tensor"):
        types = (TensorProto.INT2, TensorProto.INT4) if layer.zero is None else (TensorProto.UINT2, TensorProto.UINT4)
        return Container("tensor", small, types[0] if small == 2 else types[1], UNPACKED)
    kind = TensorProto.INT8 if rules.weight == "int8" else TensorProto.UINT8
    note = FLOAT if layer.reads is None else INTEGER if bits < 8 else ""
    return Container("tensor", 8, kind, note)


def lowest_opset(layer: RoundedLayer, container: Container) -> int:
    """The first opset with this container, and with scales a block where groups of inputs have their own."""
    if container.kind == "nbits":
        return 0
    return max(FIRST_OPSET.get(container.type, 0), BLOCKS if layer.per.isdigit() else 0)


def few_bits(layer: RoundedLayer, container: Container) -> tuple[Array, Array]:
    """Codes as the tensor type holds them, of the weight's shape, and their zero points."""
    codes = layer.codes.astype(np.int32)
    if container.bits == 8:  # the zero point of asymmetric codes is off already, and the rest fits into a signed byte
        shift = 128 if container.type == TensorProto.UINT8 else 0
        return codes + shift, np.array(shift)
    if layer.zero is None:
        return codes, np.array(0)
    zero = layer.zero.astype(np.int32)
    rows = codes.reshape(len(zero), -1) + zero[:, None]
    return rows.reshape(codes.shape), zero


def matmul_nbits(
    node: NodeProto, layer: RoundedLayer, container: Container
) -> tuple[list[NodeProto], list[TensorProto]]:
    """A linear layer as ONNX Runtime's MatMulNBits (docs/ContribOperators.md), and a bias behind it.

    Codes are (N, blocks, block * bits / 8) bytes, the first one in the lowest bits; scales (N, blocks) float32; zero
    points packed like the codes, or float32 where a shift is no whole number of codes. Arithmetic stays float32.
    """
    outputs, inputs = layer.value.shape
    block = int(layer.per) if layer.per.isdigit() else _block(inputs)
    blocks = -(-inputs // block)
    codes, zero, scale = _unsigned(layer, container.bits)
    padded = np.zeros((outputs, blocks * block), np.uint8)
    padded[:, :inputs] = codes
    name = f"{node.name}_weight"
    tensors = [
        numpy_helper.from_array(pack(padded.reshape(outputs, blocks, block), container.bits), f"{name}_codes"),
        numpy_helper.from_array(_spread(scale, outputs, blocks).astype(np.float32), f"{name}_scales"),
    ]
    points = _spread(zero, outputs, blocks)
    whole = points.astype(np.uint8) if np.all(points == np.round(points)) else None
    stored = points.astype(np.float32) if whole is None else pack(whole, container.bits)
    tensors.append(numpy_helper.from_array(stored, f"{name}_zeros"))
    bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
    output = f"{node.name}_product" if bias else node.output[0]
    made = helper.make_node(
        "MatMulNBits", [node.input[0], *(tensor.name for tensor in tensors)], [output], name=node.name,
        domain="com.microsoft", K=inputs, N=outputs, bits=container.bits, block_size=block,
    )  # fmt: skip
    nodes = [made]
    if bias:
        nodes.append(helper.make_node("Add", [output, bias], [node.output[0]], name=f"{node.name}_bias"))
    return nodes, tensors


def _unsigned(layer: RoundedLayer, bits: int) -> tuple[Array, Array, Array]:
    """Codes (N, K) from 0 on, zero points (R) and scales (R)."""
    codes, scale = layer.codes.astype(np.int32), layer.scale
    if layer.steps > 1:  # ternary with a shift: steps * T + m, a step is worth scale
        ternary = codes.reshape(len(scale), -1)
        shift = np.array([_shift(row, layer.steps) for row in ternary])
        made = (ternary - shift[:, None]) // layer.steps + 1
        return made.reshape(codes.shape).astype(np.uint8), 1.0 - shift / layer.steps, scale * np.float32(layer.steps)
    zero = np.full(len(scale), 2 ** (bits - 1)) if layer.zero is None else layer.zero.astype(np.int32)
    rows = codes.reshape(len(scale), -1) + zero[:, None]
    return rows.reshape(codes.shape).astype(np.uint8), zero.astype(np.float64), scale


def _shift(row: Array, steps: int) -> int:
    """m of codes ``steps * T + m`` with |m| < steps; a row of one value alone is taken as T = 0 if it can be."""
    distinct = np.unique(row)
    if len(distinct) == 3:
        return int(distinct[1])
    if len(distinct) == 2 and distinct[1] - distinct[0] == 2 * steps:
        return int(distinct[0] + steps)
    if len(distinct) == 2:
        return int(distinct[0]) if abs(int(distinct[0])) < steps else int(distinct[1])
    only = int(distinct[0])
    return only if abs(only) < steps else only - int(np.sign(only)) * steps


def _block(inputs: int) -> int:
    """Rows a scale speaks of: all, as far as the operator's largest block goes."""
    return min(LARGEST_BLOCK, max(SMALLEST_BLOCK, 1 << (inputs - 1).bit_length()))


def _spread(values: Array, outputs: int, blocks: int) -> Array:
    """(R) to (N, blocks): groups are blocks; a scale of an output, or of the tensor, is that of all its blocks."""
    if len(values) == outputs * blocks:
        return values.reshape(outputs, blocks)
    made: Array = np.broadcast_to(np.reshape(values, (-1, 1)), (outputs, blocks))
    return made


def integers(name: str, kind: int, values: Array) -> TensorProto:
    """A tensor of 8, 16, 4 or 2 bits with its bytes packed (ONNX: the first element in the lowest bits)."""
    if kind not in FIRST_OPSET:
        dtype = helper.tensor_dtype_to_np_dtype(kind)
        return numpy_helper.from_array(np.ascontiguousarray(values).astype(dtype), name)
    bits = 2 if kind in (TensorProto.INT2, TensorProto.UINT2) else 4
    content = pack((values.flatten() & (2**bits - 1)).astype(np.uint8), bits).tobytes()
    return helper.make_tensor(name, kind, values.shape, content, raw=True)


def pack(values: Array, bits: int) -> Array:
    """``values`` (uint8, below 2^bits) along the last axis, several a byte, the first in the lowest bits.

    >>> pack(np.array([[1, 2, 3, 0, 1]], np.uint8), 2).tolist(), pack(np.array([[1, 2, 3]], np.uint8), 4).tolist()
    ([[57, 1]], [[33, 3]])
    """
    share = 8 // bits
    missing = -values.shape[-1] % share
    filled = np.concatenate([values, np.zeros((*values.shape[:-1], missing), np.uint8)], axis=-1)
    parts = filled.reshape(*filled.shape[:-1], -1, share).astype(np.uint16) << (
        bits * np.arange(share, dtype=np.uint16)
    )
    made: Array = parts.sum(-1).astype(np.uint8)
    return made
