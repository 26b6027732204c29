"""A file whose exits are outputs becomes one that stops at the first exit that is sure enough (methods E1).

What an exit needs stays in the graph; everything behind it moves into the else-branch of an ``If``, which runs only
where the largest softmax probability of some sample of the batch is below the threshold. Samples that were sure keep
their exit's answer whatever the others do, so that answers do not depend on the batch; at batch 1 the If is the exit.
Works on any ONNX file, quantized ones included. Neither torch nor training is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from compressor.errors import StageError
from compressor.models.onnx_graph import opset_of, subgraphs

EXIT = "exit"  # output: which exit each sample took, int64 (batch,); the last number is the end of the model
LEAST_OPSET = 18  # reductions take their axes as an input


@dataclass
class _Parts:
    """What belongs to each level: 0 is computed always, level k only where exit k - 1 was not sure."""

    nodes: list[list[NodeProto]]
    weights: list[list[TensorProto]] = field(default_factory=list)


def early_exit(model: ModelProto, exits: Sequence[str], threshold: float) -> ModelProto:
    """``model`` with its first output and ``exit``; ``exits`` names its exits' outputs, shallowest first.

    Args:
        model: outputs logits (batch, classes) first, and those of the exits.
        threshold: a sample leaves at the first exit whose largest softmax probability is at least this.

    Raises:
        StageError: an output is missing, or the file is older than opset 18.
    """
    known = [value.name for value in model.graph.output]
    absent = [name for name in exits if name not in known[1:]]
    if absent or not exits:
        raise StageError(
            f"the file has no exits `{', '.join(absent) or '-'}`", hint=f"Its outputs: {', '.join(known)}."
        )
    if opset_of(model) < LEAST_OPSET:
        raise StageError(
            f"early exits need opset {LEAST_OPSET}, the file has {opset_of(model)}", hint="Export it again."
        )
    order = [*exits, known[0]]
    parts = _parts(model.graph, order)
    made = ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    for name in ("node", "initializer", "value_info"):
        graph.ClearField(name)
    first = model.graph.output[0]
    _fill(graph, parts, 0, order, threshold, (known[0], f"{known[0]}_at_the_end"))
    results = _results(0)
    graph.node.append(helper.make_node("Identity", [results[0]], [known[0]], name="early_exit_output"))
    graph.node.append(helper.make_node("Identity", [results[1]], [EXIT], name="early_exit_number"))
    del graph.output[:]
    batch = first.type.tensor_type.shape.dim[0]
    number = helper.make_tensor_value_info(EXIT, TensorProto.INT64, [batch.dim_param or batch.dim_value or "batch"])
    graph.output.extend([first, number])
    onnx.checker.check_model(made)
    return made


def chosen(exits: Sequence[np.ndarray], final: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """What the file answers: logits (N, C) of each sample's exit, and its number (N,), int64."""
    answer, number = final.copy(), np.full(len(final), len(exits), np.int64)
    for position in reversed(range(len(exits))):
        sure = confidence(exits[position]) >= np.float32(threshold)
        answer[sure], number[sure] = exits[position][sure], position
    return answer, number


def confidence(logits: np.ndarray) -> np.ndarray:
    """Largest softmax probability, float32: (N, C) -> (N,)."""
    shifted = np.exp(logits.astype(np.float32) - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted.max(axis=-1) / shifted.sum(axis=-1), np.float32)


def _parts(graph: GraphProto, order: Sequence[str]) -> _Parts:
    """Nodes by the first exit that needs them, in their order; weights where the first of their readers is."""
    found = _own_dequantize(list(graph.node))
    makers = {name: node for node in found for name in node.output}
    level: dict[int, int] = {}
    for number, output in enumerate(order):
        pending = [output]
        while pending:
            node = makers.get(pending.pop())
            if node is not None and id(node) not in level:
                level[id(node)] = number
                pending += _reads(node)
    nodes: list[list[NodeProto]] = [[] for _ in order]
    readers: dict[str, int] = {}
    for node in found:
        if (number := level.get(id(node), -1)) >= 0:
            nodes[number].append(node)
            for name in _reads(node):
                readers[name] = min(number, readers.get(name, number))
    weights: list[list[TensorProto]] = [[] for _ in order]
    for tensor in graph.initializer:
        if tensor.name in readers:
            weights[readers[tensor.name]].append(tensor)
    return _Parts(nodes, weights)


def _own_dequantize(nodes: Sequence[NodeProto]) -> list[NodeProto]:
    """``nodes`` with a DequantizeLinear for every reader of one.

    A runtime makes an integer kernel of a layer only with the pairs around it in the same graph: what is read on both
    sides of an exit crosses it as integers, and is dequantized again behind it.
    """
    dequantize = {node.output[0]: node for node in nodes if node.op_type == "DequantizeLinear"}
    readers: dict[str, int] = {}
    made: list[NodeProto] = []
    for node in nodes:
        copy = NodeProto()
        copy.CopyFrom(node)
        for place, name in enumerate(copy.input):
            if (maker := dequantize.get(name)) is None:
                continue
            count = readers[name] = readers.get(name, 0) + 1
            if count > 1:
                own = NodeProto()
                own.CopyFrom(maker)
                own.name, own.output[0] = f"{maker.name}_{count}", f"{name}_{count}"
                made.append(own)
                copy.input[place] = own.output[0]
        made.append(copy)
    return made


def _reads(node: NodeProto) -> list[str]:
    """Every tensor that a node reads, from inside its own branches too."""
    inner = [name for graph in subgraphs(node) for child in graph.node for name in _reads(child)]
    return [name for name in [*node.input, *inner] if name]


def _results(level: int) -> tuple[str, str]:
    return f"early_exit_{level}_answer", f"early_exit_{level}_number"


def _fill(
    graph: GraphProto, parts: _Parts, level: int, order: Sequence[str], threshold: float, final: tuple[str, str]
) -> None:
    """Put a level's nodes into ``graph``, and the next level into the else-branch of its If.

    ``final``: the model's own output, and its name inside.
    """
    for node in parts.nodes[level]:
        copy = NodeProto()
        copy.CopyFrom(node)
        for names in (copy.input, copy.output):
            for place, name in enumerate(names):
                names[place] = final[1] if name == final[0] else name
        graph.node.append(copy)
    graph.initializer.extend(parts.weights[level])
    mark, (answer, number) = f"early_exit_{level}", _results(level)
    logits = final[1] if order[level] == final[0] else order[level]
    graph.initializer.append(numpy_helper.from_array(np.array(level, np.int64), f"{mark}_position"))
    if level == len(order) - 1:
        zeros = f"early_exit_{level - 1}_zeros"
        graph.node.append(helper.make_node("Identity", [logits], [answer], name=f"{mark}_end"))
        graph.node.append(helper.make_node("Add", [zeros, f"{mark}_position"], [number], name=f"{mark}_count"))
        return
    graph.initializer.append(numpy_helper.from_array(np.array(threshold, np.float32), f"{mark}_threshold"))
    graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), f"{mark}_axis"))
    graph.node.extend(_condition(mark, logits))
    on = GraphProto(name=f"{mark}_goes_on")
    _fill(on, parts, level + 1, order, threshold, final)
    _give(on, mark, logits, _results(level + 1))
    off = GraphProto(name=f"{mark}_leaves")
    off.node.append(helper.make_node("Identity", [logits], [f"{mark}_left_answer"], name=f"{mark}_left"))
    off.node.append(
        helper.make_node(
            "Add", [f"{mark}_zeros", f"{mark}_position"], [f"{mark}_left_number"], name=f"{mark}_left_count"
        )
    )
    off.output.extend(_described(f"{mark}_left_answer", f"{mark}_left_number"))
    branches = {"then_branch": off, "else_branch": on}
    graph.node.append(helper.make_node("If", [f"{mark}_all"], [answer, number], name=f"{mark}_if", **branches))


def _condition(mark: str, logits: str) -> list[NodeProto]:
    """Which samples are sure (batch, 1), whether all are, and a zero for each (batch,)."""
    axis, threshold, largest = f"{mark}_axis", f"{mark}_threshold", f"{mark}_largest"
    return [
        helper.make_node("Softmax", [logits], [f"{mark}_probability"], name=f"{mark}_softmax", axis=-1),
        helper.make_node("ReduceMax", [f"{mark}_probability", axis], [largest], name=f"{mark}_max", keepdims=1),
        helper.make_node("GreaterOrEqual", [largest, threshold], [f"{mark}_sure"], name=f"{mark}_compare"),
        helper.make_node("ReduceMin", [largest], [f"{mark}_least"], name=f"{mark}_min", keepdims=0),
        helper.make_node("GreaterOrEqual", [f"{mark}_least", threshold], [f"{mark}_all"], name=f"{mark}_compare_all"),
        helper.make_node("Squeeze", [f"{mark}_sure", axis], [f"{mark}_flat"], name=f"{mark}_squeeze"),
        helper.make_node("Cast", [f"{mark}_flat"], [f"{mark}_ones"], name=f"{mark}_cast", to=TensorProto.INT64),
        helper.make_node("Sub", [f"{mark}_ones", f"{mark}_ones"], [f"{mark}_zeros"], name=f"{mark}_clear"),
    ]


def _give(graph: GraphProto, mark: str, logits: str, deeper: tuple[str, str]) -> None:
    """What goes on answers with the deeper result, but for the samples that were sure already."""
    answer, number = f"{mark}_on_answer", f"{mark}_on_number"
    graph.node.extend(
        [
            helper.make_node("Where", [f"{mark}_sure", logits, deeper[0]], [answer], name=f"{mark}_choose"),
            helper.make_node(
                "Where", [f"{mark}_flat", f"{mark}_position", deeper[1]], [number], name=f"{mark}_choose_number"
            ),
        ]
    )
    graph.output.extend(_described(answer, number))


def _described(answer: str, number: str) -> list[onnx.ValueInfoProto]:
    return [
        helper.make_tensor_value_info(answer, TensorProto.FLOAT, [None, None]),
        helper.make_tensor_value_info(number, TensorProto.INT64, [None]),
    ]


__all__ = ["EXIT", "chosen", "confidence", "early_exit"]
