"""A float32 graph to float16 or bfloat16, inputs and outputs as they were, chosen nodes in float32.

Which of a node's inputs and outputs may change is read from ONNX's own operator schemas, so that no list of operators
has to be kept: float32 stays where the schema asks for it (the scales of Resize), and wherever there is no schema.
onnxruntime.transformers.float16 was tried and not taken: it cuts constants at 10,000 without a word (masks, large
biases), writes no bfloat16, and keeps operators by a fixed list instead of by what calibration data shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, defs, helper, numpy_helper

from compressor.models.onnx_graph import STANDARD_DOMAINS, opset_of
from compressor.quantize.floats.formats import FloatFormat
from compressor.quantize.watch import element_types
from compressor.quantize.weights.stream import reads

FLOAT = "tensor(float)"
NO_FORM = "the operator has no {} form in ONNX"


class Converted(NamedTuple):
    """The new model; node -> reason for every node with float values that stays float32; names of half tensors."""

    model: ModelProto
    stay: dict[str, str]
    half: frozenset[str]


def convert(model: ModelProto, to: FloatFormat, keep: Mapping[str, str]) -> Converted:
    """The model in another float format.

    ``keep`` maps nodes that must stay to reasons. ``model`` has unique node names and weights as initializers
    (:func:`compressor.quantize.prepare.prepare`) and is not changed. Raises :class:`StageError` when ONNX Runtime
    cannot load it.
    """
    made = ModelProto()
    made.CopyFrom(model)
    return _Conversion(made, to, keep).run()


class _Conversion:
    def __init__(self, model: ModelProto, to: FloatFormat, keep: Mapping[str, str]) -> None:
        self.model, self.to, self.keep = model, to, keep
        self.opset = opset_of(model)
        self.types = element_types(model)
        self.stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self.outputs = {value.name for value in model.graph.output}
        self.inside = {name for node in model.graph.node for name in set(reads(node)) - set(node.input)}
        self.versions: dict[tuple[str, bool], str] = {}  # (tensor, half?) -> its name in that type
        self.nodes: list[NodeProto] = []
        self.stay: dict[str, str] = {}

    def run(self) -> Converted:
        for value in self.model.graph.input:
            self.versions[value.name, False] = value.name
        for node in self.model.graph.node:
            self._node(node)
        del self.model.graph.node[:]
        self.model.graph.node.extend(self.nodes)
        read = {name for node in self.nodes for name in reads(node)} | self.outputs
        weights = [tensor for tensor in self.stored.values() if tensor.name in read]
        del self.model.graph.initializer[:]
        self.model.graph.initializer.extend(weights)
        del self.model.graph.value_info[:]
        half = frozenset(made for (_, half), made in self.versions.items() if half)
        return Converted(self.model, self.stay, half)

    def _node(self, node: NodeProto) -> None:
        places, results = self._places(node)
        for position, name in enumerate(node.input):
            if self._is_float(name):
                node.input[position] = self._version(name, half=position in places)
        self._retype(node, bool(results))
        self.nodes.append(node)
        for position, name in enumerate(list(node.output)):
            if self._is_float(name):
                self._made(node, position, name, half=position in results)

    def _is_float(self, name: str) -> bool:
        return bool(name) and self.types.get(name) == FLOAT

    def _places(self, node: NodeProto) -> tuple[set[int], set[int]]:
        """Positions of inputs and of outputs that change; both empty: the node stays, for a reason on record."""
        floats = [name for name in (*node.input, *node.output) if self._is_float(name)]
        if not floats:
            return set(), set()
        found = self._by_schema(node)
        reason = self.keep.get(node.name, "")
        if not reason and (self.inside & set(node.output) or any(a.HasField("g") for a in node.attribute)):
            reason = "a nested graph reads or makes it"
        if not reason and found == (set(), set()):
            reason = NO_FORM.format(self.to.name)
        if reason:
            self.stay[node.name] = reason
            return set(), set()
        return found

    def _by_schema(self, node: NodeProto) -> tuple[set[int], set[int]]:
        if node.domain not in STANDARD_DOMAINS or not defs.has(node.op_type, node.domain):
            return set(), set()
        schema = defs.get_schema(node.op_type, self.opset, node.domain)
        takes = {item.type_param_str for item in schema.type_constraints if self.to.type_name in item.allowed_type_strs}

        def kinds(formal: list[defs.OpSchema.FormalParameter], names: list[str]) -> dict[int, str]:
            last = len(formal) - 1
            pairs = {n: formal[min(n, last)].type_str for n, name in enumerate(names) if self._is_float(name)}
            return {position: kind for position, kind in pairs.items() if kind in takes}

        before, after = kinds(list(schema.inputs), list(node.input)), kinds(list(schema.outputs), list(node.output))
        bound = set(before.values()) | (set(after.values()) if _attribute_type(node) is not None else set())
        if node.op_type == "Cast" and before and not after:
            return set(), set()  # to integers or booleans: they are told apart by bits that would be lost
        return set(before), {position for position, kind in after.items() if kind in bound}

    def _retype(self, node: NodeProto, half: bool) -> None:
        """Attributes that name the type of the output."""
        known = _attribute_type(node) if half else None
        if known is None:
            return
        if known.type == AttributeProto.INT:
            known.i = self.to.tensor
        else:
            known.t.CopyFrom(self._half(known.t, known.t.name))

    def _version(self, name: str, *, half: bool) -> str:
        """The tensor's name in the wanted type; a Cast is written where there is none yet."""
        found = self.versions.get((name, half))
        if found is not None:
            return found
        made = f"{name}_{self.to.name if half else 'fp32'}"
        if name in self.stored:
            made = made if half else name
            if half:
                self.stored[made] = self._half(self.stored[name], made)
        else:
            source = self.versions[name, not half]
            kind = self.to.tensor if half else TensorProto.FLOAT
            self.nodes.append(helper.make_node("Cast", [source], [made], f"{made}_cast", to=kind))
        self.versions[name, half] = made
        return made

    def _half(self, tensor: TensorProto, name: str) -> TensorProto:
        with np.errstate(over="ignore"):  # what overflows is the lint's to tell
            return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(self.to.dtype), name)

    def _made(self, node: NodeProto, position: int, name: str, *, half: bool) -> None:
        """Register an output; one of the model's stays float32 under its own name."""
        self.versions[name, half] = name
        if half and name in self.outputs:
            self.versions[name, True] = node.output[position] = f"{name}_{self.to.name}"
            self.nodes.append(
                helper.make_node("Cast", [node.output[position]], [name], f"{name}_cast", to=TensorProto.FLOAT)
            )
            self.versions[name, False] = name


def _attribute_type(node: NodeProto) -> AttributeProto | None:
    """The attribute that decides a float32 output's type, where no input does."""
    for item in node.attribute:
        if node.op_type == "Cast" and item.name == "to" and item.i == TensorProto.FLOAT:
            return item
        if node.op_type == "ConstantOfShape" and item.name == "value" and item.t.data_type == TensorProto.FLOAT:
            return item
    return None
