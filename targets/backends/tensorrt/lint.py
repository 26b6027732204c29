"""Find what TensorRT would refuse, or silently get wrong, before it is asked: every finding names the node.

The rules come from builds with TensorRT-RTX 1.7.1.116 (`docs/targets/tensorrt.md`). One of them guards against a
wrong answer and not against an error: a uint8 QuantizeLinear with zero point 0 is accepted and computed as int8,
which clips at 127.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compressor.errors import CompileError, sdk_errors
from targets.backends.tensorrt.layers import WEIGHTED, WeightedNode

_STANDARD_DOMAINS = frozenset({"", "ai.onnx", "trt.plugins"})
_INTEGER_OPERATORS = frozenset(
    {"ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul"}
)
_NOT_IN_RTX = frozenset({"NonMaxSuppression"})  # parsed, but no kernel implements it
_REFUSED_OPERATORS = frozenset({"Unique"})
_SHOWN = 4  # nodes named per refusal
_MATRIX = frozenset({"Gemm", "MatMul"})
# Smallest compute capability (times ten) of a data type, from the builder's own refusals.
_SMALLEST_CAPABILITY = {"BFLOAT16": 80, "INT4": 80, "UINT4": 80, "FLOAT8E4M3FN": 89, "FLOAT4E2M1": 100}
_SYMMETRIC_INT8 = "quantize with symmetric int8 activations and weights and without bias quantization"


@dataclass(frozen=True)
class Graph:
    """An ONNX file with what the rules need: all nodes (also of subgraphs), constants, and inferred element types."""

    model: Any
    nodes: tuple[Any, ...]
    constants: Mapping[str, Any]  # name -> TensorProto
    types: Mapping[str, str]  # value -> name of its TensorProto type

    @property
    def weighted(self) -> tuple[WeightedNode, ...]:
        """Conv, Gemm and MatMul that are computed at run time, named as TensorRT's parser names them."""
        return tuple(
            WeightedNode(parser_name(node), node.op_type)
            for node in self.nodes
            if node.op_type in WEIGHTED and not all(name in self.constants for name in node.input if name)
        )


def parser_name(node: Any) -> str:
    """TensorRT's name of a node; one without a name is called after its first output."""
    return str(node.name) or f"node_of_{node.output[0]}"


def load_graph(path: Path) -> Graph:
    """Read and check a model. Raises :class:`CompileError` for bytes that are no valid ONNX model."""
    import onnx

    with sdk_errors(
        CompileError, f"read `{path.name}` as an ONNX model", hint="The file is damaged or is no ONNX model."
    ):
        onnx.checker.check_model(str(path))  # by path: also checks that external data stays in its folder
        model = onnx.load(str(path))
    nodes = tuple(_walk(model.graph))
    return Graph(model, nodes, _constants(model.graph, nodes), _types(model))


def _walk(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _walk(attribute.g)
            for inner in attribute.graphs:
                yield from _walk(inner)


def _constants(graph: Any, nodes: tuple[Any, ...]) -> dict[str, Any]:
    found = {tensor.name: tensor for tensor in graph.initializer}
    for node in nodes:
        if node.op_type == "Constant":
            found.update((node.output[0], attribute.t) for attribute in node.attribute if attribute.name == "value")
    return found


def _types(model: Any) -> dict[str, str]:
    import onnx

    name_of = onnx.TensorProto.DataType.Name
    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
    except (ValueError, RuntimeError, onnx.shape_inference.InferenceError):  # over 2 GiB or unknown operators
        graph = model.graph
    values = [*graph.input, *graph.value_info, *graph.output]
    types = {
        value.name: name_of(value.type.tensor_type.elem_type) for value in values if value.type.HasField("tensor_type")
    }
    types.update({tensor.name: name_of(tensor.data_type) for tensor in graph.initializer})
    return types


def problems(graph: Graph, *, capability: int, flavour: str) -> tuple[str, ...]:
    """Everything known to be refused for this compute capability (8.9 -> 89), in words that name the node."""
    local = {function.domain for function in graph.model.functions}
    found: dict[tuple[str, str], list[str]] = {}  # operator, refusal -> names of nodes
    for node in graph.nodes:
        refusals = [*_operator(node, local, flavour), *_types_too_new(node, graph, capability)]
        if node.op_type in {"QuantizeLinear", "DequantizeLinear"}:
            refusals += _quantization(node, graph)
        if flavour == "rtx" and capability == 75 and node.op_type in _MATRIX and _reads(node, graph) == "FLOAT":
            refusals.append("TensorRT-RTX has no fp32 matrix multiplication for SM75; export it in fp16")
        for refusal in refusals:
            found.setdefault((node.op_type, refusal), []).append(parser_name(node))
    return tuple(f"{operator} {_listed(names)}: {refusal}" for (operator, refusal), names in found.items())


def _listed(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _operator(node: Any, local_domains: set[str], flavour: str) -> list[str]:
    if node.op_type in _INTEGER_OPERATORS or node.op_type.startswith("QLinear"):
        return [f"integer and dynamic quantization operators are refused; {_SYMMETRIC_INT8} (QDQ format)"]
    if node.domain not in _STANDARD_DOMAINS and node.domain not in local_domains:
        return [f"operator of domain `{node.domain}` is unknown to TensorRT"]
    if node.op_type in _REFUSED_OPERATORS or (flavour == "rtx" and node.op_type in _NOT_IN_RTX):
        return ["no kernel implements this operator"]
    return []


def _quantization(node: Any, graph: Graph) -> list[str]:
    kind = _quantized_type(node, graph)
    if kind == "INT32":
        return ["int32 input (a quantized bias) is refused; quantize without bias quantization"]
    if kind in {"INT16", "UINT16"}:
        return [f"{kind.lower()} is refused; {_SYMMETRIC_INT8}"]
    if kind == "UINT8":
        return [
            f"uint8 is unsupported (with zero point 0 it would be computed as int8 and clip at 127); {_SYMMETRIC_INT8}"
        ]
    stored = graph.constants.get(node.input[0])
    if stored is not None and not stored.dims:
        return [
            "a quantized scalar is refused (the builder reshapes it before it dequantizes it); store a vector of one"
        ]
    zero_point = graph.constants.get(node.input[2]) if len(node.input) > 2 else None
    if zero_point is not None and kind == "INT8" and np.any(_values(zero_point)):
        return [f"zero point is not 0; {_SYMMETRIC_INT8}"]
    return []


def _values(tensor: Any) -> Any:
    from onnx import numpy_helper

    return numpy_helper.to_array(tensor)


def _quantized_type(node: Any, graph: Graph) -> str:
    """Integer type: of the zero point, else what DequantizeLinear reads or QuantizeLinear writes (default uint8)."""
    if len(node.input) > 2 and node.input[2]:
        tensor = graph.constants.get(node.input[2])
        if tensor is not None:
            return _type_name(tensor.data_type)
        return graph.types.get(node.input[2], "")
    if node.op_type == "DequantizeLinear":
        return graph.types.get(node.input[0], "")
    asked = next((attribute.i for attribute in node.attribute if attribute.name == "output_dtype"), 0)
    return _type_name(asked) if asked else "UINT8"


def _type_name(number: int) -> str:
    import onnx

    return str(onnx.TensorProto.DataType.Name(number))


def _reads(node: Any, graph: Graph) -> str:
    return graph.types.get(node.input[0], "")


def _types_too_new(node: Any, graph: Graph, capability: int) -> list[str]:
    kinds = {graph.types.get(name, "") for name in [*node.input, *node.output]}
    return [
        f"{kind.lower()} needs compute capability {smallest / 10:.1f}, this GPU has {capability / 10:.1f}"
        for kind, smallest in _SMALLEST_CAPABILITY.items()
        if kind in kinds and capability < smallest
    ]
