"""SmoothQuant without a cost at run time: outliers move from an activation into the weights that read it, and the
inverse factor goes into whatever makes the activation (Xiao et al., SmoothQuant, ICML 2023).

Engines insert a Mul where they cannot fold; on ONNX Runtime that costs more than int8 gains, so here a factor is only
moved where it folds exactly: into LayerNormalization, into a bias-and-weight behind ReLU or nothing, and through the
attention product from the output projection into the value projection.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import ModelProto, NodeProto

from compressor.quantize.adjust.graph import Wiring, along, bias_of
from compressor.quantize.watch import Calibration, chunks, watch
from compressor.types import Array, LayerFact

ALPHA = 0.5  # the paper's usual strength
SEEN_THROUGH = ("Reshape", "Transpose", "Relu", "Identity")


def smooth(model: ModelProto, calibration: Calibration) -> tuple[LayerFact, ...]:
    """Smooth ``model`` in place wherever it folds; one fact per tensor. Exactness is the caller's to check: a Reshape
    that mixes channels would break it (:func:`compressor.quantize.adjust.search.quantize_best` does)."""
    wiring = Wiring(model)
    sites = _sites(wiring)
    largest = _largest(model, calibration, set(sites))
    facts = []
    for name, readers in sites.items():
        factor = _factor(largest.get(name), readers, wiring)
        if factor is None or not _fold(name, factor, wiring):
            continue
        for node in readers:
            weight = wiring.array(node.input[1])
            assert weight is not None
            wiring.set(node.input[1], weight * along(factor, 2, 0))
        reason = f"input channels divided by {factor.min():.2g} to {factor.max():.2g}, folded into what makes them"
        facts += [LayerFact("quantize", node.name, "smoothed", "float32", "float32", reason) for node in readers]
    return tuple(facts)


def _sites(wiring: Wiring) -> dict[str, list[NodeProto]]:
    """Tensors that only MatMuls with own constant weights read, with these."""
    found: dict[str, list[NodeProto]] = {}
    for name, users in wiring.users.items():
        if name in wiring.outputs or name not in wiring.made:
            continue
        fits = [n for n in users if n.op_type == "MatMul" and n.input[0] == name and wiring.own(n, 1)]
        if fits and len(fits) == len(users) and _folds(name, wiring) is not None:
            found[name] = fits
    return found


def _largest(model: ModelProto, calibration: Calibration, names: set[str]) -> Mapping[str, Array]:
    """Largest magnitude per channel (last axis) of each tensor."""
    found: dict[str, Array] = {}
    if not names:
        return found
    run = watch(model, names)
    for inputs in chunks(calibration):
        for name, array in run(inputs):
            if name in names:
                peak = np.abs(array).reshape(-1, array.shape[-1]).max(axis=0)
                found[name] = np.maximum(found.get(name, peak), peak)
    return found


def _factor(peak: Array | None, readers: list[NodeProto], wiring: Wiring) -> Array | None:
    if peak is None:
        return None
    weights = [wiring.array(node.input[1]) for node in readers]
    rows = np.max([np.abs(weight).max(axis=1) for weight in weights if weight is not None], axis=0)
    if rows.shape != peak.shape:
        return None
    alive = (peak > 0) & (rows > 0)
    safe_peak, safe_rows = np.where(alive, peak, 1.0), np.where(alive, rows, 1.0)
    return np.asarray(np.clip(safe_peak**ALPHA / safe_rows ** (1 - ALPHA), 1e-3, 1e3), np.float32)


def _folds(name: str, wiring: Wiring) -> tuple[NodeProto, str] | None:
    """The node that can take the inverse factor, and how: ``norm`` (scale and bias) or ``linear`` (weight and bias)."""
    node: NodeProto | None = wiring.made.get(name)
    for _ in range(10):
        if node is None:
            return None
        if node.op_type == "LayerNormalization":
            alone = all(wiring.own(node, place) for place in range(1, len(node.input)))
            return (node, "norm") if alone and node.output[0] == name else None
        if node.op_type == "MatMul" and wiring.own(node, 1):
            return node, "linear"
        step = _step(node, wiring)
        if step is None or wiring.only_user(step) is None:
            return None
        node = wiring.made.get(step)
    return None


def _step(node: NodeProto, wiring: Wiring) -> str | None:
    """The tensor before ``node`` on the channel's way, when a positive factor per channel passes through."""
    if node.op_type in SEEN_THROUGH:
        return str(node.input[0])
    if node.op_type == "MatMul" and wiring.array(node.input[0]) is None:  # probabilities x values
        return str(node.input[1])
    if node.op_type == "Add":
        stored = [position for position in (0, 1) if wiring.own(node, position)]
        return str(node.input[1 - stored[0]]) if len(stored) == 1 else None
    return None


def _fold(name: str, factor: Array, wiring: Wiring) -> bool:
    found = _folds(name, wiring)
    if found is None:
        return False
    node, how = found
    if how == "norm":
        for position in range(1, len(node.input)):
            stored = wiring.array(node.input[position])
            if stored is None or stored.shape != factor.shape:
                return False
        for position in range(1, len(node.input)):
            stored = wiring.array(node.input[position])
            assert stored is not None
            wiring.set(node.input[position], stored / factor)
        return True
    weight = wiring.array(node.input[1])
    if weight is None or weight.ndim != 2 or weight.shape[1] != len(factor):
        return False
    after = wiring.only_user(node.output[0])
    bias = bias_of(node, wiring)
    if after is None or (after.op_type == "Add" and bias is None):
        return False
    wiring.set(node.input[1], weight / along(factor, 2, 1))
    if bias is not None:
        stored = wiring.array(bias[0].input[bias[1]])
        assert stored is not None
        wiring.set(bias[0].input[bias[1]], stored / factor)
    return True
