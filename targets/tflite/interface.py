"""What a TFLite file takes and gives: names, shapes, int8 parameters; float arrays in and out of int8 tensors.

Only files of :mod:`targets.tflite` are read: an int8 input of rank 4 is channels-last, all others are as in ONNX.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compressor.errors import RunError, sdk_errors
from compressor.types import Array
from targets.tflite.convert import FIRST, LAST


@dataclass(frozen=True)
class Port:
    """An input or output. ``scale`` 0 means that the tensor is not quantized."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # numpy name
    scale: float = 0.0
    zero_point: int = 0

    @property
    def channels_last(self) -> bool:
        return self.dtype == "int8" and len(self.shape) == 4

    @property
    def onnx_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in FIRST) if self.channels_last else self.shape

    def encode(self, array: Array) -> Array:
        """An ONNX input as the file takes it; rounds half to even and saturates, as QuantizeLinear does."""
        if self.scale:
            stored = np.rint(array.astype(np.float32) / np.float32(self.scale)) + self.zero_point
            array = np.clip(stored, -128, 127).astype(np.int8)
        array = array.transpose(LAST) if self.channels_last else array
        return np.ascontiguousarray(array, self.dtype)

    def decode(self, array: Array) -> Array:
        """What the file gave, as ONNX's output. Outputs keep ONNX's layout."""
        if not self.scale:
            return array
        return np.asarray((array.astype(np.float32) - self.zero_point) * np.float32(self.scale), np.float32)


@dataclass(frozen=True)
class Interface:
    """Inputs and outputs in the order of the file."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def read_model(path: Path) -> Any:
    """The file as an object of the schema. Raises :class:`RunError` for anything but a TFLite file."""
    from ai_edge_litert import schema_py_generated as schema

    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunError(f"could not read `{path.name}`: {error.strerror}") from error
    if content[4:8] != b"TFL3":
        raise RunError(f"`{path.name}` is not a TFLite file")
    with sdk_errors(RunError, f"read `{path.name}`", hint="The file is damaged; compile it again."):
        return schema.ModelT.InitFromObj(schema.Model.GetRootAs(content))


def read_interface(path: Path) -> Interface:
    """Raises :class:`RunError` for a file that is none of ours."""
    model = read_model(path)
    graph = model.subgraphs[0]
    if not model.signatureDefs:
        raise RunError(f"`{path.name}` has no signature")
    names = model.signatureDefs[0]
    return Interface(_ports(graph, names.inputs), _ports(graph, names.outputs))


def _ports(graph: Any, entries: Any) -> tuple[Port, ...]:
    from ai_edge_litert import schema_py_generated as schema

    kinds = {value: name.lower() for name, value in vars(schema.TensorType).items() if isinstance(value, int)}
    found = []
    for entry in entries:
        tensor = graph.tensors[entry.tensorIndex]
        name = entry.name.decode() if isinstance(entry.name, bytes) else str(entry.name)
        params = tensor.quantization
        quantized = params is not None and params.scale is not None and len(params.scale) == 1
        found.append(
            Port(
                name,
                tuple(int(size) for size in tensor.shape),
                kinds[tensor.type],
                float(params.scale[0]) if quantized else 0.0,
                int(params.zeroPoint[0]) if quantized else 0,
            )
        )
    return tuple(found)


def operators(path: Path) -> tuple[tuple[str, str], ...]:
    """(operator, name of its first output) of every operation; a custom one by its own name."""
    from ai_edge_litert import schema_py_generated as schema

    model = read_model(path)
    words = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
    graph = model.subgraphs[0]
    found = []
    for operation in graph.operators:
        code = model.operatorCodes[operation.opcodeIndex]
        number = max(code.builtinCode, code.deprecatedBuiltinCode)
        custom = code.customCode.decode() if isinstance(code.customCode, bytes) else code.customCode
        name = graph.tensors[operation.outputs[0]].name
        found.append((custom or words[number], name.decode() if isinstance(name, bytes) else str(name)))
    return tuple(found)


def encode_all(interface: Interface, inputs: Mapping[str, Array]) -> list[Array]:
    """Every input in the order of the file."""
    return [port.encode(inputs[port.name]) for port in interface.inputs]
