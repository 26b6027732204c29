"""Transformers as whole int8 graphs, for accelerators on which float beside int8 falls to a slow processor.

Qualcomm's compiler leaves weights that it must dequantize to the CPU; Ethos-U and microcontrollers have no kernel at
all for int8 weights with a float result. So attention's own products, softmax, embeddings and shortcuts become int8
too. Two things differ from a convolutional network: masks would ruin the scale of the scores, and a bias is an operator
of its own, whose sum TFLite's kernels need not round twice.
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx import ModelProto, NodeProto, TensorProto

from compressor.models.onnx_graph import constants

MORE_OPERATORS = ("Gather", "Softmax")  # beside those of a convolutional network
MASKED = "an attention mask (-1e4 or lower) would set the int8 scale of the scores; they are masked in float"
_START = ("MatMul", "Gemm", "Conv", "Gather")
_JOINS = ("Add", "Sub", "Where")


def masked_scores(model: ModelProto) -> dict[str, str]:
    """All between the products that make scores and the softmax, and what makes the mask: node -> reason."""
    made = {name: node for node in model.graph.node for name in node.output}
    found: dict[str, str] = {}
    for softmax in (node for node in model.graph.node if node.op_type == "Softmax"):
        seen: dict[str, NodeProto] = {softmax.name: softmax}
        pending = [softmax]
        while pending:
            for name in pending.pop().input:
                before = made.get(name)
                if before is not None and before.op_type not in _START and before.name not in seen:
                    seen[before.name] = before
                    pending.append(before)
        if any(node.op_type in _JOINS for node in seen.values()):
            found |= dict.fromkeys(seen, MASKED)
    return found


def fold_biases(result: ModelProto, source: ModelProto) -> None:
    """Let every stored vector that is added to a product be a float bias again, and the product's own pair go: the
    target's kernel adds it in 32 bits and rounds once. ``result`` is the quantized form of ``source``."""
    known = {tensor.name for tensor in result.graph.initializer}
    after = {node.name: node for node in result.graph.node}
    for add, product, bias in _added_biases(source):
        node = after.get(add.name)
        if node is None or product.output[0] not in {name for item in result.graph.node for name in item.output}:
            continue
        for position, name in enumerate(add.input):
            node.input[position] = name
        if bias.name not in known:
            result.graph.initializer.append(bias)
            known.add(bias.name)
    _drop_unread(result)


def _added_biases(source: ModelProto) -> Iterator[tuple[NodeProto, NodeProto, TensorProto]]:
    fixed = constants(source.graph)
    made = {name: node for node in source.graph.node for name in node.output}
    reads = [name for node in source.graph.node for name in node.input]
    for node in source.graph.node:
        if node.op_type != "Add":
            continue
        for name, other in (tuple(node.input), tuple(node.input)[::-1]):
            product = made.get(name)
            stored = product is not None and product.op_type == "MatMul" and product.input[1] in fixed
            if stored and other in fixed and len(fixed[other].dims) == 1 and reads.count(name) == 1:
                assert product is not None
                yield node, product, fixed[other]


def _drop_unread(model: ModelProto) -> None:
    """Pairs that nothing reads any more."""
    wanted = {value.name for value in model.graph.output}
    kept: list[NodeProto] = []
    for node in reversed(model.graph.node):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= set(node.input)
    del model.graph.node[:]
    model.graph.node.extend(reversed(kept))
