"""Mask constants: -1e9 or the lowest float32, added to attention scores so that a softmax gives 0 there.

In a narrower format they become -infinity, and a row that is masked everywhere becomes NaN. Behind a softmax -1e4 gives
the same zeros, so the constant is changed where nothing but softmaxes can tell.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from compressor.quantize.weights.stream import reads

MASKED = -1e4  # a float16 number with room below; scores of up to thousands still vanish beside it
CARRIES = {"Add", "Cast", "Concat", "Expand", "Gather", "Identity", "Mul", "Reshape", "Slice", "Squeeze", "Sub", "Tile",
           "Transpose", "Unsqueeze", "Where"}  # fmt: skip
ENDS = {"Softmax", "LogSoftmax"}


def tame(model: ModelProto, largest: float) -> Iterator[tuple[str, str, float, str, str]]:
    """Change mask constants below ``-largest`` in place. Yields (node, operator, value, what, fix) for each reader."""
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in reads(node):
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in model.graph.output}
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            continue
        array = numpy_helper.to_array(tensor)
        low = float(array.min(initial=0))
        if not -np.inf < low < -largest or array.max(initial=0) > largest:
            continue
        if not _only_softmaxes(tensor.name, readers, outputs):
            continue
        tensor.CopyFrom(numpy_helper.from_array(np.maximum(array, np.float32(MASKED)), tensor.name))
        for node in readers.get(tensor.name, []):
            what = f"reads the mask constant `{tensor.name}` of {low:.3g}, which the format cannot hold"
            yield node.name, node.op_type, low, what, f"constant set to {MASKED:g}"


def _only_softmaxes(name: str, readers: dict[str, list[NodeProto]], outputs: set[str]) -> bool:
    pending, known, ends = [name], {name}, 0
    while pending:
        current = pending.pop()
        if current in outputs:
            return False
        for node in readers.get(current, []):
            if node.op_type in ENDS:
                ends += 1
            elif node.op_type not in CARRIES:
                return False
            else:
                fresh = [out for out in node.output if out not in known]
                known.update(fresh)
                pending += fresh
    return ends > 0
