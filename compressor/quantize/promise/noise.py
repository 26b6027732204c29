"""What each layer alone costs at the outputs in each precision, and the bytes that it takes there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from compressor.errors import StageError, sdk_errors
from compressor.quantize.promise.bases import Base
from compressor.quantize.promise.knapsack import Option
from compressor.quantize.promise.packing import Packed, halved, pack, size_of, written
from compressor.quantize.promise.sensitivity import first_batches
from compressor.quantize.promise.stored import Weight, eight_bit_weights, grams
from compressor.quantize.watch import FLOATS, Calibration, Noise
from compressor.types import Array

Answers = list[dict[str, Array]]
PRECISIONS = ("int4", "int8", "fp16", "fp32")  # the smallest first
HALF_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Item:
    """One layer and the precisions that it may take, the smallest first. ``weight`` is that of the 8-bit file."""

    layer: str
    weight: Weight
    options: tuple[Option, ...]

    def option(self, precision: str) -> Option:
        return next(option for option in self.options if option.precision == precision)


class Prospect:
    """All layers of one base with bytes and noise of each precision; 4-bit forms are made once."""

    def __init__(self, base: Base, precisions: Sequence[str], calibration: Calibration) -> None:
        self.base, self.calibration = base, calibration
        self.precisions = tuple(name for name in PRECISIONS if name in precisions)
        self._packed: dict[str, tuple[Array, Packed]] = {}
        self._grams: Mapping[str, Array] = {}

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """All that may be stored otherwise. Raises :class:`StageError` when there is nothing."""
        found = eight_bit_weights(self._model, set(self.base.layers))
        if not found:
            raise StageError("it has no 8-bit weights that could be stored otherwise", hint="Raise `max_size_mib`.")
        return found

    @cached_property
    def _model(self) -> ModelProto:
        return self.base.eight_bits({})

    @cached_property
    def _tensors(self) -> dict[str, TensorProto]:
        return {tensor.name: tensor for tensor in self._model.graph.initializer}

    def smallest(self) -> dict[str, str]:
        """The choice with the fewest bytes."""
        return {weight.layer: self.precisions[0] for weight in self.weights}

    def packed(self, weight: Weight, tensor: Array) -> Packed:
        """The 4-bit form of an 8-bit tensor, made anew only when its codes changed."""
        known = self._packed.get(weight.name)
        if known is None or not np.array_equal(known[0], tensor):
            gram = self._grams.get(weight.name)
            made = pack(tensor, weight.zero, inputs_first=weight.inputs_first, gram=gram)
            self._packed[weight.name] = tensor, made
        return self._packed[weight.name][1]

    @cached_property
    def items(self) -> tuple[Item, ...]:
        """Measured: outputs on calibration data with one layer changed at a time."""
        if "int4" in self.precisions:
            self._grams = grams(self._model, self.weights, self.calibration)
            self._packed = {name: made for name, made in self._packed.items() if name not in self._grams}
        batches = first_batches(self.calibration)
        wanted = answers(self.base.model, batches)
        eight = answers(self._model, batches)
        known = self.base.known_noise()
        found = []
        for weight in self.weights:
            noise = {"fp32": 0.0, "int8": known.get(weight.layer, -1.0)}
            if noise["int8"] < 0:
                changed = replaced(self.base.model, self.base.layers[weight.layer], self.base.rounded(weight.layer))
                noise["int8"] = _noise(wanted, answers(changed, batches), wanted)
            if "int4" in self.precisions:
                packed = self.packed(weight, self._array(weight))
                changed = replaced(self._model, weight.name, packed.values)
                noise["int4"] = noise["int8"] + _noise(eight, answers(changed, batches), wanted)
            noise["fp16"] = noise["int8"] * self._half_share(weight)
            found.append(self._item(weight, noise))
        return tuple(found)

    def _array(self, weight: Weight) -> Array:
        made: Array = numpy_helper.to_array(self._tensors[weight.name])
        return made

    def _float(self, weight: Weight) -> Array:
        name = self.base.layers[weight.layer]
        made: Array = numpy_helper.to_array(next(t for t in self.base.model.graph.initializer if t.name == name))
        return made

    def _half_share(self, weight: Weight) -> float:
        """Squared rounding error of float16 beside that of 8 bits: so much smaller is its noise taken to be."""
        plain = self._float(weight).astype(np.float64)
        lost = np.square(plain - self.base.rounded(weight.layer)).sum()
        with np.errstate(over="ignore"):
            half = np.square(plain - plain.astype(np.float16).astype(np.float64)).sum()
        return float(min(1.0, half / lost)) if lost else 0.0

    def _item(self, weight: Weight, noise: Mapping[str, float]) -> Item:
        plain, tensor = self._float(weight), self._tensors[weight.name]
        costs = {"fp32": _framed(numpy_helper.from_array(plain, self.base.layers[weight.layer]))}
        costs["int8"] = _framed(tensor)
        if float(np.abs(plain).max()) <= HALF_LARGEST:
            costs["fp16"] = size_of(halved(numpy_helper.from_array(plain, self.base.layers[weight.layer]), "w0."))
        if "int4" in self.precisions:
            costs["int4"] = size_of(written(self.packed(weight, self._array(weight)), weight.name, "w0."))
        options = [Option(name, costs[name], noise[name]) for name in self.precisions if name in costs]
        return Item(weight.layer, weight, tuple(options))


def _framed(tensor: TensorProto) -> int:
    return size_of(GraphProto(initializer=[tensor]))


def replaced(model: ModelProto, name: str, array: Array) -> ModelProto:
    """A copy with another stored tensor of this name."""
    made = ModelProto()
    made.CopyFrom(model)
    tensor = next(item for item in made.graph.initializer if item.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))
    return made


def answers(model: ModelProto, batches: Sequence[Mapping[str, Array]]) -> Answers:
    """The float outputs of each batch, as the runtime computes them with its optimisations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with sdk_errors(StageError, "run a file with one layer changed", hint="Keep the int8 file."):
        content = model.SerializeToString()
        session: Any = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_outputs() if value.type in FLOATS]
        fed = {value.name for value in session.get_inputs()}
        found = []
        for inputs in batches:
            given = {name: array for name, array in inputs.items() if name in fed}
            found.append(dict(zip(names, session.run(names, given), strict=True)))
    return found


def _noise(before: Answers, after: Answers, signal: Answers) -> float:
    """Energy of the difference, relative to the energy of the float model's outputs."""
    changed, whole = Noise(), Noise()
    for first, second, plain in zip(before, after, signal, strict=True):
        for name, array in first.items():
            changed.add(np.ravel(array), np.ravel(second[name]))
            whole.add(np.ravel(plain[name]), np.ravel(plain[name]))
    return changed.error / whole.signal if whole.signal else 0.0


def put_first(model: ModelProto, parts: Sequence[GraphProto], dropped: set[str]) -> None:
    """Nodes and tensors of ``parts`` before all others, and without the tensors of these names."""
    nodes: list[NodeProto] = [node for part in parts for node in part.node] + list(model.graph.node)
    tensors = [tensor for tensor in model.graph.initializer if tensor.name not in dropped]
    tensors += [tensor for part in parts for tensor in part.initializer]
    rest = GraphProto(node=nodes, initializer=tensors)
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(rest.node)
    model.graph.initializer.extend(rest.initializer)
