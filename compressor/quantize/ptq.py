"""Post-training quantization: one artifact in, one int8 artifact out, proved to run."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto

from compressor.errors import Problem, StageError, sdk_errors
from compressor.models.onnx_facts import describe_model
from compressor.models.onnx_graph import graph_inputs, metadata_of, read_model, save_model, set_metadata
from compressor.profile import QuantizationRules
from compressor.quantize import nncf_engine, ort
from compressor.quantize.adjust import quantize_best
from compressor.quantize.adjust.equalise import equalise
from compressor.quantize.checks.lint import lint
from compressor.quantize.checks.saturation import saturation_facts
from compressor.quantize.coverage import layer_facts
from compressor.quantize.floats import make_float
from compressor.quantize.nncf_weights import compress_weights
from compressor.quantize.prepare import prepare
from compressor.quantize.variants import Variant
from compressor.quantize.watch import Calibration, chunks
from compressor.quantize.weights import quantize_weights
from compressor.types import Array, Artifact, Inputs, LayerFact, file_digest, stand_in_path


def quantize(
    source: Artifact,
    variant: Variant,
    rules: QuantizationRules,
    calibration: Calibration,
    out: Path,
    *,
    cache: Path | None = None,
    keep_float: Mapping[str, str] | None = None,
) -> Artifact:
    """Write the int8 file ``out`` and describe it; ``source`` is read, never written.

    ``calibration`` gives batches of model inputs, anew at each call. ``cache`` is a folder where activation ranges are
    kept for the next variant. ``keep_float`` maps nodes that must stay float to the reason.

    The result has the source's inputs, outputs and metadata, an account of every layer (``facts``) and its ``scheme``.
    It is held against the target's rules before it is written; the last step loads it in stock ONNX Runtime and runs
    it. A file that the target would refuse, and anything but finite results of the right shapes, raises
    :class:`StageError`.
    """
    if out.resolve() == source.path.resolve():
        raise StageError("the quantized file would replace its source", hint="Give another output path.")
    original = read_model(source.path)
    model = prepare(original)
    if not any(tensor.data_type == onnx.TensorProto.FLOAT for tensor in model.graph.initializer):
        raise StageError(f"`{source.name}` has no float32 weights to quantize", hint="Give the fp32 export.")
    made = _engine(model, variant, rules, calibration, cache, keep_float or {})
    _restore(made.result, original)
    if variant.kind != "float":  # the rules are those of the target's int8
        _refuse(lint(made.result, rules), variant)
    save_model(made.result, out)
    runs = stand_in_path(out) if made.stand_in is not None else out
    try:
        if made.stand_in is not None:
            save_model(made.stand_in, runs)
        agreement = prove(source.path, runs, calibration)
    except StageError:
        out.unlink(missing_ok=True)
        runs.unlink(missing_ok=True)
        raise
    layers = () if variant.kind == "float" else _layers(model, made, variant)
    facts = (*made.facts, *layers)  # what became of a layer stands last
    if rules.saturates and variant.kind != "float":
        facts += saturation_facts(made.result, calibration)
    artifact = _artifact(source, variant, rules, out, facts, agreement)
    return dataclasses.replace(artifact, scheme={**artifact.scheme, **made.scheme})


def _layers(model: ModelProto, made: _Made, variant: Variant) -> tuple[LayerFact, ...]:
    return layer_facts(model, made.result, made.skip, variant.operators, f"int{variant.bits}")


@dataclasses.dataclass(frozen=True)
class _Made:
    """What an engine gave back: the file, what stayed float and why, and what was done to the float graph before."""

    result: ModelProto
    skip: Mapping[str, str]
    facts: tuple[LayerFact, ...] = ()
    scheme: Mapping[str, str] = dataclasses.field(default_factory=dict)
    stand_in: ModelProto | None = None  # runs in ONNX Runtime where the result itself does not


def _engine(
    model: ModelProto,
    variant: Variant,
    rules: QuantizationRules,
    calibration: Calibration,
    cache: Path | None,
    keep_float: Mapping[str, str],
) -> _Made:
    if variant.kind == "weights":
        return _weights_only(model, variant, calibration, keep_float)
    if variant.kind == "float":
        return _float(model, variant, rules, calibration, cache, keep_float)
    if variant.kind == "dynamic":
        return _Made(*ort.quantize_dynamic(model, variant, rules, keep_float))
    skip = ort.static_skips(model, variant, rules) | dict(keep_float)
    if variant.engine == "nncf":
        attention = describe_model(model, 0).has_attention
        facts: tuple[LayerFact, ...] = ()
        if variant.corrections != "auto" and "equalise" in variant.corrections:
            facts = equalise(model)
        result = nncf_engine.quantize_nncf(model, variant, rules, calibration, skip, attention)
        method = "NNCF's default" if variant.calibration == "auto" else variant.calibration
        return _Made(result, skip, facts, {"calibration": method})
    best = quantize_best(model, variant, rules, calibration, skip, cache)
    scheme = {"calibration": best.calibration, "corrections": ", ".join(best.corrections) or "none"}
    if best.tried:
        scheme["tried"] = ", ".join(f"{name} {quality:.1f} dB" for name, quality in best.tried.items())
    return _Made(best.result, skip, best.facts, scheme)


def _float(
    model: ModelProto,
    variant: Variant,
    rules: QuantizationRules,
    calibration: Calibration,
    cache: Path | None,
    keep_float: Mapping[str, str],
) -> _Made:
    """float16 or bfloat16 throughout, or float8 pairs; and every layer in the facts."""
    made = make_float(model, variant.name, calibration, keep_float, per_channel=rules.per_channel, cache=cache)
    weighted = [node for node in model.graph.node if node.op_type in (variant.operators or ())]
    layers = tuple(
        LayerFact("quantize", node.name, "left-float", "float32", "float32", made.skip[node.name])
        if node.name in made.skip
        else LayerFact("quantize", node.name, "converted", "float32", variant.name)
        for node in weighted
    )
    kept = [fact for fact in made.facts if fact.layer not in {layer.layer for layer in layers}]
    pairs = variant.name == "fp8"
    scheme = {
        "activation": "float8 E4M3 symmetric" if pairs else variant.name,
        "weight": "float8 E4M3 symmetric" if pairs else variant.name,
        "granularity": ("per channel" if rules.per_channel else "per tensor") if pairs else "no scales",
        "calibration": "minmax" if pairs else "the overflow lint's",
        "bias": "float32" if pairs else variant.name,
        "kept in float32": str(len(made.skip)),
    }
    scheme["accuracy"] = f"off the device of a float32 emulation that rounds to {variant.name}"
    return _Made(made.result, made.skip, (*kept, *layers), scheme, made.stand_in)


def _weights_only(
    model: ModelProto, variant: Variant, calibration: Calibration, keep_float: Mapping[str, str]
) -> _Made:
    """Few-bit MatMul weights as one file. Bigger models than one file holds go through
    :func:`compressor.quantize.weights.quantize_weights` itself."""
    scheme = {
        "activation": "float32",
        "weight": f"int{variant.bits} asymmetric",
        "granularity": f"groups of {variant.group} input rows",
        "bias": "float32",
        "method": variant.method,
        "calibration": "none" if variant.method == "rtn" else "second moments of the layers' inputs",
    }
    if variant.engine == "nncf":
        made = compress_weights(model, variant.bits, variant.group, variant.method, calibration, set(keep_float))
        return _Made(made, keep_float, (), scheme)
    with tempfile.TemporaryDirectory(prefix="weights-") as folder:
        source, out = Path(folder) / "in.onnx", Path(folder) / "out.onnx"
        save_model(model, source)
        found = quantize_weights(
            source, out, bits=variant.bits, block=variant.group, skip=keep_float, method=variant.method,
            calibration=calibration,
        )  # fmt: skip
        result = read_model(out)
    skip = {fact.layer: fact.reason for fact in found if fact.action == "left-float"} | dict(keep_float)
    told = () if variant.method == "rtn" else tuple(fact for fact in found if fact.action == "quantized")
    return _Made(result, skip, tuple(dataclasses.replace(fact, action=variant.method) for fact in told), scheme)


def _refuse(problems: tuple[Problem, ...], variant: Variant) -> None:
    """A file that the target's compiler would refuse is not handed on."""
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        told = "; ".join(str(problem) for problem in problems[:3]) + more
        raise StageError(f"the target would refuse `{variant.name}`: {told}", hint="Take another engine or scheme.")


def _restore(result: ModelProto, original: ModelProto) -> None:
    """The source's interface and metadata; only the operator sets in use; nothing that names a temporary file."""
    for part, source in ((result.graph.input, original.graph.input), (result.graph.output, original.graph.output)):
        known = {value.name: value for value in source}
        for value in part:
            if value.name not in known:
                raise StageError(f"quantization renamed `{value.name}`", hint="Report this file.")
            value.CopyFrom(known[value.name])
    del result.graph.value_info[:]
    used = {node.domain for node in result.graph.node} | {""}
    kept = [entry for entry in result.opset_import if entry.domain in used]
    del result.opset_import[:]
    result.opset_import.extend(sorted(kept, key=lambda entry: entry.domain))
    read = {name for node in result.graph.node for name in node.input} | {value.name for value in result.graph.output}
    nested = any(attribute.HasField("g") for node in result.graph.node for attribute in node.attribute)
    if not nested:
        weights = sorted((t for t in result.graph.initializer if t.name in read), key=lambda tensor: tensor.name)
        del result.graph.initializer[:]
        result.graph.initializer.extend(weights)
    result.graph.name = original.graph.name
    result.doc_string = original.doc_string
    result.producer_name, result.producer_version = original.producer_name, original.producer_version
    set_metadata(result, metadata_of(original))


def prove(source: Path, out: Path, calibration: Calibration) -> float:
    """Run both files on one small batch. Returns the cosine between their outputs, flattened together."""
    inputs = next(chunks(calibration), None)
    if inputs is None:
        raise StageError("there is no calibration data to check the result with", hint="Give at least one batch.")
    before, after = _run(source, inputs), _run(out, inputs)
    for name, array in after.items():
        if array.shape != before[name].shape or array.dtype != before[name].dtype:
            message = f"output `{name}` became {array.dtype}{array.shape}, was {before[name].dtype}{before[name].shape}"
            raise StageError(message, hint="This variant does not fit the model; keep fp32 or take another.")
        if np.isfinite(before[name]).all() and not np.isfinite(array).all():
            raise StageError(
                f"output `{name}` is not finite after quantization", hint="Keep fp32 or take another variant."
            )
    return cosine(before, after)


def cosine(before: Mapping[str, Array], after: Mapping[str, Array]) -> float:
    """Cosine of the angle between two sets of outputs taken as one vector each; 1 for two zero vectors."""
    first = np.concatenate([before[name].astype(np.float64).ravel() for name in sorted(before)])
    second = np.concatenate([after[name].astype(np.float64).ravel() for name in sorted(before)])
    norm = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / norm if norm else float(np.array_equal(first, second))


def _run(path: Path, inputs: Inputs) -> dict[str, Array]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with sdk_errors(StageError, f"run `{path.name}` with ONNX Runtime", hint="This variant does not fit the model."):
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_outputs()]
        fed = {value.name for value in session.get_inputs()}
        return dict(zip(names, session.run(names, {k: v for k, v in inputs.items() if k in fed}), strict=True))


def _artifact(
    source: Artifact,
    variant: Variant,
    rules: QuantizationRules,
    out: Path,
    facts: tuple[LayerFact, ...],
    agreement: float,
) -> Artifact:
    static = variant.kind == "static"
    symmetric = "symmetric" if rules.symmetric_activation else "asymmetric"
    scheme = {
        "engine": variant.engine,
        "kind": variant.kind,
        "activation": f"{rules.activation} {symmetric}" if static else "uint8 asymmetric, at run time",
        "weight": f"{rules.weight}{' reduced range' if rules.reduce_range else ''}",
        "granularity": "per channel" if variant.per_channel else "per tensor",
        "operators": "whole graph" if variant.operators is None else " ".join(variant.operators),
        "calibration": variant.calibration if static else "none",
        "bias": "int32" if rules.quantize_bias and static else "float32",
        "agreement": f"cosine {agreement:.4f} to fp32 on one calibration batch",
    }
    inputs = graph_inputs(onnx.load(out, load_external_data=False))
    if {spec.name for spec in inputs} != {spec.name for spec in source.inputs}:
        raise StageError("quantization changed the inputs", hint="Report this file.")
    prefix = re.sub(r"/[^/]*$", "", source.name)
    return dataclasses.replace(
        source,
        name=f"{prefix}/{variant.name}",
        path=out,
        precision=variant.name if variant.kind == "float" else f"int{variant.bits}-{variant.kind}",
        digest=file_digest(out),
        scheme=scheme,
        facts=facts,
    )
