"""What a float16 or bfloat16 file computes, as a float32 file.

ONNX Runtime's processor kernels know bfloat16 only in casts. A float16 file it runs in float32, and drops the casts
between two such nodes: what overflows on a device is a fine number there. Here every value that the file holds in the
narrow format is rounded to it and widened again; sums inside an operator stay float32, as matrix units keep them.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from compressor.quantize.floats.formats import FloatFormat


def emulated(model: ModelProto, half: Collection[str], to: FloatFormat) -> ModelProto:
    """``model`` and the names of its narrow tensors (of :func:`compressor.quantize.floats.convert.convert`), with
    rounding in place of narrow values."""
    made = ModelProto()
    made.CopyFrom(model)
    for tensor in made.graph.initializer:
        if tensor.data_type == to.tensor:
            wide = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
    nodes: list[NodeProto] = []
    for node in made.graph.node:
        nodes += _rounded(node, half, to)
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    return made


def _rounded(node: NodeProto, half: Collection[str], to: FloatFormat) -> list[NodeProto]:
    """The node in float32, and the rounding of what it makes."""
    for item in node.attribute:
        if node.op_type == "Cast" and item.name == "to" and item.i == to.tensor:
            item.i = TensorProto.FLOAT
        if item.name == "value" and item.t.data_type == to.tensor:
            wide = numpy_helper.to_array(item.t).astype(np.float32)
            item.t.CopyFrom(numpy_helper.from_array(wide, item.t.name))
    after = [node]
    for position, name in enumerate(node.output):
        if name not in half:
            continue
        node.output[position] = f"{name}_wide"
        after.append(helper.make_node("Cast", [f"{name}_wide"], [f"{name}_narrow"], f"{name}_round", to=to.tensor))
        after.append(helper.make_node("Cast", [f"{name}_narrow"], [name], f"{name}_widen", to=TensorProto.FLOAT))
    return after
