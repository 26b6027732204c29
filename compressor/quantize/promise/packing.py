"""8-bit weights stored in 4 bits, and unpacked to the very 8-bit tensor when the file is loaded.

The codes of an int8 file are coded once more: groups of ``BLOCK`` neighbouring inputs share a small integer factor,
and ``8-bit code = 4-bit code * factor``. Two levels of scales, the inner ones integers, come from Lin et al., "QServe:
W4A8KV4 Quantization and System Co-design for Efficient LLM Serving", 2024 (progressive group quantization); that a
factor may be negative, so that the grid's longer side (-8) is where a group's largest value lies, from llama.cpp's
Q4_0. In the file this is an INT4 tensor behind Cast, Mul, Cast and Reshape. Runtimes fold operators on constants while
they load a file: from then on the tensor is an ordinary 8-bit weight, read by the same integer kernels, and nothing is
unpacked per call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from compressor.errors import StageError
from compressor.quantize.containers import integers
from compressor.quantize.weights.grid import Codes
from compressor.quantize.weights.methods import gptq, inverse_factor, output_error
from compressor.types import Array

BLOCK = 32  # neighbours that share a factor, at most: one byte of factor for 16 of codes
SHORTEST = 8  # a divisor smaller than this would cost too many factors
SHARES = np.linspace(0.6, 1.15, 9)  # of the peak that the grid's end stands for: clipping may lose less
MOST_INPUTS = 4096  # of a layer whose errors are spread: a Cholesky factor of this size takes seconds
OPSET = 21  # the first with INT4
IR = 10
LOWEST, HIGHEST = -8, 7
CHUNK = 1 << 16  # values looked at together


@dataclass(frozen=True)
class Packed:
    """An 8-bit tensor as ``codes * factor + zero``.

    ``codes`` (outputs, groups, block) and ``factor`` (outputs, groups, 1); where the weight has its inputs first,
    (groups, block, outputs) and (groups, 1, outputs). ``shape`` and ``kind`` are those of the 8-bit tensor.
    """

    codes: Array
    factor: Array
    zero: int
    shape: tuple[int, ...]
    kind: np.dtype[np.generic]

    @property
    def values(self) -> Array:
        """The 8-bit tensor that a runtime has after loading."""
        whole = self.codes.astype(np.int32) * self.factor.astype(np.int32) + self.zero
        return whole.astype(self.kind).reshape(self.shape)


def block_of(inputs: int) -> int:
    """The largest divisor up to ``BLOCK``; all inputs where there is none from ``SHORTEST`` on.

    >>> block_of(384), block_of(72), block_of(97)
    (32, 24, 97)
    """
    found = max(size for size in range(1, min(BLOCK, inputs) + 1) if inputs % size == 0)
    return found if found >= SHORTEST else inputs


def pack(tensor: Array, zero: int, *, inputs_first: bool = False, gram: Array | None = None) -> Packed:
    """The 4-bit form of an 8-bit tensor with this zero point.

    ``inputs_first``: the tensor is (inputs, outputs), otherwise its first axis counts outputs. With ``gram``, X'X of
    the layer's inputs (inputs, inputs), each code's error is spread over those that follow (GPTQ), if that loses less
    of the layer's output than the nearest codes do. No value leaves the range that the tensor had.
    """
    whole = tensor.astype(np.float32) - zero
    outputs = whole.shape[1] if inputs_first else len(whole)
    inputs = whole.size // max(1, outputs)
    block = block_of(inputs)
    rows = (whole.T if inputs_first else whole).reshape(outputs, inputs // block, block)
    factor = _factors(rows)
    codes = _nearest(rows, factor)
    if gram is not None and len(gram) == inputs <= MOST_INPUTS:
        codes = _spread(rows.reshape(outputs, inputs), codes, factor, gram)
    codes = _inside(codes, factor, float(whole.min()), float(whole.max()))
    if inputs_first:
        codes, factor = codes.transpose(1, 2, 0), factor.transpose(1, 2, 0)
    small = np.ascontiguousarray(codes, np.int8), np.ascontiguousarray(factor, np.int8)
    return Packed(*small, zero, tensor.shape, tensor.dtype)


def _factors(rows: Array) -> Array:
    """The integer factor (N, G, 1) of each group whose nearest codes lose least."""
    step = max(1, CHUNK // max(1, rows[0].size))  # what the processor's cache holds: several times as fast
    return np.concatenate([_best_factors(rows[start : start + step]) for start in range(0, len(rows), step)])


def _best_factors(rows: Array) -> Array:
    peak = np.abs(rows).max(axis=2, keepdims=True)
    best = np.ones_like(peak)
    least = np.full(peak.shape, np.inf, np.float32)
    for share in SHARES:
        size = np.maximum(1, np.round(peak * share / -LOWEST))
        for factor in (size, -size):
            lost = np.square(_nearest(rows, factor) * factor - rows).sum(axis=2, keepdims=True)
            best, least = np.where(lost < least, factor, best), np.minimum(lost, least)
    return np.asarray(best, np.float32)


def _nearest(rows: Array, factor: Array) -> Array:
    return np.asarray(np.clip(np.round(rows / factor), LOWEST, HIGHEST))


def _spread(flat: Array, nearest: Array, factor: Array, gram: Array) -> Array:
    """GPTQ's codes on these factors where they lose less of the output than the nearest ones."""
    scale = factor[..., 0]
    zero = np.full(scale.shape, -LOWEST, np.uint8)
    try:
        upper, order = inverse_factor(gram)
    except StageError:  # no factor in float64: the nearest codes stay
        return nearest
    made = gptq(flat.T, upper, order, 4, nearest.shape[2], grid=(scale, zero))
    plain = Codes((nearest - LOWEST).astype(np.uint8), scale, zero)
    better = output_error(flat.T, made, gram) < output_error(flat.T, plain, gram)
    return made.codes.astype(np.float32) + LOWEST if better else nearest


def _inside(codes: Array, factor: Array, low: float, high: float) -> Array:
    """Codes that would leave the tensor's own range take the step before it."""
    value = codes * factor
    return np.asarray(codes - np.sign(codes) * ((value < low) | (value > high)))


def written(packed: Packed, name: str, prefix: str) -> GraphProto:
    """Nodes and tensors that give ``name``; whatever they make on the way begins with ``prefix``."""
    codes, factor, shape, zero = f"{prefix}c", f"{prefix}f", f"{prefix}s", f"{prefix}z"
    kind = helper.np_dtype_to_tensor_dtype(packed.kind)
    tensors = [
        integers(codes, TensorProto.INT4, packed.codes.astype(np.int32)),
        numpy_helper.from_array(packed.factor, factor),
        numpy_helper.from_array(np.array(packed.shape, np.int64), shape),
    ]
    nodes = [
        helper.make_node("Cast", [codes], [f"{prefix}0"], to=TensorProto.INT32),
        helper.make_node("Cast", [factor], [f"{prefix}1"], to=TensorProto.INT32),
        helper.make_node("Mul", [f"{prefix}0", f"{prefix}1"], [f"{prefix}2"]),
    ]
    last = f"{prefix}2"
    if packed.zero:
        tensors.append(numpy_helper.from_array(np.array(packed.zero, np.int32), zero))
        nodes.append(helper.make_node("Add", [last, zero], [f"{prefix}3"]))
        last = f"{prefix}3"
    nodes += [
        helper.make_node("Cast", [last], [f"{prefix}4"], to=kind),
        helper.make_node("Reshape", [f"{prefix}4", shape], [name]),
    ]
    return GraphProto(node=_named(nodes), initializer=tensors)


def halved(tensor: TensorProto, prefix: str) -> GraphProto:
    """A float32 tensor as float16 in the file, cast back under its own name when the file is loaded."""
    half = numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), f"{prefix}h")
    nodes = [helper.make_node("Cast", [half.name], [tensor.name], to=TensorProto.FLOAT)]
    return GraphProto(node=_named(nodes), initializer=[half])


def _named(nodes: Sequence[NodeProto]) -> Sequence[NodeProto]:
    """Each node by what it makes."""
    for node in nodes:
        node.name = f"{node.output[0]}_unpack"
    return nodes


def size_of(part: GraphProto) -> int:
    """Bytes that these nodes and tensors take in a file."""
    return int(part.ByteSize())
