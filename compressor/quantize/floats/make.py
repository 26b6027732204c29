"""One float file below float32 from a prepared float32 graph: linted on calibration data, converted, on record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto, version_converter

from compressor.errors import StageError, sdk_errors
from compressor.models.onnx_graph import name_nodes, opset_of
from compressor.quantize.floats.convert import convert
from compressor.quantize.floats.emulate import emulated
from compressor.quantize.floats.formats import FORMATS, HALVES
from compressor.quantize.floats.fp8 import LAYERS, float8_emulated, float8_pairs
from compressor.quantize.floats.overflow import KEPT, lint_floats
from compressor.quantize.ranges import collect
from compressor.quantize.watch import Calibration
from compressor.types import LayerFact

STAGE = "quantize"
WIDEST_OPSET = {"bf16": 22}  # first in which Conv and pooling have a bfloat16 form


@dataclass(frozen=True)
class FloatFile:
    """The file; what stays float32 and why; the lint as facts; and the float32 file that computes the same on a
    processor, where ONNX Runtime runs these formats in another precision or not at all."""

    result: ModelProto
    skip: Mapping[str, str]
    facts: tuple[LayerFact, ...]
    stand_in: ModelProto


def make_float(
    model: ModelProto,
    name: str,
    calibration: Calibration,
    keep_float: Mapping[str, str],
    *,
    per_channel: bool = True,
    cache: Path | None = None,
) -> FloatFile:
    """``name`` is ``fp16``, ``bf16`` or ``fp8``. ``model`` is prepared; inputs and outputs keep their types.

    Raises :class:`StageError` when ONNX Runtime cannot run the float32 graph, or nothing can be converted.
    """
    if name not in HALVES:
        ranges = collect(model, calibration, "minmax", cache)
        pairs = float8_pairs(model, ranges, keep_float, per_channel=per_channel)
        return FloatFile(pairs, keep_float, (), float8_emulated(pairs))
    model, to = _raised(model, WIDEST_OPSET.get(name, 0)), FORMATS[name]
    findings = lint_floats(model, calibration, to)
    keep = {item.node: f"{item.what}: {item.fix}" for item in findings if item.fix == KEPT} | dict(keep_float)
    result, stay, half = convert(model, to, keep)
    layers = [node for node in model.graph.node if node.op_type in LAYERS]
    if all(node.name in stay for node in layers):
        why = next(iter(stay.values()), "it has no layers")
        raise StageError(f"no layer can become {name}: {why}", hint="Keep fp32 on this target.")
    facts = [
        LayerFact(STAGE, item.node, "kept-fp32", "float32", "float32", stay[item.node])
        if item.fix == KEPT
        else LayerFact(STAGE, item.node, "changed", "float32", name, f"{item.what}: {item.fix}")
        for item in findings
        if item.fix != KEPT or item.node in stay
    ]
    return FloatFile(result, stay, tuple(facts), emulated(result, half, to))


def _raised(model: ModelProto, opset: int) -> ModelProto:
    if opset_of(model) >= opset:
        return model
    with sdk_errors(StageError, f"raise the model to opset {opset}", hint="Export the model at a later opset."):
        model = version_converter.convert_version(model, opset)
    name_nodes(model)
    return model
