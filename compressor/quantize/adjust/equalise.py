"""Cross-layer equalisation: two layers with a positively homogeneous operator between them share a channel's scale so
that one scale per tensor fits all channels (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
Correction", ICCV 2019). The float function does not change."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto

from compressor.quantize.adjust.graph import Wiring, along, attribute, bias_of, output_axis
from compressor.types import Array, LayerFact

# f(s x) = s f(x) for every s > 0, channel by channel. Clip (ReLU6) is not among them: its upper end is fixed.
HOMOGENEOUS = ("Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "Identity")
ROUNDS = 20
LARGEST = 32.0  # a factor beyond this says that a channel is dead, not that it is quiet


@dataclass(frozen=True)
class Pair:
    """A layer and the one that alone reads it."""

    first: NodeProto
    second: NodeProto


def equalise(model: ModelProto) -> tuple[LayerFact, ...]:
    """Equalise ``model`` in place; one fact per layer whose scales moved, and none where nothing could be done."""
    wiring = Wiring(model)
    pairs = _pairs(wiring)
    total: dict[str, Array] = {}
    for _ in range(ROUNDS):
        change = 0.0
        for pair in pairs:
            factor = _factor(pair, wiring)
            _apply(pair, factor, wiring)
            total[pair.first.name] = total.get(pair.first.name, np.ones_like(factor)) * factor
            change = max(change, float(np.abs(np.log(factor)).max()))
        if change < 1e-3:
            break
    facts = []
    for pair in pairs:
        spread = total[pair.first.name]
        if float(np.abs(np.log(spread)).max()) > 1e-2:
            by = f"{1 / spread.max():.2g} to {1 / spread.min():.2g}"
            reason = f"channels scaled by {by}, undone in `{pair.second.name}`"
            facts.append(LayerFact("quantize", pair.first.name, "equalised", "float32", "float32", reason))
    return tuple(facts)


def _pairs(wiring: Wiring) -> list[Pair]:
    found = []
    for node in wiring.model.graph.node:
        if node.op_type not in ("Conv", "Gemm") or not wiring.own(node, 1):
            continue
        if node.op_type == "Gemm" and not _plain_gemm(node):
            continue
        if len(node.input) > 2 and bias_of(node, wiring) is None:
            continue
        after = _reader(node, wiring)
        if after is not None and _takes_factor(after, node, wiring):
            found.append(Pair(node, after))
    return found


def _reader(node: NodeProto, wiring: Wiring) -> NodeProto | None:
    """The next layer behind homogeneous operators only."""
    after = wiring.only_user(node.output[0])
    pooled = False
    while after is not None and (after.op_type in HOMOGENEOUS or (after.op_type == "Flatten" and pooled)):
        pooled = pooled or after.op_type == "GlobalAveragePool"  # Flatten keeps channels apart only when H = W = 1
        after = wiring.only_user(after.output[0])
    return after


def _plain_gemm(node: NodeProto) -> bool:
    plain = all(item.f == 1.0 for item in node.attribute if item.name in ("alpha", "beta"))
    return plain and attribute(node, "transA", 0) == 0


def _takes_factor(node: NodeProto, first: NodeProto, wiring: Wiring) -> bool:
    if node.op_type not in ("Conv", "Gemm") or not wiring.own(node, 1) or node.input[1] == first.input[1]:
        return False
    weight, channels = wiring.array(node.input[1]), _channels(first, wiring)
    if weight is None:
        return False
    if node.op_type == "Gemm":
        return _plain_gemm(node) and weight.shape[1 - output_axis(node)] == channels
    group = attribute(node, "group", 1)
    return (group == 1 and weight.shape[1] == channels) or (group == channels and weight.shape[1] == 1)


def _channels(node: NodeProto, wiring: Wiring) -> int:
    weight = wiring.array(node.input[1])
    return 0 if weight is None else int(weight.shape[output_axis(node)])


def _largest(weight: Array, axis: int) -> Array:
    others = tuple(other for other in range(weight.ndim) if other != axis)
    return np.asarray(np.abs(weight).max(axis=others))


def _input_view(node: NodeProto, weight: Array, channels: int) -> tuple[Array, int]:
    """The weight with its input channels along the axis that is returned; a depthwise one has an output for each."""
    if node.op_type == "Gemm":
        return weight, 1 - output_axis(node)
    depthwise = attribute(node, "group", 1) == channels and weight.shape[1] == 1 and channels > 1
    if not depthwise:
        return weight, 1
    return weight.reshape(channels, -1), 0


def _factor(pair: Pair, wiring: Wiring) -> Array:
    """s with W1[c] / s and W2[:, c] * s equally large: sqrt(r1 / r2)."""
    first, second = wiring.array(pair.first.input[1]), wiring.array(pair.second.input[1])
    assert first is not None and second is not None  # noqa: PT018 - _pairs looked
    above = _largest(first, output_axis(pair.first))
    below = _largest(*_input_view(pair.second, second, len(above)))
    alive = (above > 0) & (below > 0)
    factor = np.sqrt(np.divide(above, below, out=np.ones_like(above), where=alive))
    return np.asarray(np.clip(np.where(alive, factor, 1.0), 1 / LARGEST, LARGEST))


def _apply(pair: Pair, factor: Array, wiring: Wiring) -> None:
    first, second = wiring.array(pair.first.input[1]), wiring.array(pair.second.input[1])
    assert first is not None and second is not None  # noqa: PT018
    wiring.set(pair.first.input[1], first / along(factor, first.ndim, output_axis(pair.first)))
    bias = bias_of(pair.first, wiring)
    if bias is not None:
        name = bias[0].input[bias[1]]
        stored = wiring.array(name)
        assert stored is not None
        wiring.set(name, stored / factor)
    view, axis = _input_view(pair.second, second, len(factor))
    wiring.set(pair.second.input[1], (view * along(factor, view.ndim, axis)).reshape(second.shape))
