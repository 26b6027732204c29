"""What a file under a size budget is built on: an int8 file, or the float model whose weights only lie in 8 bits."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from compressor.models.onnx_graph import read_model
from compressor.profile import QuantizationRules
from compressor.quantize.adjust.graph import Wiring, along, output_axis
from compressor.quantize.prepare import prepare
from compressor.quantize.promise.restore import followers, rank
from compressor.quantize.promise.sensitivity import LAYERS, rounded
from compressor.quantize.promise.stored import LEAST
from compressor.quantize.ptq import quantize
from compressor.quantize.variants import Variant
from compressor.quantize.watch import Calibration
from compressor.types import Array, Artifact, LayerFact

READS_TABLE = "Gather"
SCALE = "::scale8"  # of what the float base stores


def layers_of(model: ModelProto) -> dict[str, str]:
    """Node -> its stored float32 weight, of every layer and table with at least ``LEAST`` elements."""
    sizes = {t.name: int(np.prod(t.dims)) for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}
    found = {}
    for node in model.graph.node:
        if node.op_type in (*LAYERS, READS_TABLE) and len(node.input) > 1:
            name = node.input[0 if node.op_type == READS_TABLE else 1]
            if sizes.get(name, 0) >= LEAST:
                found[node.name] = name
    return found


class Base(ABC):
    """One way to compute: in int8, or in float32. ``model`` is the prepared float model."""

    name: str
    computes: str  # for people
    floats_cost_time = False  # is a float layer slower than one in 8 bits?

    def __init__(self, source: Artifact) -> None:
        self.source = source
        self.model = prepare(read_model(source.path))
        self.layers = layers_of(self.model)
        self._built: dict[frozenset[str], ModelProto] = {}
        self._told: dict[frozenset[str], tuple[LayerFact, ...]] = {}

    def facts(self, floats: Collection[str]) -> tuple[LayerFact, ...]:
        """What the quantizer said of each layer of the file with these layers in float."""
        return self._told.get(frozenset(floats), ())

    def eight_bits(self, floats: Mapping[str, str]) -> ModelProto:
        """The file with all weights in 8 bits except those of ``floats`` (layer -> why); a copy."""
        key = frozenset(floats)
        if key not in self._built:
            self._built = {frozenset(): self._built[frozenset()]} if frozenset() in self._built else {}
            self._built[key] = self._build(floats)
        made = ModelProto()
        made.CopyFrom(self._built[key])
        return made

    @abstractmethod
    def _build(self, floats: Mapping[str, str]) -> ModelProto: ...

    @abstractmethod
    def known_noise(self) -> Mapping[str, float]:
        """Noise at the outputs with only one layer in 8 bits, where it was measured by other means already."""

    def rounded(self, layer: str) -> Array:
        """The float weight of a layer after the rounding to 8 bits (a table of an int8 file: with one scale)."""
        wanted = next(node for node in self.model.graph.node if node.name == layer)
        array = Wiring(self.model).array(self.layers[layer])
        assert array is not None
        return rounded(array, self._axis(wanted, array))

    def _axis(self, node: NodeProto, array: Array) -> int | None:
        """The axis of the weight's scales."""
        return channels(node, array)

    def finish(self, model: ModelProto) -> ModelProto:
        """The last change before the file is written."""
        return model


class IntegerBase(Base):
    """An int8 file of one of the engines; layers in float are left out of it as in `int8-mixed-ort`."""

    computes = "int8 kernels"
    floats_cost_time = True

    def __init__(
        self,
        source: Artifact,
        variant: Variant,
        made: Artifact,
        rules: QuantizationRules,
        calibration: Calibration,
        cache: Path | None,
    ) -> None:
        super().__init__(source)
        self.name, self.variant, self.made = variant.name, variant, made
        self._rules, self._calibration, self._cache = rules, calibration, cache

    def _build(self, floats: Mapping[str, str]) -> ModelProto:
        if not floats:
            self._told[frozenset()] = self.made.facts
            return read_model(self.made.path)
        reasons = followers(self.model, floats) if self.variant.operators is None else {}
        with tempfile.TemporaryDirectory(prefix="sized-") as folder:
            path = Path(folder) / "eight.onnx"
            keep = {**reasons, **floats}
            made = quantize(
                self.source, self.variant, self._rules, self._calibration, path, cache=self._cache, keep_float=keep
            )
            self._told[frozenset(floats)] = made.facts
            return read_model(path)

    def _axis(self, node: NodeProto, array: Array) -> int | None:
        return None if node.op_type == READS_TABLE or not self.variant.per_channel else channels(node, array)

    def known_noise(self) -> Mapping[str, float]:
        ranking = rank(self.source, self.variant, self._rules, self._calibration, self._cache)
        return {item.layer: item.noise for item in ranking}


class FloatBase(Base):
    """The float model: weights lie in 8 bits per output channel (tables per row) and are float32 from loading on."""

    name = "float32"
    computes = "float32 kernels; weights are unpacked to float32 while the file is loaded"

    def _build(self, floats: Mapping[str, str]) -> ModelProto:
        made = ModelProto()
        made.CopyFrom(self.model)
        wiring = Wiring(made)
        kept = {self.layers[name] for name in floats if name in self.layers}
        pairs: dict[str, NodeProto] = {}
        for node in made.graph.node:
            name = self.layers.get(node.name, "")
            if name and name not in kept and name not in pairs:
                array = wiring.array(name)
                assert array is not None
                pairs[name] = _pair(made, name, array, channels(node, array))
        tensors = [tensor for tensor in made.graph.initializer if tensor.name not in pairs]
        nodes = [*pairs.values(), *made.graph.node]
        rest = ModelProto()
        rest.CopyFrom(made)
        del rest.graph.node[:], rest.graph.initializer[:]
        rest.graph.node.extend(nodes)
        rest.graph.initializer.extend(tensors)
        return rest

    def known_noise(self) -> Mapping[str, float]:
        return {}

    def finish(self, model: ModelProto) -> ModelProto:
        """Pairs of weights as Cast and Mul, which runtimes fold; a DequantizeLinear would run at every call."""
        ranks = {tensor.name: len(tensor.dims) for tensor in self.model.graph.initializer}
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        nodes: list[NodeProto] = []
        for node in model.graph.node:
            ours = node.op_type == "DequantizeLinear" and node.input[1].endswith(SCALE)
            nodes += _folded(node, tensors[node.input[1]], ranks[node.output[0]]) if ours else [node]
        rest = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del model.graph.node[:]
        model.graph.node.extend(rest)
        return model


def channels(node: NodeProto, array: Array) -> int:
    """The axis of a layer's weight along which int8 scales stand: output channels, the rows of a table."""
    if node.op_type == READS_TABLE:
        return 0
    return array.ndim - 1 if node.op_type == "MatMul" else output_axis(node)


def _pair(model: ModelProto, name: str, array: Array, axis: int) -> NodeProto:
    """The weight as symmetric int8 codes with a scale per channel, behind a DequantizeLinear of its name."""
    others = tuple(other for other in range(array.ndim) if other != axis)
    peak = np.abs(array).max(axis=others)
    scale = np.where(peak > 0, peak / 127, 1.0).astype(np.float32)
    codes = np.round(array / along(scale, array.ndim, axis)).clip(-127, 127).astype(np.int8)
    names = f"{name}::codes8", f"{name}{SCALE}"
    model.graph.initializer.append(numpy_helper.from_array(codes, names[0]))
    model.graph.initializer.append(numpy_helper.from_array(scale, names[1]))
    return helper.make_node("DequantizeLinear", [*names], [name], name=f"{name}::weight8", axis=axis)


def _folded(node: NodeProto, scale: TensorProto, rank: int) -> list[NodeProto]:
    """Cast and Mul in place of a pair; the scale gets the shape that multiplies."""
    axis = next(item.i for item in node.attribute if item.name == "axis")
    shaped = along(numpy_helper.to_array(scale).reshape(-1), rank, axis)
    scale.CopyFrom(numpy_helper.from_array(shaped, scale.name))
    middle = f"{node.output[0]}::cast8"
    return [
        helper.make_node("Cast", [node.input[0]], [middle], name=f"{node.name}_cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", [middle, node.input[1]], [node.output[0]], name=f"{node.name}_mul"),
    ]
