"""Quantize: the int8 candidates of a profile, made from the shared fp32 student."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.errors import StageError
from compressor.ledger import StageOutput, code_digest
from compressor.profile import HardwareProfile, QuantizationRules
from compressor.recipe import QuantizeStage
from compressor.stages.by_target import by_target
from compressor.stages.mixed import Scorer, calibration_of, mixed_candidate
from compressor.stages.run import MODEL_FILE, Run, version
from compressor.stages.sized import sized_candidate
from compressor.types import Artifact, Format, file_digest

if TYPE_CHECKING:
    from compressor.quantize import Variant


def int8_candidates(
    run: Run, student: Artifact, stage: QuantizeStage, profile: HardwareProfile, teacher: Artifact | None = None
) -> tuple[tuple[Artifact, ...], Mapping[str, str]]:
    """The int8 candidates of a profile, quantized once for equal rules, and what was not made.

    When none of them keeps the recipe's ``max_drop`` against ``teacher`` on validation, one more is made: the most
    accurate of them with the fewest, cheapest layers back in float. When none of them also keeps `max_size_mib`, one
    more: a precision for each layer, chosen under that budget.
    """
    from compressor.models.onnx_facts import describe
    from compressor.quantize import variants

    wanted, rejected = variants(stage, profile.quantization, describe(student.path), profile.constraints.precisions)
    made: dict[str, tuple[Variant, Artifact]] = {}
    failed: dict[str, str] = dict(rejected)
    for variant in wanted:
        try:
            made[variant.name] = (variant, _quantized(run, student, variant, stage, profile.quantization))
        except StageError as error:
            failed[variant.name] = str(error)
    found = tuple(artifact for _, artifact in made.values())
    if profile.quantization.by_target and wanted:
        found = (*found, by_target(run, student, stage))
    integer = tuple(pair for pair in made.values() if pair[0].kind != "float")
    scorer = Scorer(run, teacher or student)
    if stage.restore != "never" and integer:
        mixed, why = mixed_candidate(run, student, stage, profile.quantization, integer, scorer)
        found += () if mixed is None else (mixed,)
        failed |= {"int8-mixed-ort": why} if why else {}
    sized, why = sized_candidate(run, student, stage, profile, integer, found, scorer)
    found += () if sized is None else (sized,)
    return found, failed | ({"mixed-size-ort": why} if why else {})


def _quantized(
    run: Run, student: Artifact, variant: Variant, stage: QuantizeStage, rules: QuantizationRules
) -> Artifact:
    key = {
        "source": student.digest,
        "variant": {name: value for name, value in vars(variant).items()},
        "rules": rules.model_dump(mode="json"),
        "calibration": run.data.digests["calibration"],
        "samples": stage.samples,
        "code": code_digest("quantize", "models/onnx_graph", "models/onnx_facts"),
        "versions": [version("onnxruntime"), version("nncf")],
    }
    result = run.ledger.stage(
        f"quantize-{variant.name}", key, lambda folder: _quantize_to(run, student, variant, stage, rules, folder)
    )
    scheme = json.loads((result.folder / "scheme.json").read_text())
    path = result.folder / MODEL_FILE
    return Artifact(
        f"student/{variant.name}", "student", path, Format.ONNX, scheme.pop("precision"), student.inputs,
        student.outputs, file_digest(path), student.parameters, scheme, result.facts,
    )  # fmt: skip


def _quantize_to(
    run: Run, student: Artifact, variant: Variant, stage: QuantizeStage, rules: QuantizationRules, folder: Path
) -> StageOutput:
    from compressor.quantize import quantize

    calibration, record = calibration_of(run, stage.samples)
    made = quantize(student, variant, rules, calibration, folder / MODEL_FILE, cache=run.ledger.cache / "ranges")
    scheme = {**made.scheme, "precision": made.precision, "calibrated on": record}
    (folder / "scheme.json").write_text(json.dumps(scheme, indent=1))
    return StageOutput({"bytes": made.file_bytes}, made.facts)
