"""Gelu as one node: ``x * (1 + erf(x / sqrt(2))) / 2`` in the forms that exporters write it.

Below opset 20 ONNX has no Gelu, and the mobile runtimes have no Erf. Source of the function: Hendrycks and Gimpel,
"Gaussian Error Linear Units", 2016.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from targets.static_graph import DEQUANTIZE, Graph, Node, pruned

_CLOSE = 1e-4  # relative: constants are rounded to float32 or bfloat16 by exporters


def with_gelu(graph: Graph) -> Graph:
    """``graph`` with every Erf chain of this form replaced; others stay as they are."""
    makers, readers = graph.makers(), graph.consumers()
    ends: dict[str, Node] = {}
    gone: set[str] = set()
    for node in graph.nodes:
        if node.operator != "Erf":
            continue
        found = _chain(graph, node, makers, readers)
        if found is not None:
            last, source, inner = found
            ends[last.name] = Node("Gelu", last.name, (source,), last.outputs)
            gone |= inner
    if not ends:
        return graph
    nodes = tuple(ends.get(node.name, node) for node in graph.nodes if node.name not in gone)
    return pruned(replace(graph, nodes=nodes))


def _chain(
    graph: Graph, erf: Node, makers: Mapping[str, Node], readers: Mapping[str, list[Node]]
) -> tuple[Node, str, set[str]] | None:
    """The last node of the chain around ``erf``, its x, and the names of the other nodes."""
    scaled = makers.get(erf.input(0))
    source = _times(graph, scaled, 1 / math.sqrt(2)) if scaled is not None else None
    plus = _only_reader(erf, readers)
    if scaled is None or source is None or plus is None or plus.operator != "Add" or not _has(graph, plus, 1.0):
        return None
    product = _only_reader(plus, readers)
    if product is None or product.operator != "Mul":
        return None
    other = next((name for name in product.inputs if name != plus.outputs[0]), "")
    inner = {scaled.name, erf.name, plus.name}
    if _same(makers, other, source):
        half = _only_reader(product, readers)
        if half is None or _times(graph, half, 0.5) != product.outputs[0]:
            return None
        return half, source, inner | {product.name}
    before = makers.get(other)
    halved = _times(graph, before, 0.5) if before is not None else None
    if before is not None and halved and _same(makers, halved, source) and _only_reader(before, readers) is product:
        return product, source, inner | {before.name}
    return None


def _same(makers: Mapping[str, Node], first: str, second: str) -> bool:
    """One tensor, or two DequantizeLinear of one: ONNX Runtime's optimiser gives some readers one of their own."""
    one, other = makers.get(first), makers.get(second)
    alike = one is not None and other is not None and (one.operator, one.inputs) == (other.operator, other.inputs)
    return first == second or (alike and one is not None and one.operator == DEQUANTIZE)


def _only_reader(node: Node, readers: Mapping[str, list[Node]]) -> Node | None:
    found = readers.get(node.outputs[0], [])
    return found[0] if len(found) == 1 else None


def _value(graph: Graph, name: str) -> float | None:
    array = graph.constants.get(name)
    return float(np.squeeze(array)) if array is not None and array.size == 1 else None


def _has(graph: Graph, node: Node, wanted: float) -> bool:
    return any(_near(_value(graph, name), wanted) for name in node.inputs)


def _near(value: float | None, wanted: float) -> bool:
    return value is not None and abs(value - wanted) <= _CLOSE * abs(wanted)


def _times(graph: Graph, node: Node, factor: float) -> str | None:
    """The other operand where ``node`` multiplies by ``factor`` (or divides by its inverse)."""
    if node.operator == "Div" and _near(_value(graph, node.input(1)), 1 / factor):
        return node.input(0)
    if node.operator == "Mul":
        for name, other in (node.inputs, node.inputs[::-1]):
            if _near(_value(graph, name), factor):
                return other
    return None
