"""A TFLite flatbuffer under construction: tensors, buffers and operators in the order of execution.

The schema classes are those of the LiteRT wheel (``schema.fbs``, version 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from compressor.errors import CompileError
from compressor.types import Array

_TYPES = {
    "float32": "FLOAT32",
    "int8": "INT8",
    "int32": "INT32",
    "int64": "INT64",
    "bool": "BOOL",
    "uint8": "UINT8",
}
_LAST_OLD_CODE = 127  # codes above it do not fit the deprecated one-byte field


@dataclass(frozen=True)
class Quantization:
    """real = scale * (stored - zero point); one scale, or one per slice along ``axis``."""

    scales: tuple[float, ...]
    zero_points: tuple[int, ...]
    axis: int = 0


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file."""

    index: int
    name: str
    shape: tuple[int, ...]
    type: str
    quantization: Quantization | None = None


@dataclass(frozen=True)
class Operation:
    """What was added: the builtin operator and its tensors."""

    operator: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class Builder:
    """Collects one graph; :meth:`build` gives the bytes of the file."""

    def __init__(self) -> None:
        from ai_edge_litert import schema_py_generated as schema

        self.schema = schema
        self.operations: list[Operation] = []
        self._tensors: list[Any] = []
        self._buffers: list[Any] = [schema.BufferT()]  # buffer 0 is the empty one by definition
        self._codes: dict[str, int] = {}
        self._operators: list[Any] = []

    def tensor(
        self, name: str, shape: Sequence[int], kind: str, quantization: Quantization | None = None, buffer: int = 0
    ) -> Tensor:
        """A tensor that an operation fills (or, with ``buffer``, a stored one)."""
        if kind not in _TYPES:
            raise CompileError(f"tensor `{name}` is {kind}, which this TFLite export does not write")
        made = self.schema.TensorT()
        made.name, made.shape, made.buffer = name, np.asarray(shape, np.int32), buffer
        made.type, made.hasRank = getattr(self.schema.TensorType, _TYPES[kind]), True
        if quantization is not None:
            made.quantization = self.schema.QuantizationParametersT()
            made.quantization.scale = np.asarray(quantization.scales, np.float32)
            made.quantization.zeroPoint = np.asarray(quantization.zero_points, np.int64)
            made.quantization.quantizedDimension = quantization.axis
        self._tensors.append(made)
        return Tensor(len(self._tensors) - 1, name, tuple(int(size) for size in shape), kind, quantization)

    def constant(self, name: str, array: Array, quantization: Quantization | None = None) -> Tensor:
        """A stored tensor."""
        buffer = self.schema.BufferT()
        buffer.data = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
        self._buffers.append(buffer)
        return self.tensor(name, array.shape, array.dtype.name, quantization, len(self._buffers) - 1)

    def add(self, operator: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], options: Any = None) -> None:
        """One operation; ``options`` is an object of the schema such as ``Conv2DOptionsT``."""
        made = self.schema.OperatorT()
        made.opcodeIndex = self._codes.setdefault(operator, len(self._codes))
        made.inputs = np.asarray([tensor.index for tensor in inputs], np.int32)
        made.outputs = np.asarray([tensor.index for tensor in outputs], np.int32)
        if options is not None:
            made.builtinOptionsType = getattr(self.schema.BuiltinOptions, type(options).__name__[:-1])
            made.builtinOptions = options
        self._operators.append(made)
        self.operations.append(Operation(operator, tuple(inputs), tuple(outputs)))

    def build(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> bytes:
        """The file, with one signature ``serving_default`` that names inputs and outputs."""
        import flatbuffers

        graph = self.schema.SubGraphT()
        graph.name = "main"
        graph.tensors, graph.operators = self._tensors, self._operators
        graph.inputs = np.asarray([tensor.index for tensor in inputs.values()], np.int32)
        graph.outputs = np.asarray([tensor.index for tensor in outputs.values()], np.int32)
        model = self.schema.ModelT()
        model.version, model.description = 3, "compress-for-device"
        model.operatorCodes = [self._code(name) for name in self._codes]
        model.subgraphs, model.buffers = [graph], self._buffers
        model.signatureDefs = [self._signature(inputs, outputs)]
        packer = flatbuffers.Builder(1 << 20)
        packer.Finish(model.Pack(packer), b"TFL3")
        return bytes(packer.Output())

    def _code(self, operator: str) -> Any:
        code = self.schema.OperatorCodeT()
        code.builtinCode = getattr(self.schema.BuiltinOperator, operator)
        code.deprecatedBuiltinCode = min(code.builtinCode, _LAST_OLD_CODE)
        return code

    def _signature(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Any:
        signature = self.schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = "serving_default", 0
        signature.inputs = [self._named(name, tensor) for name, tensor in inputs.items()]
        signature.outputs = [self._named(name, tensor) for name, tensor in outputs.items()]
        return signature

    def _named(self, name: str, tensor: Tensor) -> Any:
        entry = self.schema.TensorMapT()
        entry.name, entry.tensorIndex = name, tensor.index
        return entry
