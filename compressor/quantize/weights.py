"""Weight-only quantization of MatMul: int8 or int4 in groups along the input, layer by layer, as ``MatMulNBits``.

A group of ``block`` neighbouring input rows of one output column shares a scale and a zero point (round to nearest).
Activations stay float. The format is ONNX Runtime's contrib operator MatMulNBits (docs/ContribOperators.md): codes are
(N, K / block, block * bits / 8) bytes, low nibble first; scales (N, K / block); zero points packed like the codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from compressor.errors import StageError
from compressor.models.onnx_graph import name_nodes
from compressor.types import Array, LayerFact, write_atomic

Bits = Literal[4, 8]
DOMAIN = "com.microsoft"
SMALLEST = 16  # block sizes are powers of two from here on (the operator's own rule)
STAGE = "quantize"


def quantize_weights(
    source: Path, out: Path, *, bits: Bits = 4, block: int = 32, skip: Mapping[str, str] | None = None
) -> tuple[LayerFact, ...]:
    """Write ``out`` (and ``out``.data beside it) with every MatMul of a constant 2-D float32 weight in few bits.

    ``source`` is read tensor by tensor: no more than one layer's weight is in memory beside the graph without weights,
    however big the model is, when its weights lie in an external file. ``skip`` maps nodes that stay float to reasons.
    Returns a fact per MatMul. Raises :class:`StageError` for a block size that the operator does not know.
    """
    if block < SMALLEST or block & (block - 1):
        raise StageError(f"a block of {block} rows is impossible", hint="Take 16, 32, 64, 128 or 256.")
    model = onnx.load(source, load_external_data=False)
    name_nodes(model)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    users = _users(model)
    data = out.with_name(out.name + ".data")
    facts: list[LayerFact] = []
    fresh: dict[str, list[TensorProto]] = {}
    with data.open("wb") as stream:
        for node in model.graph.node:
            if node.op_type != "MatMul":
                continue
            reason = (skip or {}).get(node.name) or _why_not(node, stored, users)
            if reason:
                facts.append(LayerFact(STAGE, node.name, "left-float", "float32", "float32", reason))
                continue
            name = node.input[1]
            weight = _read(stored[name], source.parent)
            fresh[name] = [_store(stream, item, out) for item in _packed(name, weight, bits, block)]
            _rewrite(node, weight.shape, fresh[name], bits, block)
            facts.append(LayerFact(STAGE, node.name, "quantized", "float32", f"int{bits}", f"groups of {block} rows"))
        kept = [tensor for tensor in model.graph.initializer if tensor.name not in fresh]
        moved = [_move(stream, tensor, source.parent, out) for tensor in kept]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*moved, *(item for items in fresh.values() for item in items)])
    if fresh and not any(entry.domain == DOMAIN for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    write_atomic(out, model.SerializeToString(deterministic=True))
    return tuple(facts)


def round_to_nearest(weight: Array, bits: Bits, block: int) -> tuple[Array, Array, Array]:
    """Codes (N, G, block), scales (N, G) and zero points (N, G) of a (K, N) weight; K is filled up with zeros.

    A group spans from its smallest to its largest value, zero included; ``weight = (code - zero) * scale`` within half
    a scale.
    """
    inputs, outputs = weight.shape
    groups = -(-inputs // block)
    rows = np.zeros((outputs, groups * block), np.float32)
    rows[:, :inputs] = weight.T
    rows = rows.reshape(outputs, groups, block)
    low, high = np.minimum(rows.min(axis=2), 0), np.maximum(rows.max(axis=2), 0)
    top = 2**bits - 1
    scale = np.where(high > low, (high - low) / top, 1.0).astype(np.float32)
    zero = np.clip(np.round(-low / scale), 0, top).astype(np.uint8)
    codes = np.clip(np.round(rows / scale[..., None]) + zero[..., None], 0, top).astype(np.uint8)
    return codes, scale, zero


def dequantized(codes: Array, scale: Array, zero: Array, inputs: int) -> Array:
    """The (K, N) float weight that the codes stand for."""
    rows = (codes.astype(np.float32) - zero[..., None]) * scale[..., None]
    made: Array = rows.reshape(len(rows), -1)[:, :inputs].T
    return made


def packed(values: Array, bits: Bits) -> Array:
    """Bytes along the last axis; two 4-bit values a byte, the first one in the low half (an odd last one alone)."""
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros((*values.shape[:-1], 1), values.dtype)], axis=-1)
    return np.asarray(values[..., 0::2] | (values[..., 1::2] << 4), np.uint8)


def _users(model: ModelProto) -> dict[str, list[NodeProto]]:
    found: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            found.setdefault(name, []).append(node)
    return found


def _why_not(node: NodeProto, stored: Mapping[str, TensorProto], users: Mapping[str, list[NodeProto]]) -> str:
    tensor = stored.get(node.input[1])
    if tensor is None:
        return "both operands are computed, or the weight is the left one"
    if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) != 2:
        return "its weight is not a float32 matrix"
    return "its weight has other readers" if len(users[node.input[1]]) > 1 else ""


def _read(tensor: TensorProto, folder: Path) -> Array:
    """One weight, from the file's own bytes or from its external file; nothing is kept in the model."""
    if tensor.data_location != TensorProto.EXTERNAL:
        made: Array = numpy_helper.to_array(tensor)
        return made
    file, offset, length = _place(tensor, folder)
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    with file.open("rb") as stream:
        stream.seek(offset)
        content = stream.read(length) if length else stream.read()
    return np.frombuffer(content, dtype).reshape(tuple(tensor.dims))


def _place(tensor: TensorProto, folder: Path) -> tuple[Path, int, int]:
    """File, offset and length of external data; a location outside the model's folder is refused."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    root = folder.resolve()
    file = (root / entries["location"]).resolve()
    if Path(entries["location"]).is_absolute() or not file.is_relative_to(root):
        hint = "Move the data beside the model."
        raise StageError(f"the data of `{tensor.name}` lies outside the model's folder", hint=hint)
    return file, int(entries.get("offset", 0)), int(entries.get("length", 0))


def _packed(name: str, weight: Array, bits: Bits, block: int) -> Iterator[tuple[str, Array]]:
    codes, scale, zero = round_to_nearest(weight, bits, block)
    yield f"{name}_codes", packed(codes, bits)
    yield f"{name}_scales", scale
    yield f"{name}_zeros", packed(zero, bits)


def _rewrite(node: NodeProto, shape: tuple[int, ...], tensors: list[TensorProto], bits: int, block: int) -> None:
    inputs = [node.input[0], *(tensor.name for tensor in tensors)]
    made = helper.make_node(
        "MatMulNBits", inputs, list(node.output), name=node.name, domain=DOMAIN,
        K=shape[0], N=shape[1], bits=bits, block_size=block,
    )  # fmt: skip
    node.CopyFrom(made)


def _store(stream: BinaryIO, item: tuple[str, Array], out: Path) -> TensorProto:
    name, array = item
    tensor = TensorProto(name=name, dims=array.shape, data_type=helper.np_dtype_to_tensor_dtype(array.dtype))
    return _external(stream, tensor, np.ascontiguousarray(array).tobytes(), out)


def _move(stream: BinaryIO, tensor: TensorProto, folder: Path, out: Path) -> TensorProto:
    """A tensor that stays as it is: copied to the new data file when it was in the old one."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return tensor
    made = TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
    return _external(stream, made, _read(tensor, folder).tobytes(), out)


def _external(stream: BinaryIO, tensor: TensorProto, content: bytes, out: Path) -> TensorProto:
    start = stream.tell()
    stream.write(content)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", f"{out.name}.data"), ("offset", str(start)), ("length", str(len(content)))):
        tensor.external_data.add(key=key, value=value)
    return tensor
