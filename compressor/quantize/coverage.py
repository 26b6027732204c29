"""Which Conv, Gemm, MatMul and Gather of a model became int8, and why the others did not."""

from __future__ import annotations

from collections.abc import Mapping

from onnx import ModelProto, NodeProto

from compressor.models.onnx_graph import all_graphs, constants
from compressor.types import LayerFact

STAGE = "quantize"
LOOKED_AT = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Gather")
MOVED_ACROSS = ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Flatten", "MaxPool", "Identity")
INTEGER = ("MatMulInteger", "ConvInteger", "QLinearConv", "QLinearMatMul", "QGemm", "MatMulNBits")


def layer_facts(
    source: ModelProto,
    result: ModelProto,
    skip: Mapping[str, str],
    operators: tuple[str, ...] | None,
    precision: str = "int8",
) -> tuple[LayerFact, ...]:
    """One fact per Conv, Gemm, MatMul and Gather from a float table: ``quantized``, or ``left-float`` and why."""
    made = {name: node for node in result.graph.node for name in node.output}
    by_name = {node.name: node for node in result.graph.node}
    integer = {node.name for node in result.graph.node if node.op_type in INTEGER}
    low_bits = {tensor.name for tensor in result.graph.initializer if tensor.data_type in (2, 3)}
    facts = []
    for inside, graph in all_graphs(source.graph):
        fixed = constants(graph)
        for node in graph.node:
            if node.op_type not in LOOKED_AT or (node.op_type == "Gather" and not _float_table(node, fixed)):
                continue
            if not inside and _quantized(node, by_name.get(node.name), made, integer, low_bits):
                facts.append(LayerFact(STAGE, node.name, "quantized", "float32", precision))
            else:
                reason = _reason(node, inside, skip, operators)
                facts.append(LayerFact(STAGE, node.name, "left-float", "float32", "float32", reason))
    return tuple(facts)


def _float_table(node: NodeProto, fixed: Mapping[str, object]) -> bool:
    table = fixed.get(node.input[0])
    return table is not None and getattr(table, "data_type", 0) == 1 and len(getattr(table, "dims", ())) > 1


def _quantized(
    node: NodeProto,
    after: NodeProto | None,
    made: Mapping[str, NodeProto],
    integer: set[str],
    low_bits: set[str],
) -> bool:
    if after is None:  # replaced by integer nodes that carry its name
        return any(name.startswith(f"{node.name}_") for name in integer)
    if node.op_type == "Gather":
        source = made.get(after.input[0])
        return after.input[0] in low_bits or (source is not None and source.op_type == "DequantizeLinear")
    sources = [made.get(name) for name in after.input[:2]]
    return after.op_type in INTEGER or all(s is not None and _dequantizes(s, made) for s in sources)


def _dequantizes(node: NodeProto, made: Mapping[str, NodeProto]) -> bool:
    """A DequantizeLinear, possibly behind operators that runtimes move it across."""
    for _ in range(4):
        if node.op_type == "DequantizeLinear":
            return True
        if node.op_type not in MOVED_ACROSS or node.input[0] not in made:
            return False
        node = made[node.input[0]]
    return False


def _reason(node: NodeProto, inside: str, skip: Mapping[str, str], operators: tuple[str, ...] | None) -> str:
    if inside:
        return f"stands in the nested graph of `{inside}`, which no engine quantizes"
    if node.name in skip:
        return skip[node.name]
    if node.op_type == "Gather":
        return "this variant leaves embedding tables in float"
    if operators is not None and node.op_type not in operators:
        return f"this variant quantizes {', '.join(operators)} only"
    return "the engine found no int8 form for it"
