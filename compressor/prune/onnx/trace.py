"""Walk an ONNX graph once and note which constants' elements belong together.

The graph runs on a few samples with every tensor visible, which gives true shapes also where the file leaves them free;
labels then follow node by node. Constants are initializers and Constant nodes alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, numpy_helper

from compressor.models.onnx_graph import all_graphs, constants, name_nodes, opset_of, subgraphs
from compressor.models.structure.groups import Index, Key
from compressor.prune.onnx.labels import LabelSpace, Value, axes_of
from compressor.prune.onnx.runtime import Watcher, few_samples
from compressor.types import Array

ADDED_BIAS = "_added_bias"
CHECKED_IR = 4  # from this version on initializers need not be listed as inputs


@dataclass(frozen=True)
class Site:
    """A node whose own numbers (a shape, sizes of parts, a group count) change when units go.

    ``before`` and ``after`` are the labels of its data input and of its outputs.
    """

    node: str
    kind: str  # reshape, split, slice, group, resize
    axis: int
    before: Value
    after: tuple[Value, ...]


@dataclass
class Trace:
    """Labels, shapes and constants of one prepared graph."""

    model: ModelProto
    shapes: Mapping[str, tuple[int, ...]]
    arrays: Mapping[str, Array]
    users: Mapping[str, int]
    space: LabelSpace = field(default_factory=LabelSpace)
    values: dict[str, Value] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    opset: int = 0


@dataclass(frozen=True)
class Call:
    """One node, as the rules see it."""

    node: NodeProto
    trace: Trace

    @property
    def space(self) -> LabelSpace:
        return self.trace.space

    def has(self, position: int) -> bool:
        return len(self.node.input) > position and bool(self.node.input[position])

    def shape(self, position: int) -> tuple[int, ...]:
        return self.trace.shapes.get(self.node.input[position], ())

    def out_shape(self, position: int = 0) -> tuple[int, ...]:
        return self.trace.shapes.get(self.node.output[position], ())

    def array(self, position: int) -> Array | None:
        """The constant at an input, if it is one."""
        return self.trace.arrays.get(self.node.input[position]) if self.has(position) else None

    def attribute(self, name: str, default: Any = None) -> Any:
        found = next((each for each in self.node.attribute if each.name == name), None)
        return onnx.helper.get_attribute_value(found) if found is not None else default

    def value(self, position: int) -> Value:
        """Labels of an input; a floating-point constant gets fresh ones, one set for each axis."""
        name = self.node.input[position]
        array = self.trace.arrays.get(name)
        if array is None or array.dtype.kind != "f" or array.size < 2:
            return self.trace.values.get(name, Value())
        if name not in self.trace.values:
            self.trace.values[name] = self._source(array, position)
            if self.trace.users[name] > 1:
                why = f"its weight `{name}` is shared by {self.trace.users[name]} nodes"
                self.space.freeze_all([self.trace.values[name]], why)
        return self.trace.values[name]

    def _source(self, array: Array, position: int) -> Value:
        layers = []
        for axis, size in enumerate(array.shape):
            shape = [size if other == axis else 1 for other in range(array.ndim)]
            key = Key(f"{self.node.name}.{position}", axis)
            layers.append(self.space.allocate(size, key).reshape(shape))
        return Value([layer for layer in layers if axes_of(layer)], param=True)

    def site(self, kind: str, axis: int, before: Value, after: tuple[Value, ...]) -> None:
        self.trace.sites.append(Site(self.node.name, kind, axis, before, after))


def prepare(model: ModelProto) -> ModelProto:
    """A copy with unique node names, weights that are not listed as inputs, and vectors that are each used once.

    Exporters store equal vectors (zero biases) once; that does not make two layers depend on each other.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    name_nodes(copy)
    fixed = {tensor.name for tensor in copy.graph.initializer}
    fed = [value for value in copy.graph.input if value.name not in fixed]
    if len(fed) < len(copy.graph.input):
        copy.ir_version = max(copy.ir_version, CHECKED_IR)
        del copy.graph.input[:]
        copy.graph.input.extend(fed)
    _give_each_its_vector(copy)
    _add_zero_biases(copy)
    return copy


def _add_zero_biases(model: ModelProto) -> None:
    """Convolutions without a bias get one, so that bias compensation has a place; :func:`tidy` takes it back."""
    tensors = constants(model.graph)
    for node in model.graph.node:
        weight = tensors.get(node.input[1]) if node.op_type == "Conv" and len(node.input) == 2 else None
        if weight is not None:
            zeros = np.zeros(weight.dims[0], dtype=numpy_helper.to_array(weight).dtype)
            model.graph.initializer.append(numpy_helper.from_array(zeros, node.name + ADDED_BIAS))
            node.input.append(node.name + ADDED_BIAS)


def tidy(model: ModelProto) -> ModelProto:
    """A copy without the biases that were added: zeros go, and what a batch norm follows moves into its mean."""
    copy = ModelProto()
    copy.CopyFrom(model)
    tensors = constants(copy.graph)
    for node in copy.graph.node:
        if node.op_type != "Conv" or len(node.input) < 3 or not node.input[2].endswith(ADDED_BIAS):
            continue
        bias = numpy_helper.to_array(tensors[node.input[2]])
        readers = [each for each in copy.graph.node if node.output[0] in each.input]
        if bias.any() and len(readers) == 1 and readers[0].op_type == "BatchNormalization":
            mean = tensors[readers[0].input[3]]
            mean.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(mean) - bias, mean.name))
            bias = np.zeros_like(bias)
        if not bias.any():
            del node.input[2]
    used = {name for _, graph in all_graphs(copy.graph) for node in graph.node for name in node.input}
    used |= {value.name for value in copy.graph.output}
    kept = [tensor for tensor in copy.graph.initializer if tensor.name in used]
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(kept)
    return copy


def _give_each_its_vector(model: ModelProto) -> None:
    vectors = {
        name: tensor
        for name, tensor in constants(model.graph).items()
        if tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
        and 1 < int(np.prod(tensor.dims)) == max(tensor.dims, default=0)
    }
    seen: set[str] = set(_names_in_subgraphs(model))
    taken = set(constants(model.graph))
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            if name in vectors and name in seen:
                fresh = _free_name(name, taken)
                model.graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(vectors[name]), fresh))
                node.input[position] = fresh
            seen.add(name)


def _free_name(name: str, taken: set[str]) -> str:
    number = 1
    while f"{name}_{number}" in taken:
        number += 1
    taken.add(f"{name}_{number}")
    return f"{name}_{number}"


def _names_in_subgraphs(model: ModelProto) -> list[str]:
    inner = [graph for inside, graph in all_graphs(model.graph) if inside]
    return [name for graph in inner for node in graph.node for name in node.input]


def shapes_of(model: ModelProto, example: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    """True shapes of all tensors, seen on a few samples. Raises :class:`StageError` when the graph does not run."""
    names = [name for node in model.graph.node for name in node.output if name]
    found = Watcher(model, names, optimise=False).run(few_samples(model, example))
    shapes = {name: tuple(int(size) for size in array.shape) for name, array in found.items()}
    shapes |= {name: tuple(tensor.dims) for name, tensor in constants(model.graph).items()}
    return shapes | {name: array.shape for name, array in few_samples(model, example).items()}


def follow(model: ModelProto, example: Mapping[str, Array]) -> Trace:
    """Labels of all constants of a prepared ``model``, joined as its nodes join them."""
    from compressor.prune.onnx.rules import rule_for, unknown

    arrays = {name: numpy_helper.to_array(tensor) for name, tensor in constants(model.graph).items()}
    users = Counter(name for node in model.graph.node for name in node.input)
    users.update(_names_in_subgraphs(model))
    users.update(value.name for value in model.graph.output)
    trace = Trace(model, shapes_of(model, example), arrays, users, opset=opset_of(model))
    for node in model.graph.node:
        if node.op_type == "Constant":
            continue
        call = Call(node, trace)
        nested = any(True for _ in subgraphs(node))
        results = unknown(call) if nested else rule_for(node)(call)
        trace.values.update({name: value for name, value in zip(node.output, results, strict=False) if name})
    inner = [trace.values[name] for name in _names_in_subgraphs(model) if name in trace.values]
    trace.space.freeze_all(inner, "is read inside a control-flow body")
    outputs = [trace.values.get(value.name, Value()) for value in model.graph.output]
    trace.space.freeze_all(outputs, "is the model's output")
    trace.space.freeze(np.zeros(1, dtype=np.int64), "")  # label 0: parts of a concatenation that have no units
    trace.space.settle_grids()
    return trace


def alive(space: LabelSpace, layer: Index, gone: Index) -> Index:
    """1 where a label stays, 0 where its unit is one of the roots ``gone``."""
    return (~np.isin(space.find(layer), gone)).astype(np.int64)


def kept_along(space: LabelSpace, value: Value, axis: int, gone: Index) -> Index | None:
    """Which positions along ``axis`` stay (1 or 0); None when the axis carries no labels."""
    layer = next((each for each in value.layers if each.ndim > axis and each.shape[axis] > 1), None)
    if layer is None:
        return None
    others = tuple(other for other in range(layer.ndim) if other != axis)
    return np.asarray(alive(space, layer, gone).max(axis=others))
