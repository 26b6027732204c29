"""Tensors of a model that never has to fit into memory: read one by one, written one by one behind each other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from compressor.errors import StageError
from compressor.types import Array


def read_tensor(tensor: TensorProto, folder: Path) -> Array:
    """One tensor, from the file's own bytes or from its external file; nothing is kept in the model."""
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


class Store:
    """The data file beside a new model, and the tensors of both: those of the source that stay, and new ones."""

    def __init__(self, stream: BinaryIO, tensors: Mapping[str, TensorProto], source: Path, out: Path) -> None:
        """``stream`` is open for reading and writing; ``source`` and ``out`` are the two models' paths."""
        self.kept = dict(tensors)
        self.made: dict[str, TensorProto] = {}
        self._stream, self._source, self._out = stream, source, out
        self._changed: dict[str, Array] = {}

    def read(self, name: str) -> Array:
        """A tensor as it is by now."""
        if name in self._changed:
            return self._changed[name]
        if name in self.made:
            self._stream.flush()
            return read_tensor(self.made[name], self._out.parent)
        return read_tensor(self.kept[name], self._source.parent)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of a stored float32 tensor; None for any other name."""
        tensor = self.kept.get(name, self.made.get(name))
        return tuple(tensor.dims) if tensor is not None and tensor.data_type == TensorProto.FLOAT else None

    def add(self, name: str, array: Array) -> None:
        """Write a new tensor behind the others."""
        tensor = TensorProto(name=name, dims=array.shape, data_type=helper.np_dtype_to_tensor_dtype(array.dtype))
        self.made[name] = self._append(tensor, np.ascontiguousarray(array).tobytes())

    def drop(self, name: str) -> None:
        """A tensor of the source that the new model does not need."""
        del self.kept[name]

    def change(self, name: str, array: Array) -> None:
        """Replace values: of a new tensor where it lies in the file, of a kept one when it is written."""
        if name in self.made:
            entries = {entry.key: entry.value for entry in self.made[name].external_data}
            self._stream.seek(int(entries["offset"]))
            self._stream.write(np.ascontiguousarray(array).tobytes())
            self._stream.seek(0, 2)
        else:
            self._changed[name] = array

    def finish(self) -> list[TensorProto]:
        """All tensors of the new model. Kept ones are copied when they were in an external file."""
        return [*(self._moved(tensor) for tensor in self.kept.values()), *self.made.values()]

    def _moved(self, tensor: TensorProto) -> TensorProto:
        made = TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
        if tensor.data_location == TensorProto.EXTERNAL:
            return self._append(made, self.read(tensor.name).tobytes())
        if tensor.name in self._changed:
            return numpy_helper.from_array(self._changed[tensor.name], tensor.name)
        return tensor

    def _append(self, tensor: TensorProto, content: bytes) -> TensorProto:
        start = self._stream.tell()
        self._stream.write(content)
        tensor.data_location = TensorProto.EXTERNAL
        entries = {"location": f"{self._out.name}.data", "offset": str(start), "length": str(len(content))}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)
        return tensor
