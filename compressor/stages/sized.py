"""A precision for each layer under `max_size_mib`: the candidate that is made when no other file keeps the budget."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.errors import Problem, StageError
from compressor.ledger import StageOutput, code_digest
from compressor.profile import HardwareProfile
from compressor.recipe import PruneStage, QuantizeStage, Recipe
from compressor.stages.mixed import Scorer, calibration_of, cannot_hold, settled
from compressor.stages.run import MODEL_FILE, Run, version
from compressor.types import Artifact, Format, file_digest

if TYPE_CHECKING:
    from compressor.quantize import Variant
    from compressor.quantize.promise import Base

NAME = "mixed-size-ort"
MIB = 2**20
BITS = {"int4": 4, "int8": 8, "fp16": 16, "fp32": 32}


def sized_candidate(
    run: Run,
    student: Artifact,
    stage: QuantizeStage,
    profile: HardwareProfile,
    made: Sequence[tuple[Variant, Artifact]],
    others: Sequence[Artifact],
    scorer: Scorer,
) -> tuple[Artifact | None, str]:
    """The file under the size budget, or why there is none (empty: nobody asked, or another file will do).

    ``made`` are the int8 files and their variants, ``others`` all candidates so far beside the fp32 student.
    """
    accept = run.recipe.accept
    if accept.max_size_mib is None:
        return None, ""
    budget = int(accept.max_size_mib * MIB)
    small = [item for item in (student, *others) if item.file_bytes <= budget]
    if small and accept.max_drop is None:
        return None, ""
    floor = scorer.baseline - accept.max_drop if accept.max_drop is not None else float("-inf")
    if any(scorer(item) >= floor - 1e-9 for item in small):
        return None, ""
    if hopeless := cannot_hold(student, scorer, floor):
        return None, hopeless
    try:
        return _stored(run, student, stage, profile, _best_first(made, scorer), scorer, floor, budget), ""
    except StageError as error:
        return None, str(error)


def size_problems(recipe: Recipe, profiles: Sequence[HardwareProfile], model: Path) -> list[Problem]:
    """Profiles for which not even all parameters of an ONNX file in the smallest precision keep the budget.

    Said while planning, where the file goes to the quantizer as it is; what a cut leaves is only known afterwards.
    """
    from compressor.models.onnx_facts import describe

    limit = recipe.accept.max_size_mib
    if limit is None or any(isinstance(stage, PruneStage) and stage.zeros is None for stage in recipe.stage):
        return []
    facts, found = describe(model), []
    quantizes = any(isinstance(stage, QuantizeStage) for stage in recipe.stage)
    for profile in profiles:
        smallest = storable(profile)[0] if quantizes else "fp32"
        least = facts.parameters * BITS[smallest] / 8 / MIB
        if not facts.quantized and least > limit:
            what = f"{limit:g} MiB are too few on {profile.name}: {facts.parameters:,} parameters alone, all in "
            what += f"{smallest}, the smallest precision that it takes, are {least:.3g} MiB"
            found.append(Problem("accept.max_size_mib", what))
    return found


def storable(profile: HardwareProfile) -> tuple[str, ...]:
    """Precisions in which weights may lie in a file for this profile. Whoever unpacks 4 bits while loading casts
    float16 as well. Where sums saturate, other codes than those that were checked are out of the question."""
    taken, rules = profile.constraints.precisions, profile.quantization
    int8 = ("int8",) if rules.int8 else ()
    unchecked = rules.saturates and not rules.reduce_range
    int4 = ("int4",) if "int4" in taken and int8 and not unchecked else ()
    half = ("fp16",) if int4 or "fp16" in taken else ()
    return (*int4, *int8, *half, "fp32")


def _best_first(made: Sequence[tuple[Variant, Artifact]], scorer: Scorer) -> list[tuple[Variant, Artifact]]:
    """The most accurate int8 file with integer arithmetic."""
    integer = [(settled(*pair), pair[1]) for pair in made if pair[0].kind in ("static", "dynamic")]
    return sorted(integer, key=lambda pair: -scorer(pair[1]))[:1]


def _stored(
    run: Run,
    student: Artifact,
    stage: QuantizeStage,
    profile: HardwareProfile,
    made: Sequence[tuple[Variant, Artifact]],
    scorer: Scorer,
    floor: float,
    budget: int,
) -> Artifact:
    key = {
        "source": student.digest,
        "bases": [(vars(variant), artifact.digest) for variant, artifact in made],
        "rules": profile.quantization.model_dump(mode="json"),
        "precisions": storable(profile),
        "calibration": run.data.digests["calibration"],
        "validation": run.data.digests["validation"],
        "floor": floor if floor > float("-inf") else None,
        "budget": budget,
        "samples": stage.samples,
        "trials": stage.trials,
        "code": code_digest("quantize", "stages/sized", "stages/mixed", "models/onnx_graph", "models/onnx_facts"),
        "versions": [version("onnxruntime")],
    }

    def work(folder: Path) -> StageOutput:
        from compressor.quantize.promise import Prospect, fit_size

        calibration, record = calibration_of(run, stage.samples)
        bases = _bases(run, student, stage, profile, made)
        prospects = [Prospect(base, storable(profile), calibration) for base in bases]
        found = fit_size(prospects, scorer, floor, budget, folder / MODEL_FILE, trials=stage.trials)
        scheme = {**found.artifact.scheme, "precision": found.artifact.precision, "calibrated on": record}
        (folder / "scheme.json").write_text(json.dumps(scheme, indent=1))
        metrics: dict[str, float | int | str] = {
            "bytes": found.artifact.file_bytes,
            "validation": round(found.score, 6),
            "trials": len(found.trials),
            "holds": str(found.holds).lower(),
        }
        return StageOutput(metrics, found.artifact.facts)

    result = run.ledger.stage(f"quantize-{NAME}", key, work)
    scheme = json.loads((result.folder / "scheme.json").read_text())
    path = result.folder / MODEL_FILE
    return Artifact(
        f"student/{NAME}", "student", path, Format.ONNX, scheme.pop("precision"), student.inputs,
        student.outputs, file_digest(path), student.parameters, scheme, result.facts,
    )  # fmt: skip


def _bases(
    run: Run,
    student: Artifact,
    stage: QuantizeStage,
    profile: HardwareProfile,
    made: Sequence[tuple[Variant, Artifact]],
) -> list[Base]:
    """The int8 file, then float32 arithmetic on weights that only lie in few bits."""
    from compressor.quantize.promise import FloatBase, IntegerBase

    calibration, _ = calibration_of(run, stage.samples)
    cache, rules = run.ledger.cache / "ranges", profile.quantization
    found: list[Base] = [IntegerBase(student, *pair, rules, calibration, cache) for pair in made]
    return [*found, FloatBase(student)] if "int4" in storable(profile) else found
