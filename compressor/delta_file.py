#!/usr/bin/env python3
"""Apply a delta: an update of a model's weights, beside the very file that it was made against. Needs numpy alone.

    python delta.py BASE DELTA OUT

A delta is a .zip of `delta.json` (what was done to which tensor), `data.bin` (the numbers: a zlib stream for each
tensor, in their order) and perhaps `answers.npz` (stored outputs for a package's self-check). BASE is an .onnx or a
.safetensors file whose weights lie in the file itself. OUT is BASE with other bytes in the places of those tensors.

Every sum is made element by element in float64 and in a fixed order, never by a BLAS, so that each machine makes the
same bytes; their SHA-256 stands in the delta.
"""

# This file is copied verbatim into every package as delta.py and must run alone.
# ruff: noqa: T201

from __future__ import annotations

import hashlib
import io
import json
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = "np.ndarray[Any, Any]"
VERSION = "1.0"
HEADER, DATA, ANSWERS = "delta.json", "data.bin", "answers.npz"
MAX_BYTES = 8 << 30  # of an unpacked delta: a zip bomb is larger
BLOCK = 1 << 18  # elements of a sum that are in the processor's cache at a time
SKIP = 255  # a gap between two kept entries that is not over yet
ONNX_TYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 10: "float16",
    11: "float64", 12: "uint32", 13: "uint64",
}  # fmt: skip
SAFETENSORS_TYPES = {
    "F32": "float32", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "I32": "int32", "I64": "int64",
    "BOOL": "bool", "F16": "float16", "F64": "float64", "U32": "uint32", "U64": "uint64",
}  # fmt: skip


class DeltaError(Exception):
    """The delta, the base, or their match is wrong; the user can mend it. Printed without a traceback."""


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie in its file. ``dtype`` is a numpy name; empty: bytes whose meaning is not known here
    (bfloat16, float8, packed four bits, numbers that the file keeps as varints)."""

    offset: int
    length: int
    dtype: str
    shape: tuple[int, ...]

    def read(self, content: bytes | bytearray) -> Array:
        """The tensor, or its bytes as uint8."""
        if not self.dtype:
            return np.frombuffer(content, np.uint8, self.length, self.offset)
        count = int(np.prod(self.shape, dtype=np.int64))
        return np.frombuffer(content, np.dtype(self.dtype).newbyteorder("<"), count, self.offset).reshape(self.shape)


@dataclass(frozen=True)
class Delta:
    """What a delta file holds."""

    header: dict[str, Any]
    data: bytes
    answers: list[dict[str, Array]] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------------- places of tensors


def find_tensors(content: bytes) -> dict[str, Place]:
    """Every tensor of an .onnx or .safetensors file by name; a constant of a node goes by the name of its output."""
    try:
        lists_tensors = content[8:9] == b"{" and int.from_bytes(content[:8], "little") < len(content)
        return _safetensors(content) if lists_tensors else dict(_onnx_model(content))
    except (IndexError, ValueError, KeyError, TypeError, struct.error) as error:
        raise DeltaError(f"this is not a complete .onnx or .safetensors file ({error})") from error


def _safetensors(content: bytes) -> dict[str, Place]:
    (size,) = struct.unpack("<Q", content[:8])
    start, found = 8 + size, {}
    for name, entry in json.loads(content[8:start]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            if not 0 <= first <= last <= len(content) - start:
                raise ValueError(f"`{name}` ends behind the file")
            found[name] = _place(start + first, last - first, SAFETENSORS_TYPES.get(entry["dtype"], ""), entry["shape"])
    return found


def _place(offset: int, length: int, dtype: str, shape: Sequence[int]) -> Place:
    whole = dtype and int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize == length
    return Place(offset, length, dtype if whole else "", tuple(shape))


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = content[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("a number has more than 64 bits")


def _fields(content: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Protobuf wire format: field number, and (start, end) of its bytes or (value, -1) of a varint."""
    while at < end:
        key, at = _varint(content, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(content, at)
            yield key >> 3, value, -1
            continue
        if wire == 2:
            size, at = _varint(content, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"unknown wire type {wire}")
        if at + size > end:
            raise ValueError("it is cut short")
        yield key >> 3, at, at + size
        at += size


def _onnx_model(content: bytes) -> Iterator[tuple[str, Place]]:
    for number, start, end in _fields(content, 0, len(content)):
        if number == 7:  # ModelProto.graph; numbers are those of onnx.proto
            yield from _onnx_graph(content, start, end, "")


def _onnx_graph(content: bytes, start: int, end: int, inside: str) -> Iterator[tuple[str, Place]]:
    for number, a, b in _fields(content, start, end):
        if number == 5:  # initializer
            yield _onnx_tensor(content, a, b, inside, "")
        elif number == 1:
            yield from _onnx_node(content, a, b, inside)


def _onnx_node(content: bytes, start: int, end: int, inside: str) -> Iterator[tuple[str, Place]]:
    """Tensors of attributes (Constant) and of nested graphs (If, Loop), under the name of the node's first output."""
    parts = list(_fields(content, start, end))
    output = next((content[a:b].decode() for number, a, b in parts if number == 2), "")
    for number, a, b in parts:
        if number == 5:  # attribute
            for kind, first, last in _fields(content, a, b):
                if kind == 5:
                    yield _onnx_tensor(content, first, last, inside, output)
                elif kind in (6, 11):
                    yield from _onnx_graph(content, first, last, f"{inside}{output}/")


def _onnx_tensor(content: bytes, start: int, end: int, inside: str, name: str) -> tuple[str, Place]:
    kind, dims, spans = 0, [], []
    for number, a, b in _fields(content, start, end):
        if number == 1:
            dims += [a] if b < 0 else _varints(content, a, b)
        elif number == 2:
            kind = a
        elif number == 8 and not name:
            name = content[a:b].decode()
        elif number in (4, 9, 10) and b >= 0:  # float_data, raw_data, double_data
            spans.append((a, b))
        elif number == 14 and a == 1:
            raise DeltaError(f"the weights of `{name}` lie in a file beside the model; save it as one file first")
    if len(spans) != 1:  # varints: only the whole entry has a place
        return inside + name, Place(start, end - start, "", tuple(dims))
    (first, last), dtype = spans[0], ONNX_TYPES.get(kind, "")
    return inside + name, _place(first, last - first, dtype, dims)


def _varints(content: bytes, at: int, end: int) -> list[int]:
    found = []
    while at < end:
        value, at = _varint(content, at)
        found.append(value)
    return found


# ---------------------------------------------------------------------------------------------------- numbers


class Reader:
    """Arrays of one tensor's numbers, one after the other."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int, dtype: str) -> Array:
        size = count * np.dtype(dtype).itemsize
        if count < 0 or self.at + size > len(self.data):
            raise DeltaError("the delta is damaged: there are fewer numbers in it than it says")
        found = np.frombuffer(self.data, np.dtype(dtype).newbyteorder("<"), count, self.at)
        self.at += size
        return found

    def vectors(self, rank: int, length: int, bits: int) -> Array:
        """float64 (rank, length): whole numbers; or the float32 vectors themselves with 32 bits."""
        count = rank * length
        if bits == 2:  # -1, 0 or 1: two of them a byte, because zlib spends a whole bit or more on each byte
            pairs = np.divmod(self.take(-(-count // 2), "uint8").astype(np.int64), 3)
            found = np.stack(pairs, axis=1).reshape(-1)[:count] - 1
        else:
            found = self.take(count, "float32" if bits == 32 else "int8")
        return found.reshape(rank, length).astype(np.float64)


def rows_and_columns(shape: Sequence[int]) -> tuple[int, int]:
    """A tensor as a matrix: its first axis against all others."""
    return shape[0], int(np.prod(shape[1:], dtype=np.int64))


def updated(entry: Mapping[str, Any], reader: Reader, base: Array) -> Array:
    """The new tensor, of the base's type and shape."""
    kind = entry.get("kind")
    if kind == "exact":
        return _exact(reader, base)
    if kind == "sparse":
        return _sparse(entry, reader, base)
    if kind == "low-rank":
        return _low_rank(entry, reader, base)
    raise DeltaError(
        f"`{entry.get('name')}` is stored as `{kind}`, which this delta.py does not know; take a newer one"
    )


def _exact(reader: Reader, base: Array) -> Array:
    """Bits that differ, byte planes apart (signs and exponents, which hardly differ, then pack well)."""
    width = base.dtype.itemsize
    planes = reader.take(base.nbytes, "uint8").reshape(width, -1)
    old = np.frombuffer(base.tobytes(), np.uint8).reshape(-1, width)
    return np.frombuffer((old ^ planes.T).tobytes(), base.dtype).reshape(base.shape)


def _sparse(entry: Mapping[str, Any], reader: Reader, base: Array) -> Array:
    """Kept entries: a scale, the gaps between them, a whole number for each."""
    count, steps = int(entry["count"]), int(entry["gaps"])
    scale = reader.take(1, "float32").astype(np.float64)
    gaps = reader.take(steps, "uint8").astype(np.int64)
    codes = reader.take(count, "int8").astype(np.float64)
    places = np.cumsum(gaps)[gaps != SKIP] + np.arange(count if np.count_nonzero(gaps != SKIP) == count else 0)
    if len(places) != count or (count and places[-1] >= base.size):
        raise DeltaError(f"`{entry['name']}`: its entries do not fit its {base.size} places")
    flat = base.astype(np.float64).reshape(-1)
    flat[places] += codes * scale
    return rounded(flat, base.dtype).reshape(base.shape)


def _low_rank(entry: Mapping[str, Any], reader: Reader, base: Array) -> Array:
    """``base + sum of scale * left (x) right``; left is as long as the matrix has rows, right as it has columns."""
    rows, columns = rows_and_columns(base.shape)
    lefts, rights = [], []
    for bits, rank in entry["parts"]:
        scales = reader.take(int(rank), "float32").astype(np.float64)
        lefts.append(reader.vectors(int(rank), rows, bits) * scales[:, None])
        rights.append(reader.vectors(int(rank), columns, bits))
    left, right = np.concatenate(lefts), np.concatenate(rights)
    matrix, step = base.reshape(rows, columns), max(1, BLOCK // columns)
    made = np.empty((rows, columns), base.dtype)
    for at in range(0, rows, step):
        total = np.zeros((min(step, rows - at), columns))
        product = np.empty_like(total)
        for one, other in zip(left, right, strict=True):
            np.multiply(one[at : at + step, None], other, out=product)
            np.add(total, product, out=total)
        np.add(total, matrix[at : at + step], out=total)
        made[at : at + step] = rounded(total, base.dtype)
    return made.reshape(base.shape)


def rounded(values: Array, dtype: np.dtype[Any]) -> Array:
    """To the tensor's type; whole numbers are rounded to even and kept inside their range."""
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        values = np.clip(np.rint(values), limits.min, limits.max)
    return values.astype(dtype)


# ---------------------------------------------------------------------------------------------------- the delta


def read_delta(path: Path) -> Delta:
    """A delta file; :class:`DeltaError` when it is none, is damaged or is of a later major version."""
    try:
        with zipfile.ZipFile(path) as stream:
            sizes = {entry.filename: entry.file_size for entry in stream.infolist()}
            if not {HEADER, DATA} <= set(sizes) or sum(sizes.values()) > MAX_BYTES:
                raise DeltaError(f"{path}: is not a delta (no {HEADER} or {DATA} in it, or too large)")
            header = json.loads(stream.read(HEADER))
            answers = _answers(stream.read(ANSWERS)) if ANSWERS in sizes else []
            made = Delta(header, stream.read(DATA), answers)
    except FileNotFoundError:
        raise DeltaError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile) as error:
        raise DeltaError(f"{path}: is not a delta or is damaged ({error})") from error
    version = str(header.get("delta_version")) if isinstance(header, dict) else "?"
    if version.split(".")[0] != VERSION.split(".")[0]:
        raise DeltaError(f"{path}: version {version} is not readable by this delta.py ({VERSION})")
    if not {"base", "result", "tensors"} <= set(header):
        raise DeltaError(f"{path}: {HEADER} lacks `base`, `result` or `tensors`")
    return made


def _answers(content: bytes) -> list[dict[str, Array]]:
    found: dict[int, dict[str, Array]] = {}
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        for key in stored.files:
            index, _, name = key.partition(".")
            found.setdefault(int(index), {})[name] = stored[key]
    return [found[index] for index in sorted(found)]


def patched(base: bytes, entries: Sequence[Mapping[str, Any]], data: bytes) -> bytes:
    """The base with new bytes in the places of the tensors; nothing is verified yet."""
    places, made, at = find_tensors(base), bytearray(base), 0
    for entry in entries:
        place = places.get(str(entry.get("name")))
        if place is None:
            raise DeltaError(f"the base has no tensor `{entry.get('name')}`")
        try:
            numbers = _unpacked(data[at : at + int(entry["packed"])], 12 * place.length + 64)
            fresh = updated(entry, Reader(numbers), place.read(base))
        except (KeyError, TypeError, ValueError, zlib.error) as error:
            raise DeltaError(f"`{entry['name']}`: its part of the delta is damaged ({error})") from error
        made[place.offset : place.offset + place.length] = fresh.tobytes()
        at += int(entry["packed"])
    return bytes(made)


def _unpacked(stream: bytes, limit: int) -> bytes:
    """A tensor's numbers; no tensor needs more than ``limit`` bytes of them."""
    inflate = zlib.decompressobj()
    found = inflate.decompress(stream, limit)
    if not inflate.eof:
        raise ValueError("its numbers do not end where they should")
    return found


def apply(base: bytes, delta: Delta, name: str = "the base") -> bytes:
    """The updated file. Refused: a base that the delta was not made against, a result that is not what was packed."""
    wanted, found = str(delta.header["base"]["sha256"]), hashlib.sha256(base).hexdigest()
    if found != wanted:
        raise DeltaError(f"{name} is not the file that this delta was made against (SHA-256 {found[:16]}..., it wants "
                         f"{wanted[:16]}..., {delta.header['base']['bytes']} bytes)")  # fmt: skip
    made = patched(base, delta.header["tensors"], delta.data)
    if hashlib.sha256(made).hexdigest() != delta.header["result"]["sha256"]:
        raise DeltaError("the result is not the model that was packed: the delta is damaged")
    return made


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 3 or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    base, delta, out = map(Path, arguments)
    try:
        made = apply(base.read_bytes(), read_delta(delta), str(base))
        temporary = out.with_name(f".{out.name}.tmp")
        temporary.write_bytes(made)
        temporary.replace(out)
    except (DeltaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {len(made)} bytes, as packed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
