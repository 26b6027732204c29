"""NNCF's post-training quantization on ONNX: merged scales across branches and fast bias correction."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from onnx import ModelProto

from compressor.errors import StageError, sdk_errors
from compressor.profile import QuantizationRules
from compressor.quantize.variants import NNCF_HINT, Variant
from compressor.quantize.watch import Calibration, chunks

SUBSET = 300  # NNCF's default number of calibration items


def quantize_nncf(
    model: ModelProto,
    variant: Variant,
    rules: QuantizationRules,
    calibration: Calibration,
    skip: Mapping[str, str],
    attention: bool,
) -> ModelProto:
    """Quantize-dequantize pairs by NNCF. Only the fast bias correction is used: the other breaks on duplicate names.

    Raises :class:`StageError` when NNCF is missing or refuses the graph.
    """
    nncf = import_nncf()
    names = {node.name for node in model.graph.node}
    first = items(model, calibration)
    hint = "Leave `nncf` out of `engines`; ONNX Runtime's quantizer may take this graph."
    with silence(), sdk_errors(StageError, f"quantize with `{variant.name}`", hint=hint):
        ignored = nncf.IgnoredScope(names=sorted(set(skip) & names), validate=False)
        preset = nncf.QuantizationPreset
        result: ModelProto = nncf.quantize(
            model,
            nncf.Dataset(first),
            preset=preset.PERFORMANCE if rules.symmetric_activation else preset.MIXED,
            target_device=nncf.TargetDevice.CPU,
            subset_size=len(first),
            fast_bias_correction=True,
            model_type=nncf.ModelType.TRANSFORMER if attention else None,
            ignored_scope=ignored,
            advanced_parameters=_advanced(nncf, variant, rules),
        )
        return result


def items(model: ModelProto, calibration: Calibration) -> list[dict[str, Any]]:
    """At most ``SUBSET`` samples with the model's inputs. Raises :class:`StageError` when there are none."""
    fed = {value.name for value in model.graph.input}
    samples = ({name: array for name, array in one.items() if name in fed} for one in chunks(calibration, 1))
    first = list(islice(samples, SUBSET))
    if not first:
        raise StageError("there is no calibration data", hint="Raise `data.calibration`, or give more samples.")
    return first


def _advanced(nncf: Any, variant: Variant, rules: QuantizationRules) -> Any:
    """The variant and the target's rules in NNCF's words.

    SmoothQuant is off unless the recipe names it: it puts a Mul before every MatMul, which costs ONNX Runtime more than
    int8 gains (2.1 against 1.1 ms on a small BERT). The overflow fix (half the weight range) is ``reduce_range``.
    """
    from nncf.quantization.advanced_parameters import (
        AdvancedSmoothQuantParameters,
        OverflowFix,
        QuantizationMode,
        QuantizationParameters,
    )
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    asked = variant.corrections != "auto" and "smooth" in variant.corrections
    off_bias = variant.corrections != "auto" and "bias" not in variant.corrections
    more: dict[str, Any] = {}
    if rules.symmetric_activation:  # signed ones cannot be forced: NNCF's device tables refuse that on ONNX
        more["activations_quantization_params"] = QuantizationParameters(mode=QuantizationMode.SYMMETRIC)
    if not variant.per_channel:
        more["weights_quantization_params"] = QuantizationParameters(per_channel=False)
    if variant.calibration in ("minmax", "percentile"):
        estimator = RangeEstimatorParametersSet
        chosen = estimator.MINMAX if variant.calibration == "minmax" else estimator.MEAN_QUANTILE
        more["activations_range_estimator_params"] = chosen
    return nncf.AdvancedQuantizationParameters(
        overflow_fix=OverflowFix.ENABLE if rules.reduce_range else OverflowFix.DISABLE,
        disable_bias_correction=off_bias,
        smooth_quant_alphas=AdvancedSmoothQuantParameters(convolution=-1, matmul=0.95 if asked else -1),
        **more,
    )


def import_nncf() -> Any:
    """The library, imported quietly. Raises :class:`StageError` when it is not installed."""
    os.environ.setdefault("NNCF_CI", "1")  # NNCF's own switch: no telemetry is set up at import
    try:
        with silence():
            import nncf
    except ImportError as error:
        raise StageError("NNCF cannot be imported", hint=NNCF_HINT) from error
    return nncf


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """NNCF draws progress bars on stdout and logs on its own handlers."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
