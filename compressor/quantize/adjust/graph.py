"""Who makes and who reads each tensor of a graph, and weights as arrays that can be replaced."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, numpy_helper

from compressor.types import Array


class Wiring:
    """Lookups over one graph. Arrays that are set replace the initializer of that name in the model."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.made = {name: node for node in model.graph.node for name in node.output}
        self.outputs = {value.name for value in model.graph.output}
        self.users: dict[str, list[NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.users.setdefault(name, []).append(node)
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}

    def array(self, name: str) -> Array | None:
        """A stored float32 tensor; None for computed ones and other types."""
        tensor = self._tensors.get(name)
        return None if tensor is None or tensor.data_type != 1 else numpy_helper.to_array(tensor)

    def set(self, name: str, array: Array) -> None:
        self._tensors[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array, np.float32), name))

    def add(self, name: str, array: Array) -> None:
        tensor = self.model.graph.initializer.add()
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array, np.float32), name))
        self._tensors[name] = tensor

    def only_user(self, name: str) -> NodeProto | None:
        """The one node that reads a tensor; None when several do or when it is an output of the model."""
        users = self.users.get(name, [])
        return users[0] if len(users) == 1 and name not in self.outputs else None

    def own(self, node: NodeProto, position: int) -> bool:
        """Is this input a stored tensor that no other node reads (so that changing it changes this node only)?"""
        if len(node.input) <= position or self.array(node.input[position]) is None:
            return False
        return len(self.users.get(node.input[position], [])) == 1


def attribute(node: NodeProto, name: str, default: int) -> int:
    """An integer attribute."""
    return next((item.i for item in node.attribute if item.name == name), default)


def output_axis(node: NodeProto) -> int:
    """The axis of a weight that counts its output channels (per-channel scales stand along it)."""
    if node.op_type == "Conv" or (node.op_type == "Gemm" and attribute(node, "transB", 0)):
        return 0
    return 1


def along(vector: Array, rank: int, axis: int) -> Array:
    """A vector shaped so that it multiplies a tensor of this rank along ``axis``."""
    shape = [1] * rank
    shape[axis] = len(vector)
    return vector.reshape(shape)


def bias_of(node: NodeProto, wiring: Wiring) -> tuple[NodeProto, int] | None:
    """Where the bias of a Conv, Gemm or MatMul stands: (node, position) of a stored vector that only it reads; for a
    MatMul that is the constant operand of the Add behind it. None when there is none."""
    if node.op_type in ("Conv", "Gemm"):
        return (node, 2) if wiring.own(node, 2) else None
    after = wiring.only_user(node.output[0])
    if after is None or after.op_type != "Add":
        return None
    position = 1 if after.input[0] == node.output[0] else 0
    stored = wiring.array(after.input[position])
    return (after, position) if wiring.own(after, position) and stored is not None and stored.ndim == 1 else None
