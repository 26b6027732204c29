"""Hold a quantized file against a target's rules before its compiler sees it: every finding names the node."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto

from compressor.errors import Problem
from compressor.models.onnx_graph import all_graphs, constants, opset_of
from compressor.profile import QuantizationRules
from compressor.types import Array

NAMES = {
    TensorProto.UINT8: "uint8",
    TensorProto.INT8: "int8",
    TensorProto.UINT16: "uint16",
    TensorProto.INT16: "int16",
    TensorProto.INT32: "int32",
    TensorProto.INT4: "int4",
    TensorProto.UINT4: "uint4",
}
PAIRS = ("QuantizeLinear", "DequantizeLinear")
RUN_TIME = ("DynamicQuantizeLinear", "ConvInteger", "MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat")
FULL_INTEGER = ("QLinearConv", "QLinearMatMul", "QLinearAdd", "QGemm", "QAttention")
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
SEVEN_BITS = 64  # magnitude; two products of 255 x 64 fit into 16 bits


def lint(model: ModelProto, rules: QuantizationRules) -> tuple[Problem, ...]:
    """What the target refuses, or computes wrongly, in this file; empty: nothing known. A float file passes."""
    found: list[Problem] = []
    quantized = False
    outer: Mapping[str, TensorProto] = constants(model.graph)
    for _, graph in all_graphs(model.graph):
        fixed = {**outer, **constants(graph)}
        users: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                users.setdefault(name, []).append(node)
        for node in graph.node:
            if node.op_type in (*PAIRS, *RUN_TIME, *FULL_INTEGER):
                quantized = True
                found += [Problem(f"`{_name(node)}`", what) for what in _node(node, fixed, users, rules)]
    if quantized and rules.opset is not None and opset_of(model) < rules.opset:
        what = f"Erf is what Gelu is written with below opset {rules.opset}; the target leaves it to the CPU"
        nodes = (node for _, graph in all_graphs(model.graph) for node in graph.node)
        found += [Problem(f"`{_name(node)}`", what) for node in nodes if node.op_type == "Erf"]
    return tuple(found)


def _name(node: NodeProto) -> str:
    return str(node.name or node.output[0])


def _node(
    node: NodeProto, fixed: Mapping[str, TensorProto], users: Mapping[str, list[NodeProto]], rules: QuantizationRules
) -> Iterator[str]:
    if not rules.int8:
        yield "is quantized; the target takes no int8"
    elif node.op_type in RUN_TIME:
        if not rules.dynamic:
            yield f"{node.op_type} quantizes at run time, for which the target has no kernels"
    elif node.op_type in FULL_INTEGER:
        if not rules.dynamic:
            yield f"{node.op_type} is an operator of ONNX Runtime; the target reads quantize-dequantize pairs"
    elif node.input[0] in fixed:
        yield from _stored(node, fixed, users, rules)
    else:
        yield from _activation(node, fixed, rules)


def _stored(
    node: NodeProto, fixed: Mapping[str, TensorProto], users: Mapping[str, list[NodeProto]], rules: QuantizationRules
) -> Iterator[str]:
    """A DequantizeLinear of a weight, table or bias."""
    tensor = fixed[node.input[0]]
    kind = NAMES.get(tensor.data_type, "float32")
    if kind == "int32":
        if not rules.quantize_bias:
            yield "dequantizes an int32 bias, which the target's parser refuses"
        return
    if kind in ("int4", "uint4"):
        return
    if rules.weighted_only and not tensor.dims:
        yield "dequantizes a stored scalar, which the target's compiler refuses; it takes a vector of one"
    readers = {user.op_type for user in users.get(node.output[0], []) if user.op_type in WEIGHTED}
    if readers and kind not in (rules.weight, "float32"):
        yield f"its weight is {kind}, the target takes {rules.weight}"
    if ((readers and rules.weight == "int8") or rules.symmetric_activation) and _shifted(node, fixed):
        yield "its weight has a zero point other than 0"
    if not rules.per_channel and _scales(node, fixed) > 1:
        yield f"its weight has {_scales(node, fixed)} scales, the target takes one per tensor"
    if rules.reduce_range and readers and kind == "int8" and _peak(tensor) > SEVEN_BITS:
        yield f"its weight reaches {_peak(tensor)}: without VNNI sums of two products leave 16 bits beyond {SEVEN_BITS}"


def _activation(node: NodeProto, fixed: Mapping[str, TensorProto], rules: QuantizationRules) -> Iterator[str]:
    zero = fixed.get(node.input[2]) if len(node.input) > 2 else None
    kind = "uint8" if zero is None else NAMES.get(zero.data_type, "another type")
    if kind != rules.activation and kind != rules.weight:
        yield f"quantizes an activation to {kind}, the target takes {rules.activation}"
    if rules.symmetric_activation and _shifted(node, fixed):
        yield "quantizes an activation with a zero point other than 0, the target takes symmetric ones only"


def _array(tensor: TensorProto) -> Array:
    from onnx import numpy_helper

    made: Array = numpy_helper.to_array(tensor)
    return made


def _shifted(node: NodeProto, fixed: Mapping[str, TensorProto]) -> bool:
    zero = fixed.get(node.input[2]) if len(node.input) > 2 else None
    return zero is not None and bool(np.any(_array(zero).astype(np.int64)))


def _scales(node: NodeProto, fixed: Mapping[str, TensorProto]) -> int:
    scale = fixed.get(node.input[1])
    return 1 if scale is None else int(_array(scale).size)


def _peak(tensor: TensorProto) -> int:
    return int(np.abs(_array(tensor).astype(np.int32)).max(initial=0))
