"""Kernel coverage: of the Conv, Gemm and MatMul nodes that a runtime really runs, how many run in an int8 kernel.

Read from the graph that ONNX Runtime saves after its own optimisation. A quantized file whose heavy nodes stay float
behind DequantizeLinear, or run as ConvInteger, is slower than the float file; here is where that shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from targets.base import UNQUANTIZED, Coverage, NodeFact

# Integer kernels of ONNX Runtime's CPU provider for weighted nodes (docs/ContribOperators.md and the ONNX standard).
QUANTIZED = frozenset(
    {
        "QLinearConv",
        "QLinearMatMul",
        "QGemm",
        "MatMulInteger",
        "MatMulInteger16",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "QAttention",
        "MatMulNBits",
        "GatherBlockQuantized",
        "DynamicQuantizeLSTM",
    }
)
FLOAT = frozenset(
    {
        "Conv",
        "FusedConv",
        "NhwcFusedConv",
        "ConvTranspose",
        "Gemm",
        "FusedGemm",
        "MatMul",
        "FusedMatMul",
        "FusedMatMulActivation",
        "GemmFastGelu",
        "TransposeMatMul",
        "Attention",
        "MultiHeadAttention",
        "PackedAttention",
        "LSTM",
        "GRU",
        "RNN",
    }
)
# Quantized in name only: on the CPU provider ConvInteger took 4 to 10 times as long as the float Conv (digits
# MobileNetV2 and ResNet, ONNX Runtime 1.31, x86 with VNNI, one thread), so it counts as not covered.
SLOW_INTEGER = {"ConvInteger": "dynamic quantization of a convolution: ConvInteger is slower than the float kernel"}
QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})


@dataclass(frozen=True)
class _Scope:
    """What a graph knows of its tensors: who makes them, and which are stored."""

    makers: dict[str, Any]
    stored: frozenset[str]

    def maker(self, tensor: str) -> str:
        """Operator that makes a tensor, seen through shape changes; empty for inputs and stored tensors."""
        node = self.makers.get(tensor)
        while node is not None and node.op_type in {"Transpose", "Reshape", "Cast", "Identity", "Squeeze", "Unsqueeze"}:
            tensor = node.input[0]
            node = self.makers.get(tensor)
        return "" if node is None else str(node.op_type)

    def constant(self, tensor: str) -> bool:
        """Is it stored, or made from stored tensors by one DequantizeLinear or shape change?"""
        node = self.makers.get(tensor)
        while node is not None and node.op_type in {"Transpose", "Reshape", "Cast", "Identity", "DequantizeLinear"}:
            tensor = node.input[0]
            node = self.makers.get(tensor)
        return tensor in self.stored or (node is not None and node.op_type == "Constant")


def kernel_coverage(model: Any) -> Coverage:
    """Coverage of an optimised ``onnx.ModelProto``, nested graphs (If, Loop) included."""
    scopes = list(_graphs(model.graph))
    quantized_file = any(
        node.op_type in QUANTIZERS | QUANTIZED | set(SLOW_INTEGER) for graph, _ in scopes for node in graph.node
    )
    total = covered = 0
    left: list[NodeFact] = []
    for graph, scope in scopes:
        for node in graph.node:
            if node.op_type in QUANTIZED:
                total, covered = total + 1, covered + 1
            elif node.op_type in FLOAT or node.op_type in SLOW_INTEGER:
                total += 1
                left.append(_left(node, scope, quantized_file))
    return Coverage(quantized=covered, total=total, left_float=tuple(left))


def coverage_of_run(ran: Iterable[tuple[str, str]], file: Any) -> Coverage:
    """Coverage of the nodes (name, operator) that a runtime's profiler saw; ``file`` is the ``onnx.ModelProto`` that it
    was given, from which come the reasons: a node that a runtime does not fuse keeps its name.
    """
    given = kernel_coverage(file)
    reasons = {fact.name: fact.reason for fact in given.left_float}
    weighted = QUANTIZED | FLOAT | set(SLOW_INTEGER)
    heavy = [(name, kind) for name, kind in ran if kind in weighted]
    whole_file = {fact.reason for fact in given.left_float} == {UNQUANTIZED}
    other = UNQUANTIZED if whole_file else "the runtime made a float kernel of it"
    left = tuple(
        NodeFact(name, kind, False, SLOW_INTEGER.get(kind) or reasons.get(name, other))
        for name, kind in heavy
        if kind not in QUANTIZED
    )
    return Coverage(quantized=len(heavy) - len(left), total=len(heavy), left_float=left)


def node_count(model: Any) -> int:
    """All nodes, nested graphs included."""
    return sum(len(graph.node) for graph, _ in _graphs(model.graph))


def explain(coverage: Coverage, most: int = 2) -> str:
    """One clause for people: how many nodes stay float and the commonest reasons; empty when none does.

    >>> explain(Coverage(1, 3, (NodeFact("a", "Conv", False, "why"), NodeFact("b", "Conv", False, "why"))))
    '2 of 3 Conv/Gemm/MatMul do not run quantized (2: why)'
    """
    if not coverage.left_float:
        return ""
    reasons = Counter(fact.reason for fact in coverage.left_float).most_common(most)
    told = "; ".join(f"{count}: {reason}" for reason, count in reasons)
    return f"{len(coverage.left_float)} of {coverage.total} Conv/Gemm/MatMul do not run quantized ({told})"


def _graphs(graph: Any, outer: _Scope | None = None) -> Iterator[tuple[Any, _Scope]]:
    makers = dict(outer.makers) if outer else {}
    makers.update({output: node for node in graph.node for output in node.output})
    stored = {tensor.name for tensor in graph.initializer} | (outer.stored if outer else frozenset())
    scope = _Scope(makers, frozenset(stored))
    yield graph, scope
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g, scope)
            for inner in attribute.graphs:
                yield from _graphs(inner, scope)


def _left(node: Any, scope: _Scope, quantized_file: bool) -> NodeFact:
    reason = SLOW_INTEGER.get(node.op_type) or _why_float(node, scope, quantized_file)
    return NodeFact(name=node.name or node.output[0], operator=node.op_type, quantized=False, reason=reason)


def _why_float(node: Any, scope: _Scope, quantized_file: bool) -> str:
    if not quantized_file:
        return UNQUANTIZED
    if node.op_type in {"Attention", "MultiHeadAttention", "PackedAttention", "LSTM", "GRU", "RNN"}:
        return f"{node.op_type} has no quantized form in this file"
    activation, weight = node.input[0], node.input[1] if len(node.input) > 1 else ""
    if not scope.constant(weight) and not scope.constant(activation):
        return "both operands are computed: there is no weight to quantize"
    if scope.maker(weight) == "DequantizeLinear":
        if scope.maker(activation) != "DequantizeLinear":
            return "reads its weight through DequantizeLinear at run time: its activation is not quantized"
        return "reads its weight through DequantizeLinear at run time: the runtime has no int8 kernel for this pattern"
    if scope.maker(activation) == "DequantizeLinear":
        return "its weight is not quantized, its activation is: the quantizer left it out"
    return "not selected by the quantizer"
