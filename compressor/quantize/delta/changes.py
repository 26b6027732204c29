"""What differs between two models of one topology, tensor by tensor, and what of it may be approximated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from onnx import GraphProto, ModelProto, TensorProto, numpy_helper

from compressor.delta_file import DeltaError, Place, find_tensors, rows_and_columns
from compressor.errors import ConfigError
from compressor.models.onnx_graph import all_graphs, all_tensors, read_model
from compressor.types import Array

SMALLEST = 1024  # elements; a smaller tensor is stored bit for bit: it costs next to nothing
SAME_HINT = "A delta needs one topology: export both models in the same way, and do not prune or quantize only one."
FILE_HINT = "Give a .onnx or .safetensors file, a checkpoint folder, or the folder of a package."


@dataclass(frozen=True)
class Change:
    """One tensor that differs. ``unit``: what a squared error of one of its elements costs, the squared scale of whole
    numbers, 1 for floats. (Tables that are looked up count like layers: with less weight, as rows are read one at a
    time, they got too few bytes on a fine-tuned MiniLM, and its answers were up to 27 times farther off.)"""

    name: str
    base: Array
    new: Array
    lossy: bool
    unit: float = 1.0

    @cached_property
    def delta(self) -> Array:
        """float32 (rows, columns): the first axis against all others."""
        difference = self.new.astype(np.float64) - self.base.astype(np.float64)
        return difference.astype(np.float32).reshape(rows_and_columns(self.base.shape))

    @cached_property
    def energy(self) -> float:
        """Sum of the squares of the delta."""
        return float(np.einsum("ij,ij->", self.delta, self.delta, dtype=np.float64))


@dataclass(frozen=True)
class Pair:
    """Both files, and what differs."""

    base: bytes
    new: bytes
    changes: tuple[Change, ...]
    unchanged: int


def tensors_file(path: Path) -> Path:
    """The file that holds the weights: ``path`` itself, a checkpoint's model.safetensors, a package's portable ONNX."""
    if path.is_file():
        return path
    if (path / "manifest.json").is_file():
        import json

        try:
            portable = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["model"]["portable"]
            found = path / str(portable)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError.single(
                f"`{path}`", "manifest.json", f"cannot be read: {error}", hint=FILE_HINT
            ) from error
    else:
        found = path / "model.safetensors"
    if not found.is_file():
        what = "does not exist" if not path.exists() else f"holds no {found.name}"
        raise ConfigError.single(f"`{path}`", "file", what, hint=FILE_HINT)
    return found


def compare(base: Path, new: Path) -> Pair:
    """Read both; :class:`ConfigError` names the first node or tensor in which their topologies differ."""
    if {base.suffix, new.suffix} == {".onnx", ".safetensors"}:
        what = f"is of another kind than `{base.name}`: one is a graph, the other a checkpoint"
        raise ConfigError.single(f"`{new}`", "file", what, hint=SAME_HINT)
    scales = _same_graphs(base, new) if base.suffix == ".onnx" else {}
    old, fresh = base.read_bytes(), new.read_bytes()
    places, others = _places(base, old), _places(new, fresh)
    _same_tensors(places, others, new)
    changes = []
    for name, place in places.items():
        other = others[name]
        if old[place.offset : place.offset + place.length] != fresh[other.offset : other.offset + other.length]:
            before, after = place.read(old), other.read(fresh)
            lossy = _lossy(name, before, scales) and bool(np.isfinite(before).all() and np.isfinite(after).all())
            changes.append(Change(name, before, after, lossy, scales.get(name, 1.0)))
    return Pair(old, fresh, tuple(changes), len(places) - len(changes))


def _places(path: Path, content: bytes) -> dict[str, Place]:
    try:
        return find_tensors(content)
    except DeltaError as error:
        raise ConfigError.single(f"`{path}`", "weights", str(error), hint=FILE_HINT) from error


def _same_tensors(places: Mapping[str, Place], others: Mapping[str, Place], new: Path) -> None:
    lone = sorted(places.keys() ^ others.keys())
    if lone:
        where = "only in the base" if lone[0] in places else "not in the base"
        raise ConfigError.single(f"`{new}`", f"tensor `{lone[0]}`", f"is {where}", hint=SAME_HINT)
    for name, place in places.items():
        other = others[name]
        if (place.length, place.dtype, place.shape) != (other.length, other.dtype, other.shape):
            what = f"is {_kind(other)}, in the base {_kind(place)}"
            raise ConfigError.single(f"`{new}`", f"tensor `{name}`", what, hint=SAME_HINT)


def _kind(place: Place) -> str:
    return f"{place.dtype or f'{place.length} bytes'} {'x'.join(map(str, place.shape)) or 'scalar'}"


def _lossy(name: str, tensor: Array, scales: Mapping[str, float]) -> bool:
    """May the tensor be approximated? Short ones and whole numbers that are no int8 weights (shapes, zero points) stay
    exact."""
    if tensor.ndim < 2 or tensor.size < SMALLEST:
        return False
    return tensor.dtype.kind == "f" or name in scales


def _same_graphs(base: Path, new: Path) -> dict[str, float]:
    """Hold both graphs against each other without their numbers; squared scales of the int8 weights."""
    first, second = read_model(base), read_model(new)
    scales = _scales(first)
    for model in (first, second):
        for tensor in all_tensors(model.graph):
            tensor.CopyFrom(TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type))
    for (_, one), (_, other) in zip(all_graphs(first.graph), all_graphs(second.graph), strict=False):
        _same_nodes(one, other, new)
    if sorted(map(str, first.opset_import)) != sorted(map(str, second.opset_import)):
        raise ConfigError.single(f"`{new}`", "opset", "differs from that of the base", hint=SAME_HINT)
    return scales


def _same_nodes(one: GraphProto, other: GraphProto, new: Path) -> None:
    for place, (node, fresh) in enumerate(zip(one.node, other.node, strict=False)):
        if node.SerializeToString(deterministic=True) != fresh.SerializeToString(deterministic=True):
            what = f"{fresh.op_type}({', '.join(fresh.input)}) stands where the base has "
            what += f"{node.op_type} `{node.name}` ({', '.join(node.input)})"
            raise ConfigError.single(f"`{new}`", f"node {place} `{fresh.name}`", what, hint=SAME_HINT)
    if len(one.node) != len(other.node):
        what = f"{len(other.node)} nodes, in the base {len(one.node)}"
        raise ConfigError.single(f"`{new}`", "graph", what, hint=SAME_HINT)
    for part in ("input", "output"):
        if [value.name for value in getattr(one, part)] != [value.name for value in getattr(other, part)]:
            raise ConfigError.single(f"`{new}`", part, "differs from that of the base", hint=SAME_HINT)


def _scales(model: ModelProto) -> dict[str, float]:
    """Mean squared scale of every 8-bit constant that is read through DequantizeLinear."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or not {node.input[0], node.input[1]} <= stored.keys():
            continue
        if stored[node.input[0]].data_type in (TensorProto.INT8, TensorProto.UINT8):
            scale = numpy_helper.to_array(stored[node.input[1]]).astype(np.float64)
            found[node.input[0]] = float(np.mean(scale**2))
    return found
