"""A static graph as a MIL program. Runs in the tool chain's environment.

QDQ pairs become MIL's own: a stored int8 weight is ``constexpr_affine_dequantize`` (it stays int8 in the file), an
activation goes through ``quantize`` and ``dequantize``. What MIL infers for each tensor's shape must be what ONNX has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from coremltools.converters.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import Function, Program, types

from compressor.errors import CompileError
from compressor.types import Array
from targets.backends.coreml.operators import OPERATORS, refuse
from targets.static_graph import DEQUANTIZE, QUANTIZE, Graph, Node

_KINDS = {"f": "fp32", "i": "int32", "u": "int32", "b": "bool"}
_TYPES = {"fp32": types.fp32, "int32": types.int32, "bool": types.bool}
NUMBERS_ONLY = frozenset(
    {"Concat", "Expand", "Gather", "GatherND", "Pad", "Slice", "Split"}
)  # MIL's take no truth values
PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


class Maker:
    """Builds MIL operations node by node inside an open function; values by the ONNX name of their tensor."""

    def __init__(self, graph: Graph, inputs: dict[str, Any]) -> None:
        self.graph, self._makers = graph, graph.makers()
        self.values: dict[str, Any] = dict(inputs)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.graph.shape(name)

    def kind(self, name: str) -> str:
        """MIL's name of a tensor's type: Core ML has no 64-bit numbers and computes bytes as int32."""
        kind = self.graph.constants[name].dtype if name in self.graph.constants else self.graph.types[name]
        return _KINDS[kind.kind]

    def value(self, node: Node, place: int) -> Any:
        """What goes in at ``place``: a computed value, or a constant of the file."""
        name = node.input(place)
        if name not in self.values:
            self.values[name] = mb.const(val=narrowed(self.graph.constants[name]), name=name)
        found = self.values[name]
        as_number = node.operator in NUMBERS_ONLY and found.dtype == types.bool
        return mb.cast(x=found, dtype="int32") if as_number else found

    def stored(self, node: Node, place: int) -> Any:
        """The numpy value of a stored operand."""
        name = node.input(place)
        if name not in self.graph.constants:
            raise refuse(node, f"{node.operator} with a computed `{name}` has no form here")
        return self.graph.constants[name]

    def vector(self, node: Node, place: int) -> Any:
        """A stored operand as numbers, dequantized where the file keeps it as integers (a bias)."""
        maker = self._makers.get(node.input(place))
        if maker is not None and maker.operator == DEQUANTIZE and maker.input(0) in self.graph.constants:
            scale, zero, axis = self._parameters(maker)
            return _numbers(self.graph.constants[maker.input(0)], scale, zero, axis)
        return narrowed(self.stored(node, place))

    def spread(self, node: Node, place: int, shape: tuple[int, ...]) -> Any:
        """An operand in the full shape of the result."""
        value, own = self.value(node, place), self.shape(node.input(place))
        if tuple(own) == tuple(shape):
            return value
        full = (1,) * (len(shape) - len(own)) + tuple(own)
        reps = [most // size for size, most in zip(full, shape, strict=True)]
        if value.dtype == types.bool:  # `tile` takes numbers
            wide = mb.tile(x=mb.reshape(x=mb.cast(x=value, dtype="int32"), shape=list(full)), reps=reps)
            return mb.cast(x=wide, dtype="bool")
        return mb.tile(x=mb.reshape(x=value, shape=list(full)), reps=reps)

    def run(self, node: Node) -> None:
        """Build ``node`` and check the shapes of what it makes."""
        if node.operator == QUANTIZE:
            made = self._quantize(node)
        elif node.operator == DEQUANTIZE:
            made = self._dequantize(node)
        elif node.operator in OPERATORS:
            made = OPERATORS[node.operator](self, node)
        else:
            raise refuse(node, f"{node.operator} has no form in the Core ML export")
        for name, value in zip(node.outputs, made if isinstance(made, tuple) else (made,), strict=False):
            as_truth = self.kind(name) == "bool" and value.dtype != types.bool
            self.values[name] = mb.cast(x=value, dtype="bool") if as_truth else value
            found = tuple(int(size) for size in value.shape)
            if found != tuple(self.shape(name)):
                raise CompileError(f"node `{node.name}`: MIL infers {found} for `{name}`, ONNX has {self.shape(name)}")

    def _parameters(self, node: Node) -> tuple[Array, Array, int]:
        """Scales, zero points, and the axis that they go along."""
        scale = np.squeeze(np.asarray(self.stored(node, 1), np.float32))
        zero = self.stored(node, 2) if node.input(2) else np.zeros(scale.shape, np.uint8)
        rank = max(len(self.shape(node.input(0))), 1)
        return scale, np.squeeze(np.asarray(zero)), int(node.attributes.get("axis", 1)) % rank if scale.ndim else 0

    def _quantize(self, node: Node) -> Any:
        scale, zero, _ = self._parameters(node)
        if zero.dtype not in (np.int8, np.uint8) or scale.ndim:
            raise refuse(node, f"{zero.dtype} activations with {scale.size} scales have no form here")
        return mb.quantize(input=self.value(node, 0), scale=scale, zero_point=zero, output_dtype=zero.dtype.name)

    def _dequantize(self, node: Node) -> Any:
        scale, zero, axis = self._parameters(node)
        array = self.graph.constants.get(node.input(0))
        if array is None:
            return mb.dequantize(input=self.value(node, 0), scale=scale, zero_point=zero)
        if array.dtype not in (np.int8, np.uint8) or not array.ndim:
            return mb.const(val=_numbers(array, scale, zero, axis), name=node.outputs[0])
        return mb.constexpr_affine_dequantize(quantized_data=array, zero_point=zero, scale=scale, axis=axis)


def _numbers(array: Array, scale: Array, zero: Array, axis: int) -> Array:
    shape = [1] * array.ndim
    if scale.ndim:
        shape[axis] = scale.size
    found: Array = ((array.astype(np.float64) - zero.reshape(shape)) * scale.reshape(shape)).astype(np.float32)
    return found


def narrowed(array: Array) -> Array:
    """In a type that Core ML has."""
    kind = {"f": np.float32, "i": np.int32, "u": np.int32}.get(array.dtype.kind)
    if array.dtype.kind == "i" and array.size:  # "to the end" is written as the largest int64
        array = np.clip(array, np.iinfo(np.int32).min, np.iinfo(np.int32).max)
    return np.array(array if kind is None else array.astype(kind), order="C")


def build(graph: Graph, opset: Any) -> Program:
    """The MIL program of ``graph`` with its names of inputs and outputs. Raises :class:`CompileError`."""
    inputs = {
        name: mb.placeholder(shape=graph.shape(name), dtype=_TYPES[_KINDS[graph.types[name].kind]])
        for name in graph.inputs
    }
    program = Program()
    with Function(inputs, opset_version=opset) as function:
        maker = Maker(graph, dict(function.inputs))
        for node in graph.nodes:
            maker.run(node)
        function.set_outputs([mb.identity(x=maker.values[name], name=name) for name in graph.outputs])
    program.add_function("main", function)
    return program


def evaluate(graph: Graph, values: Mapping[str, Array], opset: Any) -> dict[str, float | None]:
    """Each node built with ``values`` (every tensor of one run) as its operands, as far as Core ML Tools can evaluate.

    Name of the node to the largest difference relative to the largest value; None: MIL has no evaluation for it.
    """
    found: dict[str, float | None] = {}
    with Function({"unused": mb.placeholder(shape=(1,), dtype=types.fp32)}, opset_version=opset):
        for node in graph.nodes:
            maker = Maker(graph, {})
            for name in node.inputs:
                if name and name not in graph.constants:
                    given = values[name]
                    kept = given if given.dtype in (np.int8, np.uint8) else narrowed(given)
                    maker.values[name] = mb.const(val=kept)
            maker.run(node)
            made = maker.values[node.outputs[0]].val
            wanted = values[node.outputs[0]]
            found[node.name] = None
            if made is not None:
                gap = np.abs(np.asarray(made, np.float64) - wanted).max()
                found[node.name] = float(gap / max(float(np.abs(wanted).max()), 1e-9))
    return found


def coverage(graph: Graph) -> dict[str, Any]:
    """Of the products, how many have an int8 weight and an int8 activation in the file; why the others have not."""
    makers = graph.makers()

    def quantized(name: str) -> bool:
        return name in makers and makers[name].operator == DEQUANTIZE

    products = [node for node in graph.nodes if node.operator in PRODUCTS]
    left = [
        {
            "name": node.name,
            "operator": node.operator,
            "reason": "int8 weight, float16 activation" if quantized(node.input(1)) else "float16: it is not quantized",
        }
        for node in products
        if not (quantized(node.input(0)) and quantized(node.input(1)))
    ]
    return {"quantized": len(products) - len(left), "left_float": left}
