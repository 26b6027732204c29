"""The file of a student that was trained with fake quantization: its learnt scales as quantize-dequantize pairs.

The fp32 export already holds the rounded weights as floats. Here each of them is found again by its values and becomes
integer codes behind a DequantizeLinear; what its operator reads (and gives, where that was trained) passes a pair with
the learnt scale. Nothing is calibrated and nothing is rounded anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from compressor.errors import StageError, sdk_errors
from compressor.models.onnx_graph import opset_of
from compressor.models.rounded import Ends, RoundedLayer
from compressor.profile import QuantizationRules
from compressor.quantize.containers import Container, container_of, few_bits, integers, lowest_opset, matmul_nbits
from compressor.quantize.prepare import prepare
from compressor.types import Array

WEIGHTED = ("Conv", "Gemm", "MatMul")
STANDARD_16 = 21  # the standard's QuantizeLinear knows 16 bits from this opset on
MICROSOFT = "com.microsoft"
HINT = "Leave the packed form out, or export at a later opset."


@dataclass(frozen=True)
class Stored:
    """How one layer's weight lies in the file."""

    layer: RoundedLayer
    node: str
    container: Container


def write_pairs(
    source: ModelProto, layers: Sequence[RoundedLayer], rules: QuantizationRules, *, packed: bool
) -> tuple[ModelProto, tuple[Stored, ...]]:
    """A quantized copy of ``source``, the optimised fp32 export whose weights are the layers' values.

    ``packed``: few-bit codes in few-bit containers (INT4 and INT2 initializers; MatMulNBits where activations are
    float); else in the target's 8-bit type, for its integer kernels.

    Raises:
        StageError: a layer's weight is not in the file (an optimisation changed it).
    """
    model = prepare(source)
    writer = _Writer(model, rules, packed)
    nodes: list[NodeProto] = []
    for node in list(model.graph.node):
        layer = writer.layer_of(node, layers)
        nodes += [node] if layer is None else writer.rewritten(node, layer)
    lost = sorted({layer.name for layer in layers} - {item.layer.name for item in writer.stored})
    if lost:
        raise StageError(
            f"the trained weights of {', '.join(lost)} are not in the exported file",
            hint="An optimisation of the exporter changed them; name the layers in `qat.protect`.",
        )
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(writer.tensors)
    _finish(model)
    wanted = max((lowest_opset(item.layer, item.container) for item in writer.stored), default=0)
    return _raised(model, wanted), tuple(writer.stored)


def _finish(model: ModelProto) -> None:
    read = {name for node in model.graph.node for name in node.input}
    kept = sorted((t for t in model.graph.initializer if t.name in read), key=lambda tensor: tensor.name)
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    if any(node.domain == MICROSOFT for node in model.graph.node) and not any(
        entry.domain == MICROSOFT for entry in model.opset_import
    ):
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))


def _raised(model: ModelProto, wanted: int) -> ModelProto:
    """The opset that the containers need; nothing else of the graph changes."""
    if opset_of(model) >= wanted:
        return model
    with sdk_errors(StageError, f"raise the model to opset {wanted}", hint=HINT):
        made: ModelProto = onnx.version_converter.convert_version(model, wanted)
    standard = helper.make_opsetid("", opset_of(made))
    made.ir_version = max(made.ir_version, helper.find_min_ir_version_for([standard]))
    return made


class _Writer:
    """Turns the nodes of trained layers into their quantized form."""

    def __init__(self, model: ModelProto, rules: QuantizationRules, packed: bool) -> None:
        self.rules, self.packed = rules, packed
        self.tensors: list[TensorProto] = []
        self.stored: list[Stored] = []
        self._floats = {
            tensor.name: numpy_helper.to_array(tensor)
            for tensor in model.graph.initializer
            if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) > 1
        }
        self._pairs: dict[tuple[str, Ends], str] = {}  # what was quantized already -> its dequantized tensor
        self._taken: dict[str, str] = {}  # weight tensor -> layer
        self._domain = MICROSOFT if opset_of(model) < STANDARD_16 else ""

    def layer_of(self, node: NodeProto, layers: Sequence[RoundedLayer]) -> RoundedLayer | None:
        """The layer whose trained weight ``node`` holds: by value, equal ones by name and order."""
        weight = self._floats.get(node.input[1]) if node.op_type in WEIGHTED and len(node.input) > 1 else None
        if weight is None:
            return None
        name = node.input[1]
        plain = weight if _rows_first(node) else weight.T
        same = [layer for layer in layers if np.array_equal(layer.value, plain)]
        known = next((layer for layer in same if layer.name == self._taken.get(name)), None)
        named = next((layer for layer in same if name.startswith(f"{layer.name}.")), None)
        free = next((layer for layer in same if layer.name not in self._taken.values()), None)
        found = known or named or free
        if found is not None:
            self._taken[name] = found.name
        return found

    def rewritten(self, node: NodeProto, layer: RoundedLayer) -> list[NodeProto]:
        """The node and those around it."""
        container = container_of(layer, node.op_type, self.rules, packed=self.packed)
        self.stored.append(Stored(layer, node.name, container))
        if container.kind == "nbits":
            made, tensors = matmul_nbits(node, layer, container)
            self.tensors += tensors
            return made
        before = list(self._weight(node, layer, container))
        if layer.reads is not None:
            node.input[0], more = self._pair(node.input[0], layer.reads)
            before += more
        before += self._bias(node, layer)
        return [*before, node, *self._output(node, layer)]

    def _weight(self, node: NodeProto, layer: RoundedLayer, container: Container) -> Iterator[NodeProto]:
        name, first = node.input[1], _rows_first(node)
        codes, zero = few_bits(layer, container)
        codes, axis = (codes, 0) if first else (codes.T, 1)
        inputs = [f"{name}_quantized", f"{name}_scale"]
        if inputs[0] not in {tensor.name for tensor in self.tensors}:
            self.tensors.append(integers(inputs[0], container.type, codes))
            scale, zero = _laid_out(layer, zero, first)
            self.tensors.append(numpy_helper.from_array(scale, inputs[1]))
            points = np.broadcast_to(zero, scale.shape)
            self.tensors.append(integers(f"{name}_zero_point", container.type, points))
        made = helper.make_node(
            "DequantizeLinear", [*inputs, f"{name}_zero_point"], [f"{name}_of_{node.name}"],
            name=f"{node.name}_weight_DequantizeLinear", axis=axis,
        )  # fmt: skip
        if layer.per.isdigit():  # groups of inputs: blocks along the other axis
            del made.attribute[:]
            made.attribute.extend([helper.make_attribute("axis", 1 - axis)])
            made.attribute.extend([helper.make_attribute("block_size", int(layer.per))])
        node.input[1] = made.output[0]
        yield made

    def _bias(self, node: NodeProto, layer: RoundedLayer) -> Iterator[NodeProto]:
        """Its int32 pair, where the target takes one; else the fp32 export's bias already has the rounded values."""
        if layer.bias_codes is None or layer.bias_scale is None or not self.rules.quantize_bias or len(node.input) < 3:
            return
        name = f"{node.name}_bias"
        scale = layer.bias_scale if len(layer.bias_scale) > 1 else layer.bias_scale[0]
        self.tensors.append(numpy_helper.from_array(layer.bias_codes.astype(np.int32), f"{name}_quantized"))
        self.tensors.append(numpy_helper.from_array(np.asarray(scale, np.float32), f"{name}_scale"))
        points = np.zeros(np.shape(scale), np.int32)
        self.tensors.append(numpy_helper.from_array(points, f"{name}_zero_point"))
        inputs = [f"{name}_quantized", f"{name}_scale", f"{name}_zero_point"]
        node.input[2] = name
        yield helper.make_node("DequantizeLinear", inputs, [name], name=f"{name}_DequantizeLinear", axis=0)

    def _pair(self, name: str, ends: Ends, quantized: str = "") -> tuple[str, list[NodeProto]]:
        """``name`` quantized and dequantized, once for all that read it with this range."""
        if (name, ends) in self._pairs:
            return self._pairs[name, ends], []
        base = quantized or f"{name}_{len(self._pairs)}"
        kind, shift = _activation(self.rules, ends)
        self.tensors.append(numpy_helper.from_array(np.array(ends.scale, np.float32), f"{base}_scale"))
        self.tensors.append(integers(f"{base}_zero_point", kind, np.array(ends.zero - shift)))
        domain = self._domain if ends.bits == 16 else ""
        parameters = [f"{base}_scale", f"{base}_zero_point"]
        nodes = []
        for operator, read, made in (
            ("QuantizeLinear", name, "codes"),
            ("DequantizeLinear", f"{base}_codes", "values"),
        ):
            call = {"name": f"{base}_{operator}", "domain": domain}
            nodes.append(helper.make_node(operator, [read, *parameters], [f"{base}_{made}"], **call))
        self._pairs[name, ends] = nodes[1].output[0]
        return nodes[1].output[0], nodes

    def _output(self, node: NodeProto, layer: RoundedLayer) -> list[NodeProto]:
        if layer.gives is None:
            return []
        wanted = node.output[0]
        node.output[0] = f"{wanted}_float"
        _, nodes = self._pair(node.output[0], layer.gives)
        nodes[1].output[0] = wanted
        return nodes


def _rows_first(node: NodeProto) -> bool:
    """Does the weight have its outputs on the first axis?"""
    if node.op_type == "Conv":
        return True
    return node.op_type == "Gemm" and any(item.name == "transB" and item.i for item in node.attribute)


def _laid_out(layer: RoundedLayer, zero: Array, first: bool) -> tuple[Array, Array]:
    """Scales and zero points as the operator reads them: (), (C), or a value a block of the weight as it lies there."""
    scale = layer.scale.astype(np.float32)
    if not layer.per.isdigit():
        return (scale, zero) if len(scale) > 1 else (np.asarray(scale[0]), np.ravel(zero)[0])
    blocks = scale.reshape(len(layer.value), -1)
    points = zero.reshape(blocks.shape) if zero.size > 1 else zero
    return (blocks, points) if first else (np.ascontiguousarray(blocks.T), points.T)


def _activation(rules: QuantizationRules, ends: Ends) -> tuple[int, int]:
    """ONNX type of the target's activations, and what unsigned codes have on top of its own."""
    signed = rules.activation.startswith("int")
    if ends.bits == 16:
        return (TensorProto.INT16, 2**15) if signed else (TensorProto.UINT16, 0)
    return (TensorProto.INT8, 2**7) if signed else (TensorProto.UINT8, 0)


def misfit(layers: Sequence[RoundedLayer], rules: QuantizationRules) -> str:
    """Why a target with these rules cannot take what was trained for others; empty when it can."""
    reads = [layer.reads for layer in layers if layer.reads is not None]
    wide = rules.activation.endswith("16")
    if not rules.int8:
        return "the target takes no int8"
    if any((ends.bits == 16) != wide for ends in reads):
        return f"it was trained for activations of {16 if not wide else 8} bits, the target takes {rules.activation}"
    if rules.symmetric_activation and any(ends.zero != 2 ** (ends.bits - 1) for ends in reads):
        return "it was trained with asymmetric activations, the target takes symmetric ones only"
    if not rules.per_channel and any(len(layer.scale) > 1 for layer in layers):
        return "it was trained with a scale per output channel, the target takes one per tensor"
    if rules.reduce_range and any(layer.reads is not None and int(np.abs(layer.codes).max()) > 64 for layer in layers):
        return "it was trained with eight-bit weights, the target (x86 without VNNI) takes seven"
    return ""


def information(layers: Sequence[RoundedLayer], others: int) -> Mapping[str, float]:
    """Bits of the numbers, whatever container they lie in (methods Q3): weights x bits, scales, ``others`` in float."""
    weights = sum(layer.codes.size * layer.bits for layer in layers)
    scales = 32.0 * sum(len(layer.scale) * (2 if layer.steps > 1 else 1) for layer in layers)
    return {"weights": weights, "scales": scales, "float": 32.0 * others}
