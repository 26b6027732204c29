"""What a float16 or bfloat16 form of a graph would get wrong on calibration data: which node, by which value, and what
is done about it.

Looked at: every value a node reads or makes, against the format's end with a margin; sums inside a reduction; constants
that become infinite or zero; small denominators; angles and integers that the format cannot hold exactly.
LayerNormalization is not: its statistics are float32 in any file (``stash_type`` 1 of the ONNX operator).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from compressor.errors import StageError
from compressor.quantize.adjust.graph import attribute
from compressor.quantize.floats.formats import FloatFormat
from compressor.quantize.floats.masks import tame
from compressor.quantize.watch import Calibration, chunks, watch
from compressor.types import Array

MARGIN = 4.0  # calibration data is not all data
ANGLE = 2.0**-7  # radians that a rounded argument of a sine may be off
KEPT = "kept in float32"
SUMS = {"ReduceSum": 1, "ReduceMean": 1, "ReduceL1": 1, "ReduceL2": 2, "ReduceSumSquare": 2, "GlobalAveragePool": 1}
SMALL_MATTERS = {"Div": 1, "Log": 0, "Reciprocal": 0, "Sqrt": 0}  # operator -> the input whose small values decide
NEAR, FAR = 3, 8  # steps back that a small or an exact value is kept on


@dataclass(frozen=True)
class Finding:
    """One node, the value that does not fit, the whole sentence, and the fix."""

    node: str
    operator: str
    value: float
    what: str
    fix: str = KEPT


@dataclass
class _Seen:
    """Over all calibration data: largest and smallest nonzero magnitude per tensor, largest sum per reduction."""

    peak: dict[str, float] = field(default_factory=dict)
    least: dict[str, float] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)


def lint_floats(model: ModelProto, calibration: Calibration, to: FloatFormat) -> tuple[Finding, ...]:
    """All findings; ``model`` (prepared) is changed where the fix is another constant. Nodes whose fix is ``KEPT``
    are to be kept by the caller. Raises :class:`StageError` for empty data and for NaN in the float32 model itself."""
    findings = [Finding(*item) for item in tame(model, to.largest)]
    made = {name: node for node in model.graph.node for name in node.output if name}
    stored = {t.name: t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}
    seen = _observe(model, calibration)
    for name, tensor in stored.items():
        array = np.abs(numpy_helper.to_array(tensor).astype(np.float64))
        array = array[np.isfinite(array) & (array > 0)]
        seen.peak[name], seen.least[name] = float(array.max(initial=0)), float(array.min(initial=np.inf))
    for node in model.graph.node:
        for what, value, back in _problems(node, seen, stored, to):
            findings.append(Finding(node.name, node.op_type, value, what))
            findings += [
                Finding(other.name, other.op_type, value, f"feeds `{node.name}`, which {what}")
                for other in _before(node, back, made, stored)
            ]
    first = {(finding.node, finding.fix): finding for finding in reversed(findings)}
    return tuple(first.values())[::-1]


def _observe(model: ModelProto, calibration: Calibration) -> _Seen:
    seen = _Seen()
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        if node.op_type in SUMS:
            readers.setdefault(node.input[0], []).append(node)
    run = watch(model)
    for inputs in chunks(calibration):
        for name, array in run(inputs):
            if np.isnan(array).any():
                hint = "The fp32 model itself gives NaN on this data; check the preprocessing."
                raise StageError(f"activation `{name}` is NaN on the calibration data", hint=hint)
            size = np.abs(array)
            shown = size[np.isfinite(size) & (size > 0)]
            seen.peak[name] = max(seen.peak.get(name, 0.0), float(shown.max(initial=0)))
            seen.least[name] = min(seen.least.get(name, np.inf), float(shown.min(initial=np.inf)))
            for node in readers.get(name, []):
                total = _sum(node, size, model)
                seen.sums[node.name] = max(seen.sums.get(node.name, 0.0), total)
    if not seen.peak:
        raise StageError("there is no calibration data", hint="Raise `data.calibration`, or give more samples.")
    return seen


def _sum(node: NodeProto, size: Array, model: ModelProto) -> float:
    """The largest sum of magnitudes (or squares) that a reduction forms on the way to its result."""
    axes = next((list(item.ints) for item in node.attribute if item.name == "axes"), [])
    if len(node.input) > 1:
        fixed = next((t for t in model.graph.initializer if t.name == node.input[1]), None)
        axes = [] if fixed is None else numpy_helper.to_array(fixed).reshape(-1).tolist()
    if node.op_type == "GlobalAveragePool":
        axes = list(range(2, size.ndim))
    elif not axes and attribute(node, "noop_with_empty_axes", 0):
        return 0.0
    powered = np.where(np.isfinite(size), size, 0).astype(np.float64) ** SUMS[node.op_type]
    return float(powered.sum(axis=tuple(axes) or None).max(initial=0))


def _problems(
    node: NodeProto, seen: _Seen, stored: Mapping[str, TensorProto], to: FloatFormat
) -> Iterator[tuple[str, float, int]]:
    """What is wrong, by which value, and how many steps back the values must stay float32."""
    for name in (*node.input, *node.output):
        peak = seen.peak.get(name, 0.0)
        margin = 1.0 if name in stored else MARGIN
        if peak * margin > to.largest:
            verb = "reads the constant" if name in stored else "makes" if name in node.output else "reads"
            yield f"{verb} `{name}` of up to {peak:.3g}; {to.name} ends at {to.largest:.5g}", peak, 0
    total = seen.sums.get(node.name, 0.0)
    if total * MARGIN > to.largest:
        yield f"adds up to {total:.3g} inside; {to.name} ends at {to.largest:.5g}", total, 0
    for name in node.input:
        least = seen.least.get(name, np.inf) if name in stored else np.inf
        if least <= to.smallest / 2 and seen.peak[name] <= to.smallest / 2:
            yield f"reads the constant `{name}` of {least:.3g}, which is 0 in {to.name}", least, 0
    yield from _inexact(node, seen, to)


def _inexact(node: NodeProto, seen: _Seen, to: FloatFormat) -> Iterator[tuple[str, float, int]]:
    place = SMALL_MATTERS.get(node.op_type)
    if place is not None and seen.least.get(node.input[place], np.inf) < to.normal:
        least = seen.least[node.input[place]]
        yield f"needs values as small as {least:.3g}; {to.name} loses bits below {to.normal:.3g}", least, NEAR
    if node.op_type in ("Sin", "Cos"):
        peak = seen.peak.get(node.input[0], 0.0)
        if peak / to.exact > ANGLE:
            yield f"takes angles of up to {peak:.3g}, off by {peak / to.exact:.2g} in {to.name}", peak, FAR
    if node.op_type == "Cast" and node.input[0] not in seen.peak and seen.peak.get(node.output[0], 0.0) > to.exact:
        peak = seen.peak[node.output[0]]
        yield f"makes the integer {peak:.0f}; {to.name} holds all of them up to {to.exact} only", peak, 0


def _before(
    node: NodeProto, steps: int, made: Mapping[str, NodeProto], stored: Mapping[str, TensorProto]
) -> Iterator[NodeProto]:
    """Nodes that make what ``node`` reads, up to the next layer with a weight."""
    names, known = list(node.input), {node.name}
    for _ in range(steps):
        nodes = [made[name] for name in names if name in made and made[name].name not in known]
        nodes = [n for n in nodes if not any(len(stored[name].dims) > 1 for name in n.input if name in stored)]
        yield from nodes
        known |= {item.name for item in nodes}
        names = [name for item in nodes for name in item.input]
