"""One static int8 file by ONNX Runtime's quantizer, with whatever makes it agree best with fp32.

What cannot be known beforehand is measured: every way to choose ranges and every correction is tried on the calibration
data, without labels, and kept when the outputs' signal-to-noise ratio rises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto

from compressor.errors import StageError
from compressor.profile import QuantizationRules
from compressor.quantize import ort
from compressor.quantize.adjust.bias import correct_bias
from compressor.quantize.adjust.equalise import equalise
from compressor.quantize.adjust.smooth import smooth
from compressor.quantize.ranges import METHODS, Method, collect
from compressor.quantize.variants import Variant
from compressor.quantize.watch import Calibration, output_sqnr_db
from compressor.types import LayerFact

GAIN_DB = 0.2  # less than this is not worth a changed graph
EXACT_DB = 80.0  # a float graph that was only rewritten agrees with itself at least this well


@dataclass(frozen=True)
class Adjusted:
    """The int8 model, the float model it was made of, and what was tried. ``sqnr_db`` is None when nothing was."""

    result: ModelProto
    source: ModelProto
    calibration: Method
    corrections: tuple[str, ...]
    sqnr_db: float | None
    tried: Mapping[str, float]
    facts: tuple[LayerFact, ...]


class _Search:
    """The state of one search: the best file so far."""

    def __init__(
        self,
        model: ModelProto,
        variant: Variant,
        rules: QuantizationRules,
        calibration: Calibration,
        skip: Mapping[str, str],
        cache: Path | None,
    ) -> None:
        self.original, self.variant, self.rules, self.calibration = model, variant, rules, calibration
        self.skip, self.cache = skip, cache
        self.tried: dict[str, float] = {}
        self.measures = variant.calibration == "auto" or (
            variant.corrections == "auto" and bool(usual_corrections(variant, model))
        )

    def make(self, source: ModelProto, method: Method) -> ModelProto:
        ranges = collect(source, self.calibration, method, self.cache)
        return ort.quantize_static(source, self.variant, self.rules, ranges, self.skip)

    def quality(self, label: str, result: ModelProto) -> float:
        self.tried[label] = round(output_sqnr_db(self.original, result, self.calibration), 2)
        return self.tried[label]

    def first(self) -> Adjusted:
        """The plain file with the best ranges."""
        wanted: tuple[Method, ...] = METHODS if self.variant.calibration == "auto" else (self.variant.calibration,)
        best: Adjusted | None = None
        for method in wanted:
            result = self.make(self.original, method)
            quality = self.quality(method, result) if self.measures else None
            if best is None or (quality or 0.0) > (best.sqnr_db or 0.0):
                best = Adjusted(result, self.original, method, (), quality, self.tried, ())
        assert best is not None
        return best

    def with_change(self, best: Adjusted, name: str, change: Callable[[ModelProto], tuple[LayerFact, ...]]) -> Adjusted:
        """``best`` with one more correction, or ``best`` itself where that does not help."""
        source = ModelProto()
        source.CopyFrom(best.source)
        facts = change(source)
        if not facts:
            return best
        if name != "bias" and output_sqnr_db(self.original, source, self.calibration) < EXACT_DB:
            return best  # the pattern was not what it looked like: the float function changed
        result = self.make(source, best.calibration)
        quality = self.quality("+".join([best.calibration, *best.corrections, name]), result) if self.measures else None
        better = quality is None or best.sqnr_db is None or quality > best.sqnr_db + GAIN_DB
        if not better and self.variant.corrections == "auto":
            return best
        corrections, known = (*best.corrections, name), (*best.facts, *facts)
        return Adjusted(result, source, best.calibration, corrections, quality, self.tried, known)


def usual_corrections(variant: Variant, model: ModelProto) -> tuple[str, ...]:
    """What ``auto`` tries: equalisation where one scale serves many channels, smoothing for transformers, and the
    correction of biases always."""
    depthwise = any(
        item.name == "group" and item.i > 1
        for node in model.graph.node
        if node.op_type == "Conv"
        for item in node.attribute
    )
    transformer = any(node.op_type == "Softmax" for node in model.graph.node) and variant.operators is not None
    tried = [
        ("equalise", not variant.per_channel or depthwise),
        ("smooth", transformer),
        ("bias", True),
    ]
    return tuple(name for name, wanted in tried if wanted)


def quantize_best(
    model: ModelProto,
    variant: Variant,
    rules: QuantizationRules,
    calibration: Calibration,
    skip: Mapping[str, str],
    cache: Path | None = None,
) -> Adjusted:
    """Quantize with the variant's ranges and corrections; ``model`` is not changed.

    Corrections that the recipe names are made without asking whether they help; ``auto`` keeps those that raise the
    SQNR of the outputs by ``GAIN_DB`` on the calibration data. Raises :class:`StageError` as the engine does.
    """
    search = _Search(model, variant, rules, calibration, skip, cache)
    best = search.first()
    wanted = usual_corrections(variant, model) if variant.corrections == "auto" else variant.corrections
    for name in wanted:
        made = best.result
        changes: dict[str, Callable[[ModelProto], tuple[LayerFact, ...]]] = {
            "equalise": equalise,
            "smooth": lambda source: smooth(source, calibration),
            "bias": lambda source, made=made: correct_bias(source, made, calibration),  # type: ignore[misc]
        }
        try:
            best = search.with_change(best, name, changes[name])
        except StageError:
            if variant.corrections != "auto":
                raise
    return best
