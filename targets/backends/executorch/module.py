"""A static ONNX graph as a torch module, in the form that ``torch.export`` and XNNPACK's partitioner understand.

QDQ pairs become ``quantized_decomposed`` operations, exactly as PT2E quantization writes them; uint8 activations
become int8 by a shift of 128, which changes no value. A product with an int8 weight and a float activation gets a
quantization of its activation at run time (per tensor, int8, asymmetric), which becomes XNNPACK's dynamic kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor

from compressor.errors import CompileError
from targets.static_graph import DEQUANTIZE, QUANTIZE, UNQUANTIZED, Graph, Node

_decomposed = torch.ops.quantized_decomposed
_LOW, _HIGH = -128, 127
_SMALLEST_SCALE = float(np.finfo(np.float32).eps)  # PT2E's own for dynamic quantization
CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
PRODUCTS = CONVOLUTIONS | {"Gemm", "MatMul"}
# They move values or pick among them, so that rounding before is rounding after. XNNPACK's have one scale for all ends.
_MOVING = frozenset({"Concat", "Flatten", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})


class OnnxModule(torch.nn.Module):  # type: ignore[misc]
    """Executes the graph node by node; tracing turns that into a flat torch graph."""

    def __init__(self, graph: Graph, at_run_time: bool = True) -> None:
        """``at_run_time``: quantize activations of products with int8 weights where the file does not; else float."""
        super().__init__()
        from targets.backends.executorch.operators import OPERATORS

        self.graph, self._operators = graph, OPERATORS
        self.linear: set[str] = set()  # products whose weight is stored as (out, in)
        self._buffer_names: dict[str, str] = {}
        self.weights = {
            node.outputs[0]: node
            for node in graph.nodes
            if node.operator == DEQUANTIZE and node.input(0) in graph.constants
        }
        for node in graph.nodes:
            if node.operator not in OPERATORS and node.operator not in (QUANTIZE, DEQUANTIZE):
                raise CompileError(
                    f"node `{node.name}`: {node.operator} has no form in the ExecuTorch export",
                    hint="Export the model without it, or use another target.",
                )
        self._makers, self._readers, self._at_run_time = graph.makers(), graph.consumers(), at_run_time
        self._kernels = {node.name: self._kernel(node) for node in graph.nodes if node.operator in PRODUCTS}
        for node in graph.nodes:
            self._keep_weight(node)
            if node.operator in (QUANTIZE, DEQUANTIZE):
                self._keep_parameters(node)
        for name in {name for node in graph.nodes for name in node.inputs} & set(graph.constants):
            self._keep(name, _as_int8(graph.constants[name], name in {node.input(0) for node in self.weights.values()}))

    def _keep(self, name: str, array: Any) -> None:
        """A buffer for a stored tensor; its reader reads it directly, because the partitioner wants constants."""
        if name not in self._buffer_names:
            self._buffer_names[name] = f"constant_{len(self._buffer_names)}"
            self.register_buffer(self._buffer_names[name], torch.from_numpy(np.array(array)))

    def _keep_weight(self, node: Node) -> None:
        """The stored matrix of a product as (out, in), with its scales: the form of a Linear."""
        name = node.input(1)
        source = self.weights[name].input(0) if name in self.weights else name
        array = self.graph.constants.get(source)
        if node.operator not in PRODUCTS or array is None:
            return
        if self._kernels[node.name] == "float" and name in self.weights:
            scale, zero, count = self._scales_of(self.weights[name])
            shape = [1] * array.ndim
            shape[int(self.weights[name].attributes.get("axis", 1)) % array.ndim if count > 1 else 0] = count
            array = (_as_int8(array, True) - zero.reshape(shape)) * scale.reshape(shape)
            array = array.astype(np.float32)
        if node.operator in CONVOLUTIONS or array.ndim != 2:
            if array.dtype == np.float32 and name in self.weights:
                self._keep(f"{node.name}/float", array)
            return
        turned = not (node.operator == "Gemm" and node.attributes.get("transB", 0))
        self._keep(f"{node.name}/linear", _as_int8(array.T if turned else array, name in self.weights))
        self.linear.add(node.name)

    def linear_weight(self, node: Node) -> Tensor:
        """What :meth:`_keep_weight` stored, dequantized where it is int8."""
        stored: Tensor = getattr(self, self._buffer_names[f"{node.name}/linear"])
        if node.input(1) not in self.weights or self._kernels[node.name] == "float":
            return stored
        return self._dequantize(self.weights[node.input(1)], stored, axis=0)

    def constant(self, name: str) -> Any:
        """The numpy value of a stored tensor; None for what is computed."""
        return self.graph.constants.get(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.graph.shape(name)

    def _kernel(self, node: Node) -> str:
        """``int8``: the file quantizes operands and result; ``dynamic``: the activation at run time; ``float``."""
        if node.input(1) not in self.weights:
            return "float"
        maker = self._makers.get(node.input(0))
        readers = self._readers.get(node.outputs[0], [])
        while len(readers) == 1 and readers[0].operator in ("Relu", "Clip"):
            readers = self._readers.get(readers[0].outputs[0], [])
        after = bool(readers) and all(reader.operator == QUANTIZE for reader in readers)
        if maker is not None and maker.operator == DEQUANTIZE and after:
            return "int8"
        return "dynamic" if self._at_run_time and node.operator not in CONVOLUTIONS else "float"

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        values: dict[str, Tensor] = dict(zip(self.graph.inputs, inputs, strict=True))
        values |= {name: getattr(self, plain) for name, plain in self._buffer_names.items()}
        for node in self.graph.nodes:
            if node.operator == QUANTIZE:
                values[node.outputs[0]] = self._quantize(node, values[node.input(0)])
            elif node.operator == DEQUANTIZE:
                values[node.outputs[0]] = self._dequantize(node, values[node.input(0)])
            else:
                self._run(node, values)
        return tuple(values[name] for name in self.graph.outputs)

    def _run(self, node: Node, values: dict[str, Tensor]) -> None:
        operands = [values[name] if name else None for name in node.inputs]
        if node.operator in _MOVING:
            operands = self._of_one_scale(node, operands)
        if self._kernels.get(node.name) == "dynamic":
            assert operands[0] is not None
            operands[0] = quantized_at_run_time(operands[0])
        if f"{node.name}/float" in self._buffer_names:
            operands[1] = getattr(self, self._buffer_names[f"{node.name}/float"])
        made = self._operators[node.operator](self, node, operands)
        for name, value in zip(node.outputs, made if isinstance(made, tuple) else (made,), strict=False):
            values[name] = value

    # ------------------------------------------------------------ quantization

    def _scales_of(self, node: Node) -> tuple[Any, Any, int]:
        """Scales and zero points for int8, and how many."""
        scale = np.atleast_1d(np.asarray(self.constant(node.input(1)), np.float64))
        zero = self.constant(node.input(2)) if node.input(2) else np.zeros((), np.uint8)
        if zero.dtype not in (np.uint8, np.int8, np.int32):
            raise CompileError(f"node `{node.name}`: {zero.dtype} quantization has no form in the ExecuTorch export")
        shift = 128 if zero.dtype == np.uint8 else 0
        return scale, np.broadcast_to(np.atleast_1d(zero).astype(np.int64) - shift, scale.shape), scale.size

    def _quantize(self, node: Node, value: Tensor) -> Tensor:
        scale, zero, count = self._scales_of(node)
        if count != 1:
            raise CompileError(f"node `{node.name}`: an activation has one scale, not {count}")
        return _decomposed.quantize_per_tensor(value, float(scale[0]), int(zero[0]), _LOW, _HIGH, torch.int8)

    def _of_one_scale(self, node: Node, operands: list[Any]) -> list[Any]:
        """Where the result of a moving node is quantized, its operands in the result's scale: no value changes."""
        readers = self._readers.get(node.outputs[0], [])
        makers = [self._makers.get(name) for name in (node.inputs if node.operator == "Concat" else node.inputs[:1])]
        quantized = [maker for maker in makers if maker is not None and maker.operator == DEQUANTIZE]
        if not quantized or not readers or any(reader.operator != QUANTIZE for reader in readers):
            return operands
        wanted = {self._scale_of(reader) for reader in readers}
        if len(wanted) > 1 or (
            wanted == {self._scale_of(maker) for maker in quantized} and len(quantized) == len(makers)
        ):
            return operands
        settled = [self._dequantize(readers[0], self._quantize(readers[0], value)) for value in operands[: len(makers)]]
        return settled + operands[len(makers) :]

    def _scale_of(self, node: Node) -> tuple[float, ...]:
        scale, zero, _ = self._scales_of(node)
        return (*map(float, scale), *map(float, zero))

    def _keep_parameters(self, node: Node) -> None:
        scale, zero, count = self._scales_of(node)
        stored = self.graph.constants.get(node.input(0))
        if stored is not None and stored.dtype == np.int32:
            self._keep(f"{node.name}/bias", (stored.astype(np.float64) * scale).astype(np.float32))
        elif count > 1:
            self._keep(f"{node.name}/scales", scale.astype(np.float32))
            self._keep(f"{node.name}/zeros", zero.astype(np.int64))

    def _dequantize(self, node: Node, value: Tensor, axis: int | None = None) -> Tensor:
        scale, zero, count = self._scales_of(node)
        if value.dtype == torch.int32:  # a bias: plain numbers, XNNPACK quantizes it again
            bias: Tensor = getattr(self, self._buffer_names[f"{node.name}/bias"])
            return bias
        if count == 1:
            return _decomposed.dequantize_per_tensor(value, float(scale[0]), int(zero[0]), _LOW, _HIGH, torch.int8)
        axis = int(node.attributes.get("axis", 1)) % value.dim() if axis is None else axis
        scales, zeros = (getattr(self, self._buffer_names[f"{node.name}/{part}"]) for part in ("scales", "zeros"))
        return _decomposed.dequantize_per_channel(value, scales, zeros, axis, _LOW, _HIGH, torch.int8)

    def coverage(self) -> dict[str, Any]:
        """Of the Conv, Gemm and MatMul nodes, how many have int8 operands; why the others have not."""
        left, quantized = [], 0
        for node in self.graph.nodes:
            if node.operator not in PRODUCTS:
                continue
            if self._kernels[node.name] != "float":
                quantized += 1
            else:
                why = "its weight or activation is not quantized in the file" if self.weights else UNQUANTIZED
                left.append({"name": node.name, "operator": node.operator, "reason": why})
        return {"quantized": quantized, "left_float": left}


def _as_int8(array: Any, weight: bool) -> Any:
    """uint8 weights as int8, shifted by 128 as their zero points are."""
    if weight and array.dtype == np.uint8:
        return (array.astype(np.int16) - 128).astype(np.int8)
    return np.array(array, order="C")  # np.ascontiguousarray would make a scalar a vector


def quantized_at_run_time(value: Tensor) -> Tensor:
    """int8 with a scale of this very tensor, and back: what XNNPACK's dynamic kernels recognise (PT2E's form)."""
    scale, zero = _decomposed.choose_qparams.tensor(value, _LOW, _HIGH, _SMALLEST_SCALE, torch.int8)
    stored = _decomposed.quantize_per_tensor.tensor(value, scale, zero, _LOW, _HIGH, torch.int8)
    return _decomposed.dequantize_per_tensor.tensor(stored, scale, zero, _LOW, _HIGH, torch.int8)


Operator = Callable[[OnnxModule, Node, list[Any]], Any]
OperatorTable = Mapping[str, Operator]
