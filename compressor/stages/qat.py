"""The candidates of a student that was trained with fake quantization: its learnt scales, written for each target."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.errors import StageError
from compressor.ledger import StageOutput, code_digest
from compressor.profile import HardwareProfile, QuantizationRules
from compressor.qat import Precision
from compressor.stages.mixed import calibration_of
from compressor.stages.run import MODEL_FILE, Line, Run, version
from compressor.types import Artifact, Inputs, LayerFact, file_digest

if TYPE_CHECKING:
    from compressor.models.rounded import RoundedLayer
    from compressor.quantize.qdq import Stored

PARITY_SAMPLES = 64
SAMPLES = 64  # of the calibration split, for the check of saturating sums
# A sum in another order moves a value across a rounding boundary now and then; then a step of one activation differs.
# Wrong scales, axes or zero points differ everywhere and by much.
CLOSE, SHARE_CLOSE, SHARE_WORST = 1e-4, 0.9, 0.05


def trained_precision(run: Run) -> Precision | None:
    """The weights that the recipe trains for, or None."""
    found = [stage.qat.weights for stage in run.recipe.stage if stage.kind == "distil" and stage.qat is not None]
    return found[-1] if found else None


def qat_candidates(
    run: Run, line: Line, exported: Artifact, profile: HardwareProfile
) -> tuple[tuple[Artifact, ...], Mapping[str, str]]:
    """The quantized files of a line for one profile, made once for equal rules, and what was not made.

    ``exported``: the line's fp32 file.
    """
    precision = trained_precision(run)
    if precision is None:
        return (), {}
    rules, name = profile.quantization, f"{precision}-qat"
    found: list[Artifact] = []
    failed: dict[str, str] = {}
    for suffix, packed in forms(run, rules):
        try:
            found.append(_stored(run, line, exported, rules, f"{name}{suffix}", packed=packed))
        except StageError as error:
            failed[f"{name}{suffix}"] = str(error)
    return tuple(found), failed


def forms(run: Run, rules: QuantizationRules) -> list[tuple[str, bool]]:
    """Name suffixes and whether few-bit weights are packed, of the files that are worth making for these rules.

    Packed forms need a runtime that reads INT4, INT2 and MatMulNBits: ONNX Runtime.
    """
    stage = next(s for s in reversed(run.recipe.stage) if s.kind == "distil" and s.qat is not None)
    assert stage.qat is not None
    if stage.qat.activations == "float":
        return [("", rules.dynamic)]
    # scale and shift take three codes a row that are far apart: there is no smaller tensor for them
    few = stage.qat.weights not in ("int8", "int6", "int5") and stage.qat.method != "dlt"
    return [("", False), *([("-packed", True)] if few and rules.dynamic else [])]


def _stored(run: Run, line: Line, exported: Artifact, rules: QuantizationRules, name: str, *, packed: bool) -> Artifact:
    key = {
        "line": line.key,
        "source": exported.digest,
        "rules": rules.model_dump(mode="json"),
        "packed": packed,
        "validation": run.data.digests["validation"],
        "calibration": run.data.digests["calibration"],
        "code": code_digest("quantize", "models/fakequant", "models/quantizers", "models/rounded", "stages/qat"),
        "versions": [version("onnxruntime"), version("torch")],
    }
    result = run.ledger.stage(
        f"quantize-{name}", key, lambda folder: _write(run, line, exported, rules, folder, packed=packed)
    )
    scheme = json.loads((result.folder / "scheme.json").read_text())
    path = result.folder / MODEL_FILE
    precision = f"{trained_precision(run)}-qat"
    return replace(
        exported, name=f"{line.role}/{name}", path=path, precision=precision, digest=file_digest(path), scheme=scheme,
        facts=result.facts,
    )  # fmt: skip


def _write(
    run: Run, line: Line, exported: Artifact, rules: QuantizationRules, folder: Path, *, packed: bool
) -> StageOutput:
    from compressor.models.fakequant import trained_layers
    from compressor.models.onnx_graph import read_model, save_model
    from compressor.models.sparse import drop_masks
    from compressor.quantize.checks.lint import lint
    from compressor.quantize.checks.saturation import saturation_facts
    from compressor.quantize.qdq import misfit, write_pairs

    module = drop_masks(line.load().eval())
    layers = trained_layers(module)
    if why := misfit(layers, rules):
        raise StageError(why, hint="Name this profile in `qat.profile`, or give it a run of its own.")
    model, stored = write_pairs(read_model(exported.path), layers, rules, packed=packed)
    if refused := lint(model, rules):
        raise StageError(f"the target would refuse it: {'; '.join(str(item) for item in refused[:3])}")
    path = folder / MODEL_FILE
    save_model(model, path)
    parity = check_parity(run, module, path)
    facts = storage_facts(stored)
    if rules.saturates:
        data, _ = calibration_of(run, SAMPLES)
        facts += saturation_facts(model, data)
    scheme = _scheme(layers, stored, rules, exported, path) | {"parity": parity}
    (folder / "scheme.json").write_text(json.dumps(scheme, indent=1))
    return StageOutput({"bytes": path.stat().st_size}, facts)


def check_parity(run: Run, module: Any, path: Path) -> str:
    """Compare every output of the file with the trained module, quantize-dequantize pairs computed as written.

    Raises:
        StageError: an output differs by more than a rounding step now and then.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    part = run.data.splits["validation"]
    inputs: Inputs = part.batch(np.arange(min(PARITY_SAMPLES, len(part))))
    wanted = run.runner(module)(inputs)
    fed = {value.name for value in session.get_inputs()}
    made = dict(zip(names, session.run(names, {k: v for k, v in inputs.items() if k in fed}), strict=True))
    told = []
    for name in names:
        gap = np.abs(np.asarray(wanted[name], np.float64) - made[name])
        peak = max(1.0, float(np.abs(wanted[name]).max()))
        equal, worst = float((gap <= CLOSE * peak).mean()), float(gap.max()) / peak
        if equal < SHARE_CLOSE or worst > SHARE_WORST:
            raise StageError(
                f"the quantized file differs from the trained student: {1 - equal:.1%} of output `{name}`, by up to "
                f"{worst:.2e} of its largest value",
                hint="The writer put a scale or an axis in the wrong place; please report this model.",
            )
        told.append(f"{name}: {equal:.2%} within {CLOSE:g}, worst {worst:.1e} of the largest value")
    return "; ".join(told)


def storage_facts(stored: Sequence[Stored]) -> tuple[LayerFact, ...]:
    """A row for every layer: what it became, in which container, and what size and speed get out of it."""
    return tuple(
        LayerFact(
            "quantize", item.node, "quantized", "float32", f"{item.layer.precision} in {item.container.shown}",
            item.container.note,
        )
        for item in stored
    )  # fmt: skip


def _scheme(
    layers: Sequence[RoundedLayer], stored: Sequence[Stored], rules: QuantizationRules, exported: Artifact, path: Path
) -> dict[str, str]:
    from compressor.quantize.qdq import information

    bits = information(layers, exported.parameters - sum(layer.codes.size for layer in layers))
    reads = any(layer.reads is not None for layer in layers)
    symmetric = "symmetric" if rules.symmetric_activation else "asymmetric"
    kinds = dict.fromkeys(f"{layer.precision} ({layer.method})" for layer in layers)
    per = dict.fromkeys(layer.per if not layer.per.isdigit() else f"groups of {layer.per}" for layer in layers)
    notes = dict.fromkeys(item.container.note for item in stored if item.container.note)
    return {
        "engine": "quantization-aware training",
        "kind": "qat",
        "activation": f"{rules.activation} {symmetric}, learnt ranges" if reads else "float32",
        "weight": ", ".join(kinds),
        "granularity": ", ".join(per),
        "container": ", ".join(dict.fromkeys(item.container.shown for item in stored)),
        "size and speed": "; ".join(notes) or "8-bit kernels where the runtime has them",
        "total bits": f"{sum(bits.values()) / 8192:.1f} KiB of numbers, {path.stat().st_size / 1024:.1f} KiB stored",
    }
