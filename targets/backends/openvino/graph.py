"""What OpenVINO's CPU plugin really runs: nodes, their kernels' precision, kernel coverage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from targets.base import UNQUANTIZED, Coverage, NodeFact

# layerType of weighted nodes in the execution graph of the CPU plugin (intel_cpu/src/cpu_types.cpp). `Subgraph` holds
# element-wise code that was compiled just in time, no products.
WEIGHTED = frozenset({"Convolution", "Deconvolution", "FullyConnected", "MatMul", "LSTMSequence", "GRUSequence"})
INT8 = frozenset({"i8", "u8"})
IGNORED = frozenset({"Const", "Input", "Output"})


def execution_nodes(compiled_model: Any) -> Iterator[tuple[str, str, str]]:
    """(name, layer type, precision of its kernel) of every node of the execution graph, in order."""
    for node in compiled_model.get_runtime_model().get_ops():
        facts = node.get_rt_info()
        yield str(node.friendly_name), facts["layerType"].astype(str), facts["runtimePrecision"].astype(str)


def coverage(nodes: list[tuple[str, str, str]], quantized_file: bool) -> Coverage:
    """Of the weighted nodes, how many run in an int8 kernel."""
    weighted = [node for node in nodes if node[1] in WEIGHTED]
    why = "OpenVINO runs it in {} although the file is quantized" if quantized_file else UNQUANTIZED
    left = tuple(
        NodeFact(name, layer, False, why.format(precision))
        for name, layer, precision in weighted
        if precision not in INT8
    )
    return Coverage(quantized=len(weighted) - len(left), total=len(weighted), left_float=left)


def node_count(nodes: list[tuple[str, str, str]]) -> int:
    """Operations that are executed; constants and parameters are none."""
    return sum(layer not in IGNORED for _, layer, _ in nodes)
