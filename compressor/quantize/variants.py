"""Which int8 variants of a model are worth building for a target, and why the others are not."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from compressor.models.onnx_facts import ModelFacts
from compressor.profile import QuantizationRules
from compressor.quantize.weights.methods import Method
from compressor.recipe import Correction, QuantizeStage

AUTO_METHOD: dict[int, Method] = {8: "rtn", 4: "gptq"}  # docs/evidence/weight-only.md
NNCF_METHODS = ("awq", "scale-estimation")  # of the data-aware ones its ONNX side knows these
FLOATS = ("fp16", "bf16", "fp8")
FLOAT_LAYERS = ("Conv", "Gemm", "MatMul")
WEIGHTED_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
TRANSFORMER_OPERATORS = ("Gather", "Gemm", "MatMul")
NNCF_HINT = "NNCF is not installed; `pip install nncf` (or `compress-for-device[train]`) adds it"
WHOLE_GRAPH_MASKED = (
    "attention with a mask: the mask constant (-1e4 or lower) would set the int8 scale of the scores and drown them "
    "(a BERT fell from 86 % to 14 % accuracy); only Gather, Gemm and MatMul with constant weights are quantized"
)
WHOLE_GRAPH_ATTENTION = (
    "attention: int8 Softmax and LayerNormalization cost accuracy and gain no time; only operators with constant "
    "weights are quantized"
)
DYNAMIC_CONVOLUTION = (
    "never for convolutions: ONNX Runtime's ConvInteger ran 4 to 10 times slower than the fp32 convolution"
)


@dataclass(frozen=True)
class Variant:
    """One way to make a model int8. ``operators`` None: the whole graph, wherever an int8 kernel exists."""

    name: str
    engine: Literal["onnxruntime", "nncf"]
    kind: Literal["static", "dynamic", "weights", "float"]
    per_channel: bool = True
    operators: tuple[str, ...] | None = None
    calibration: Literal["auto", "minmax", "percentile", "entropy", "mse"] = "minmax"
    corrections: tuple[Correction, ...] | Literal["auto"] = ()
    bits: Literal[4, 8] = 8  # of weights; with ``weights`` alone also 4
    group: int = 0  # input rows that share a scale (``weights`` alone)
    method: Method = "rtn"  # which point of the grid a weight takes (``weights`` alone)


def variants(
    config: QuantizeStage, rules: QuantizationRules, facts: ModelFacts, precisions: Sequence[str] = ()
) -> tuple[tuple[Variant, ...], Mapping[str, str]]:
    """The variants to build, and name -> reason for every one that is not. ``precisions`` are the profile's.

    >>> # a CNN on a CPU: static per channel, static per tensor, and NNCF's; `int8-dynamic-ort` is rejected
    """
    chosen, rejected = _floats(config, facts, precisions)
    blocked = _blocked(rules, facts)
    if blocked:
        return tuple(chosen), {**rejected, "int8": blocked}
    for variant in _candidates(config, rules, facts):
        reason = _reason(variant, config, rules, facts)
        if reason:
            rejected[variant.name] = reason
        else:
            chosen.append(variant)
    if _operators(rules, facts) is not None and not rules.weighted_only:
        reason = WHOLE_GRAPH_MASKED if facts.has_masked_attention else WHOLE_GRAPH_ATTENTION
        rejected["int8-static-whole-graph"] = reason
    return tuple(chosen), rejected


def _floats(
    config: QuantizeStage, facts: ModelFacts, precisions: Sequence[str]
) -> tuple[list[Variant], dict[str, str]]:
    """Float formats below float32 that the target's compiler takes; asked for by name and not taken: a reason."""
    if facts.quantized or not facts.weighted:
        return [], {}
    wanted = FLOATS if config.floats == "auto" else config.floats
    chosen = [Variant(name, "onnxruntime", "float", True, FLOAT_LAYERS) for name in wanted if name in precisions]
    missing = [name for name in wanted if name not in precisions and config.floats != "auto"]
    return chosen, {name: f"the profile's compiler does not take {name} (`constraints.precisions`)" for name in missing}


def _blocked(rules: QuantizationRules, facts: ModelFacts) -> str:
    """Why no int8 variant at all makes sense; empty when some may."""
    if not rules.int8:
        return "the target takes no int8"
    if facts.quantized:
        found = sorted(name for name in facts.operators if "Quant" in name or "Integer" in name or name.startswith("Q"))
        return f"the model is already quantized ({', '.join(found) or 'int8 operators'}); it is used as it is"
    if facts.quantizable:
        return ""
    inside = next((node for node in facts.weighted if node.inside), None)
    if inside:
        where = f"`{inside.name}` in `{inside.inside}`"
        return f"every weighted operator stands in a nested graph ({where}), which no engine quantizes"
    after = next((node for node in facts.weighted if node.after), None)
    if after:
        return f"shapes depend on data: `{after.name}` comes after `{after.after}`, so ranges cannot be calibrated"
    recurrent = sorted({node.operator for node in facts.weighted} & {"LSTM", "GRU", "RNN"})
    if recurrent:
        return f"only recurrent layers ({', '.join(recurrent)}) hold weights, and their int8 form is not portable"
    return "it has no Conv, Gemm or MatMul with constant weights"


def _candidates(config: QuantizeStage, rules: QuantizationRules, facts: ModelFacts) -> list[Variant]:
    operators = _operators(rules, facts)
    tag = "static" if operators is None or rules.weighted_only else "static-weighted"
    given: Any = {"operators": operators, "corrections": config.corrections}
    method = config.calibration
    found = [
        Variant("int8-dynamic-ort", "onnxruntime", "dynamic", rules.per_channel, TRANSFORMER_OPERATORS),
        Variant(f"int8-{tag}-per-channel-nncf", "nncf", "static", True, calibration=method, **given),
    ]
    if config.engines == ("nncf",):
        found.append(Variant(f"int8-{tag}-per-tensor-nncf", "nncf", "static", False, calibration=method, **given))
    if rules.whole_graph and facts.has_attention:  # slower, and more accurate where a whole graph loses too much
        weighted = {**given, "operators": TRANSFORMER_OPERATORS, "calibration": method}
        found.append(Variant("int8-static-weighted-per-channel-ort", "onnxruntime", "static", True, **weighted))
    found += [variant for name in config.weights for variant in _weights(name, config)]
    return [
        Variant(f"int8-{tag}-per-channel-ort", "onnxruntime", "static", True, calibration=method, **given),
        Variant(f"int8-{tag}-per-tensor-ort", "onnxruntime", "static", False, calibration=method, **given),
        *found,
    ]


def _weights(name: Literal["int8", "int4"], config: QuantizeStage) -> list[Variant]:
    """The weight-only files of a precision. ``auto`` spends calibration data only where few bits need it."""
    bits: Literal[4, 8] = 4 if name == "int4" else 8
    method: Method = config.weight_method if config.weight_method != "auto" else AUTO_METHOD[bits]
    tag = name + "-weights" + ("" if method == "rtn" else f"-{method}")
    given: Any = {"operators": ("MatMul",), "bits": bits, "group": config.group, "method": method}
    found = [Variant(f"{tag}-ort", "onnxruntime", "weights", **given)]
    if config.weight_method in NNCF_METHODS and bits == 4:
        found.append(Variant(f"{tag}-nncf", "nncf", "weights", **given))
    return found


def _operators(rules: QuantizationRules, facts: ModelFacts) -> tuple[str, ...] | None:
    if rules.weighted_only:
        return WEIGHTED_OPERATORS
    if rules.whole:
        return None
    if facts.has_attention and not facts.has_convolutions:
        return TRANSFORMER_OPERATORS
    if facts.has_masked_attention:
        return ("Gather", *WEIGHTED_OPERATORS)
    return None  # convolutions lead, also beside plain attention: fencing them in with float operators costs more


def _reason(variant: Variant, config: QuantizeStage, rules: QuantizationRules, facts: ModelFacts) -> str:
    """Why this variant is not built; empty when it is."""
    scheme = "dynamic" if variant.kind == "dynamic" else f"static-per-{'channel' if variant.per_channel else 'tensor'}"
    if variant.engine not in config.engines:
        return f"the recipe asks for {', '.join(config.engines)} only"
    if variant.kind == "weights":
        missing = variant.engine == "nncf" and not importlib.util.find_spec("nncf")
        return NNCF_HINT if missing else _weights_reason(rules, facts)
    if config.schemes != "auto" and scheme not in config.schemes:
        return f"the recipe asks for {', '.join(config.schemes)} only"
    if variant.kind == "dynamic":
        return _dynamic_reason(rules, facts)
    if variant.per_channel and not rules.per_channel:
        return "the target takes one scale per weight tensor only"
    if variant.engine == "nncf":
        return _nncf_reason(variant, rules)
    return ""


def _weights_reason(rules: QuantizationRules, facts: ModelFacts) -> str:
    if not rules.dynamic:
        return "MatMulNBits is an operator of ONNX Runtime, which this target does not read"
    if not any(node.operator == "MatMul" for node in facts.quantizable):
        return "it has no MatMul with a constant weight"
    return ""


def _dynamic_reason(rules: QuantizationRules, facts: ModelFacts) -> str:
    if not rules.dynamic:
        return "the target has no kernels that quantize activations at run time"
    products = [node for node in facts.quantizable if node.operator in ("Gemm", "MatMul")]
    if not products:
        return DYNAMIC_CONVOLUTION
    if facts.has_convolutions and not facts.has_attention:
        return DYNAMIC_CONVOLUTION
    return ""


def _nncf_reason(variant: Variant, rules: QuantizationRules) -> str:
    if rules.activation != "uint8" or rules.weight != "int8":
        writes = "NNCF writes unsigned 8-bit activations behind a ReLU and cannot be told otherwise"
        return f"{writes}; this target takes {rules.activation} activations and {rules.weight} weights"
    if variant.calibration in ("entropy", "mse"):
        return f"NNCF chooses ranges by minmax or percentile, not by {variant.calibration}"
    return "" if importlib.util.find_spec("nncf") else NNCF_HINT
