"""How much each layer alone loses in int8, measured at the model's outputs on calibration data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from compressor.profile import QuantizationRules
from compressor.quantize.adjust.graph import Wiring, output_axis
from compressor.quantize.ranges import Ranges
from compressor.quantize.variants import Variant
from compressor.quantize.watch import Calibration, Noise, chunks, outputs_of, watch
from compressor.types import Array

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
SAMPLES = 64  # enough to rank layers; the choice itself is checked on validation


@dataclass(frozen=True)
class Sensitivity:
    """One layer. ``sqnr_db``: outputs of the model with only this layer in int8 against fp32. ``share``: of the model's
    multiply-accumulates, an estimate of its share of the latency."""

    layer: str
    operator: str
    sqnr_db: float
    share: float

    @property
    def noise(self) -> float:
        """Error energy that this layer brings to the outputs, relative to their energy."""
        return float(10 ** (-self.sqnr_db / 10))


def sensitivities(
    model: ModelProto,
    variant: Variant,
    rules: QuantizationRules,
    ranges: Ranges,
    calibration: Calibration,
    skip: Mapping[str, str],
) -> tuple[Sensitivity, ...]:
    """Every layer that the variant quantizes, the most sensitive first.

    One layer at a time gets rounded weights and a quantize-dequantize pair at its input (and at its output where the
    variant quantizes the whole graph); everything else stays float.
    """
    nodes = [node for node in model.graph.node if node.op_type in LAYERS and node.name not in skip]
    wiring = Wiring(model)
    nodes = [node for node in nodes if wiring.array(node.input[1]) is not None]
    batches = first_batches(calibration)
    work = _work(model, nodes, batches[:1])
    plain = outputs_of(model)
    wanted = [plain(inputs) for inputs in batches]
    found = []
    for node in nodes:
        changed = outputs_of(_only(model, node, variant, rules, ranges))
        noise = Noise()
        for inputs, reference in zip(batches, wanted, strict=True):
            after = changed(inputs)
            for name, array in reference.items():
                noise.add(np.ravel(array), np.ravel(after[name]))
        total = max(1, sum(work.values()))
        found.append(Sensitivity(node.name, node.op_type, round(noise.sqnr_db, 2), work[node.name] / total))
    return tuple(sorted(found, key=lambda item: item.sqnr_db))


def first_batches(calibration: Calibration) -> list[Mapping[str, Array]]:
    """About ``SAMPLES`` samples, in the batches that they come in."""
    found, count = [], 0
    for inputs in chunks(calibration, SAMPLES):
        found.append(inputs)
        count += max((len(array) for array in inputs.values()), default=0)
        if count >= SAMPLES:
            break
    return found


def _work(model: ModelProto, nodes: list[NodeProto], batches: list[Mapping[str, Array]]) -> dict[str, int]:
    """Multiply-accumulates per layer, from the shapes of a real run."""
    sizes: dict[str, int] = {}
    wiring = Wiring(model)
    ends = {node.input[0] if node.op_type == "ConvTranspose" else node.output[0] for node in nodes}
    run = watch(model, ends)
    for inputs in batches:
        sizes.update({name: int(array.size) for name, array in run(inputs)})
    work = {}
    for node in nodes:
        weight = wiring.array(node.input[1])
        shape = () if weight is None else weight.shape
        depth = int(np.prod(shape[1:])) if node.op_type.startswith("Conv") else int(shape[1 - output_axis(node)])
        work[node.name] = sizes.get(node.input[0] if node.op_type == "ConvTranspose" else node.output[0], 0) * depth
    return work


def _only(model: ModelProto, node: NodeProto, variant: Variant, rules: QuantizationRules, ranges: Ranges) -> ModelProto:
    made = ModelProto()
    made.CopyFrom(model)
    position = next(index for index, other in enumerate(made.graph.node) if other.name == node.name)
    target = made.graph.node[position]
    weight = Wiring(made).array(target.input[1])
    assert weight is not None
    fresh = f"{node.name}::weight"
    axis = (output_axis(node) if variant.per_channel else None) if node.op_type != "MatMul" else _last(variant, weight)
    made.graph.initializer.append(numpy_helper.from_array(rounded(weight, axis, rules.reduce_range), fresh))
    target.input[1] = fresh
    before = [(target.input[0], f"{node.name}::input")]
    extra = _pair(made, *before[0], ranges, rules) if variant.kind == "static" else []
    if extra:
        target.input[0] = f"{node.name}::input"
    after: list[NodeProto] = []
    if variant.kind == "static" and variant.operators is None and node.output[0] in ranges:
        after = _behind(made, target, ranges, rules)
    nodes = [*made.graph.node[:position], *extra, target, *after, *made.graph.node[position + 1 :]]
    kept = [NodeProto.FromString(item.SerializeToString()) for item in nodes]
    del made.graph.node[:]
    made.graph.node.extend(kept)
    return made


def _last(variant: Variant, weight: Array) -> int | None:
    return weight.ndim - 1 if variant.per_channel else None


def rounded(weight: Array, axis: int | None, seven_bits: bool = False) -> Array:
    """A weight after symmetric int8 rounding: one scale, or one per index of ``axis``."""
    others = tuple(other for other in range(weight.ndim) if other != axis)
    peak = np.abs(weight).max(axis=others, keepdims=True) if axis is not None else np.abs(weight).max()
    levels = 63 if seven_bits else 127
    scale = np.where(peak > 0, peak / levels, 1.0)
    return np.asarray(np.clip(np.round(weight / scale), -levels, levels) * scale, np.float32)


def _behind(model: ModelProto, target: NodeProto, ranges: Ranges, rules: QuantizationRules) -> list[NodeProto]:
    """A pair between the layer and its readers; the tensor keeps its name for them."""
    name = target.output[0]
    if name in {value.name for value in model.graph.output}:
        return []
    inner = f"{target.name}::output"
    pair = _pair(model, inner, name, {inner: ranges[name]}, rules)
    if pair:
        target.output[0] = inner
    return pair


def _pair(model: ModelProto, source: str, result: str, ranges: Ranges, rules: QuantizationRules) -> list[NodeProto]:
    """QuantizeLinear and DequantizeLinear with the target's kind of activation; empty where the range is unknown."""
    if source not in ranges:
        return []
    low, high = ranges[source]
    signed, wide = rules.activation.startswith("int"), rules.activation.endswith("16")
    kind = np.dtype(rules.activation)
    levels = 65535 if wide else 255
    if rules.symmetric_activation:
        scale, zero = max(-low, high) / (levels // 2), 0 if signed else (levels + 1) // 2
    else:
        scale = (high - low) / levels
        zero = round(-low / scale) - ((levels + 1) // 2 if signed else 0) if scale > 0 else 0
    scale = scale if scale > 0 else 1.0
    names = [f"{result}::scale", f"{result}::zero"]
    model.graph.initializer.append(numpy_helper.from_array(np.array(scale, np.float32), names[0]))
    model.graph.initializer.append(numpy_helper.from_array(np.array(zero, kind), names[1]))
    domain = "com.microsoft" if wide else ""
    if wide and not any(entry.domain == domain for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(domain, 1))
    middle = f"{result}::bytes"
    return [
        helper.make_node("QuantizeLinear", [source, *names], [middle], name=f"{result}::q", domain=domain),
        helper.make_node("DequantizeLinear", [middle, *names], [result], name=f"{result}::dq", domain=domain),
    ]
