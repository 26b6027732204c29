"""From a static ONNX graph to a TFLite file: layouts, quantization, and the walk over the nodes.

Layout: TFLite's convolutions and pools are channels-last. Every ONNX tensor of rank 4 may exist in both layouts;
whoever needs the other one gets a TRANSPOSE (or a RESHAPE where only dimensions of size 1 move), made once.

Quantization: a QDQ pair makes its tensor an int8 tensor. An operation whose inputs are all such tensors, and whose
output goes to QuantizeLinear only, becomes an int8 kernel. An operation that lacks one of these reads dequantized
floats; products with int8 weights then become hybrid kernels, which quantize their activation at run time. uint8 pairs
become int8 by a shift of 128, which changes no value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from compressor.errors import CompileError
from compressor.types import Array
from targets.base import UNQUANTIZED, Coverage, NodeFact
from targets.static_graph import DEQUANTIZE, QUANTIZE, Graph, Node
from targets.tflite.builder import Builder, Operation, Quantization, Tensor

LAST = (0, 2, 3, 1)  # channels-first to channels-last
FIRST = (0, 3, 1, 2)
PRODUCTS = frozenset({"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "BATCH_MATMUL", "TRANSPOSE_CONV"})


@dataclass(frozen=True)
class Converted:
    """The file's bytes and what is in it."""

    content: bytes
    operations: tuple[Operation, ...]
    coverage: Coverage


@dataclass(frozen=True)
class Stored:
    """A quantized constant: int8 (or int32) values, scales and zero points along ``axis``."""

    values: Array
    scales: Array
    zero_points: Array
    axis: int

    def real(self) -> Array:
        shape = [1] * self.values.ndim
        if self.scales.size > 1:
            shape[self.axis] = -1
        offset = self.values.astype(np.float32) - self.zero_points.reshape(shape).astype(np.float32)
        return np.asarray(offset * self.scales.reshape(shape), np.float32)


def convert(
    graph: Graph,
    describe: str = "the model",
    *,
    int8_interface: bool = False,
    absent: Collection[str] = frozenset(),
) -> Converted:
    """Write ``graph`` as TFLite. Raises :class:`CompileError` that names the node that cannot be written.

    ``int8_interface``: inputs that the file quantizes at once, and outputs that it dequantizes at the end, are int8
    tensors of the file; inputs of rank 4 are channels-last; int64 becomes int32, for which small runtimes have kernels.
    Microcontrollers and NPUs want no float at all. ``absent``: operators of TFLite that the runtime has no kernel for;
    those with another form are written in it.
    """
    from targets.tflite.operators import OPERATORS

    state = Converter(graph, int8_interface=int8_interface, absent=absent)
    for node in graph.nodes:
        if node.name in state.absorbed or state.take_quantization(node):
            continue
        if node.operator not in OPERATORS:
            raise CompileError(
                f"{describe}: node `{node.name}`: {node.operator} has no form in the TFLite export",
                hint="Export the model without it, or use another target.",
            )
        OPERATORS[node.operator](state, node)
    outputs = {name: state.get(name, quantized=int8_interface and state.is_quantized(name)) for name in graph.outputs}
    content = state.builder.build(state.inputs, outputs)
    operations = tuple(state.builder.operations)
    return Converted(content, operations, coverage(operations))


def refuse(node: Node, why: str) -> CompileError:
    """What a node without a TFLite form raises."""
    return CompileError(f"node `{node.name}`: {why}", hint="Export the model without it, or use another target.")


def coverage(operations: Sequence[Operation]) -> Coverage:
    """Of the convolutions and products, how many run int8 (hybrid ones count: their kernel multiplies int8)."""
    products = [operation for operation in operations if operation.operator in PRODUCTS]
    quantized_file = any("int8" in {tensor.type for tensor in operation.inputs} for operation in operations)
    why = "its weight or activation is not quantized in the file" if quantized_file else UNQUANTIZED
    left = tuple(
        NodeFact(operation.outputs[0].name, operation.operator, False, why)
        for operation in products
        if "int8" not in {tensor.type for tensor in operation.inputs[:2]}
    )
    return Coverage(len(products) - len(left), len(products), left)


class Converter:
    """What is known while the graph is written: the TFLite tensors of every ONNX tensor."""

    def __init__(self, graph: Graph, *, int8_interface: bool = False, absent: Collection[str] = frozenset()) -> None:
        self.graph, self.builder, self.absent = graph, Builder(), absent
        self.small = int8_interface  # a runtime without kernels for int64, and for int8 weights with floats
        self.schema = self.builder.schema
        self.readers = graph.consumers()
        self.absorbed: set[str] = set()  # names of nodes that another one already does
        self.stored: dict[str, Stored] = {}  # dequantized constants
        self._views: dict[str, dict[tuple[bool, bool], Tensor]] = {}  # by (channels last, quantized)
        self._constants: dict[tuple[Any, ...], Tensor] = {}
        self.inputs = {}
        for name in graph.inputs:
            shape, params = graph.shape(name), self._input_params(name) if int8_interface else None
            last = params is not None and len(shape) == 4
            shape = tuple(shape[axis] for axis in LAST) if last else shape
            kind = self.kind(name) if params is None else "int8"
            self.inputs[name] = self.builder.tensor(name, shape, kind, params)
            self._views[name] = {(last, params is not None): self.inputs[name]}

    def kind(self, name: str) -> str:
        """Element type of an ONNX tensor in the file, as numpy's name."""
        found = self.graph.types[name].name
        return "int32" if self.small and found == "int64" else found

    def _input_params(self, name: str) -> Quantization | None:
        """Parameters of an input that is quantized wherever it is read; None for any other."""
        readers = self.readers.get(name, [])
        if not readers or any(reader.operator != QUANTIZE for reader in readers):
            return None
        found = {self.quantization_of(reader) for reader in readers}
        return found.pop() if len(found) == 1 else None

    # ------------------------------------------------------------ constants

    def array(self, name: str) -> Array | None:
        """The value of a constant, dequantized where it is stored quantized; None for what is computed."""
        if name in self.stored:
            return self.stored[name].real()
        return self.graph.constants.get(name)

    def constant(self, array: Array, name: str = "constant") -> Tensor:
        """A stored tensor; equal ones are shared."""
        array = np.array(array, order="C")  # np.ascontiguousarray would make a scalar a vector
        if self.small and array.dtype == np.int64:
            limits = np.iinfo(np.int32)
            if array.size and (array.min() < limits.min or array.max() > limits.max):
                raise CompileError(f"the stored tensor `{name}` does not fit 32-bit integers")
            array = array.astype(np.int32)
        key = (array.dtype.str, array.shape, hashlib.sha256(array.tobytes()).digest())
        if key not in self._constants:
            self._constants[key] = self.builder.constant(name, array)
        return self._constants[key]

    def is_constant(self, name: str) -> bool:
        return name in self.stored or name in self.graph.constants

    def has_int8(self, name: str) -> bool:
        """Is it a constant that is stored as int8 with one scale?"""
        stored = self.stored.get(name)
        return stored is not None and stored.values.dtype == np.int8 and stored.scales.size == 1

    def int8_constant(self, name: str, last: bool) -> Tensor:
        """A constant of :meth:`has_int8` as it is stored; a scalar becomes a vector of one."""
        stored = self.stored[name]
        values = np.atleast_1d(_as_last(stored.values) if last else stored.values)
        return self.builder.constant(
            name, values, Quantization((float(stored.scales[0]),), (int(stored.zero_points[0]),))
        )

    # ------------------------------------------------------------ activations

    def rank(self, name: str) -> int:
        return len(self.graph.shape(name))

    def same(self, first: str, second: str) -> bool:
        """Are these two words for one tensor?"""
        return first == second or (first in self._views and self._views[first] is self._views.get(second))

    def is_last(self, name: str) -> bool:
        """Does the tensor exist channels-last already?"""
        return any(last for last, _ in self._views.get(name, {}))

    def is_quantized(self, name: str) -> bool:
        return any(quantized for _, quantized in self._views.get(name, {}))

    def params(self, name: str) -> Quantization:
        """Scale and zero point of a quantized activation."""
        tensor = next(tensor for (_, quantized), tensor in self._views[name].items() if quantized)
        assert tensor.quantization is not None
        return tensor.quantization

    def get(self, name: str, last: bool = False, quantized: bool = False) -> Tensor:
        """The tensor in the wanted layout and kind; whatever is missing is made. Constants come as floats."""
        if self.is_constant(name):
            array = self.array(name)
            assert array is not None
            return self.constant(_as_last(array) if last else array, name)
        views = self._views[name]
        wanted = (last, quantized)
        if wanted not in views:
            source = next(
                (key for key in ((last, True), (not last, quantized), (not last, True)) if key in views), None
            )
            if source is None:
                raise CompileError(f"tensor `{name}` is not there in the form that is wanted")
            if source[0] != last:
                views[(last, source[1])] = self._turn(views[source], last)
            if source[1] != quantized:
                views[wanted] = self._dequantize(views[(last, True)])
        return views[wanted]

    def _turn(self, tensor: Tensor, last: bool) -> Tensor:
        order = LAST if last else FIRST
        shape = tuple(tensor.shape[axis] for axis in order)
        suffix = "channels_last" if last else "channels_first"
        turned = self.builder.tensor(f"{tensor.name}/{suffix}", shape, tensor.type, tensor.quantization)
        self.move(tensor, turned, order)
        return turned

    def move(self, tensor: Tensor, turned: Tensor, order: Sequence[int]) -> None:
        """TRANSPOSE, or RESHAPE where the order of the values in memory stays."""
        moving = [axis for axis in order if tensor.shape[axis] != 1]
        if moving == sorted(moving):
            self.reshape(tensor, turned)
            return
        permutation = self.constant(np.asarray(order, np.int32), "permutation")
        self.builder.add("TRANSPOSE", [tensor, permutation], [turned], self.schema.TransposeOptionsT())

    def reshape(self, tensor: Tensor, result: Tensor) -> None:
        options = self.schema.ReshapeOptionsT()
        options.newShape = np.asarray(result.shape, np.int32)
        shape = self.constant(np.asarray(result.shape, np.int32), "shape")
        self.builder.add("RESHAPE", [tensor, shape], [result], options)

    def _dequantize(self, tensor: Tensor) -> Tensor:
        real = self.builder.tensor(f"{tensor.name}/float", tensor.shape, "float32")
        self.builder.add("DEQUANTIZE", [tensor], [real], self.schema.DequantizeOptionsT())
        return real

    def temporary(self, name: str, shape: Sequence[int], kind: str = "float32") -> Tensor:
        return self.builder.tensor(name, shape, kind)

    def result(self, name: str, last: bool = False, params: Quantization | None = None) -> Tensor:
        """A new tensor for the ONNX tensor ``name``; quantized with ``params``."""
        shape = self.graph.shape(name)
        shape = tuple(shape[axis] for axis in LAST) if last else shape
        kind = "int8" if params is not None else self.kind(name)
        tensor = self.builder.tensor(name, shape, kind, params)
        self._views.setdefault(name, {})[(last, params is not None)] = tensor
        return tensor

    def alias(self, name: str, other: str) -> None:
        """``name`` is another word for ``other``."""
        if self.is_constant(other):
            array = self.array(other)
            assert array is not None
            self._views[name] = {(False, False): self.constant(array, other)}
        else:
            self._views[name] = self._views[other]

    # ------------------------------------------------------------ quantization

    def take_quantization(self, node: Node) -> bool:
        """Handle QuantizeLinear and DequantizeLinear; False for any other node."""
        if node.operator == DEQUANTIZE:
            if node.input(0) in self.graph.constants:
                self.stored[node.outputs[0]] = self._stored(node)
            else:
                self.alias(node.outputs[0], node.input(0))
            return True
        if node.operator == QUANTIZE:
            self._quantize(node)
            return True
        return False

    def _stored(self, node: Node) -> Stored:
        values, scales, zeros = self._constants_of(node)
        if values.dtype == np.uint8:
            values, zeros = (values.astype(np.int16) - 128).astype(np.int8), zeros - 128
        axis = int(node.attributes.get("axis", 1))
        return Stored(values, scales, zeros, axis % max(values.ndim, 1))

    def _constants_of(self, node: Node) -> tuple[Array, Array, Array]:
        constants = self.graph.constants
        scales = np.atleast_1d(np.asarray(constants[node.input(1)], np.float32))
        zeros = (
            np.atleast_1d(constants[node.input(2)].astype(np.int64))
            if node.input(2)
            else np.zeros_like(scales, np.int64)
        )
        return constants[node.input(0)], scales, zeros

    def quantization_of(self, node: Node) -> Quantization:
        """Parameters of a QuantizeLinear node as int8."""
        scale = np.atleast_1d(self.graph.constants[node.input(1)])
        zero = self.graph.constants.get(node.input(2), np.zeros((), np.uint8))
        if scale.size != 1 or zero.dtype not in (np.uint8, np.int8):
            raise CompileError(
                f"node `{node.name}`: TFLite takes one 8-bit scale for an activation, not {zero.dtype} x {scale.size}"
            )
        shift = 128 if zero.dtype == np.uint8 else 0
        return Quantization((float(scale[0]),), (int(np.atleast_1d(zero)[0]) - shift,))

    def _quantize(self, node: Node) -> None:
        source, params = node.input(0), self.quantization_of(node)
        if self.is_quantized(source) and self.params(source) == params:
            self.alias(node.outputs[0], source)
            return
        last, quantized = self.is_last(source), self.is_quantized(source)
        value = self.get(source, last, quantized)
        result = self.builder.tensor(node.outputs[0], value.shape, "int8", params)
        self.builder.add("QUANTIZE", [value], [result], self.schema.QuantizeOptionsT())
        self._views[node.outputs[0]] = {(last, True): result}

    def int8_result(self, node: Node, output: str) -> Quantization | None:
        """Parameters for an int8 kernel: all computed inputs are quantized, and so is all that ``output`` feeds."""
        computed = [name for name in node.inputs if name and not self.is_constant(name)]
        if not computed or not all(self.is_quantized(name) for name in computed):
            return None
        after = self.readers.get(output, [])
        if output in self.graph.outputs or not after or any(reader.operator != QUANTIZE for reader in after):
            return None
        found = {self.quantization_of(reader) for reader in after}
        return found.pop() if len(found) == 1 else None

    def activation_after(self, node: Node) -> tuple[str, int]:
        """The output and the fused activation: a Relu or Clip that alone reads ``node`` is done by its kernel."""
        output, kinds = node.outputs[0], self.schema.ActivationFunctionType
        after = self.readers.get(output, [])
        if len(after) != 1 or output in self.graph.outputs:
            return output, kinds.NONE
        kind = {"": None, "relu": kinds.RELU, "relu6": kinds.RELU6, "relu1": kinds.RELU_N1_TO_1}[
            self.clip_kind(after[0])
        ]
        if kind is None:
            return output, kinds.NONE
        self.absorbed.add(after[0].name)
        return after[0].outputs[0], kind

    def clip_kind(self, node: Node) -> str:
        """``relu``, ``relu6``, ``relu1`` (-1 .. 1) or empty."""
        if node.operator == "Relu":
            return "relu"
        if node.operator != "Clip":
            return ""
        low, high = self.limits(node)
        return {(0.0, 6.0): "relu6", (-1.0, 1.0): "relu1", (0.0, np.inf): "relu"}.get((low, high), "")

    def limits(self, node: Node) -> tuple[float, float]:
        """Bounds of a Clip."""
        low, high = (self.array(node.input(position)) for position in (1, 2))
        return (
            -np.inf if low is None else float(np.squeeze(low)),
            np.inf if high is None else float(np.squeeze(high)),
        )


def _as_last(array: Array) -> Array:
    """A constant for a channels-last partner of rank 4, broadcast rules kept."""
    shape = (1,) * (4 - array.ndim) + array.shape
    return np.ascontiguousarray(array.reshape(shape).transpose(LAST)) if array.size > 1 else array
