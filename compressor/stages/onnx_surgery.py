"""Prune stages of a teacher that is an ONNX file: ONNX in, ONNX out, without torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from compressor.errors import Problem
from compressor.ledger import StageOutput, code_digest
from compressor.models.onnx_graph import read_model, save_model
from compressor.recipe import PruneStage, Recipe
from compressor.stages.run import MODEL_FILE, Run
from compressor.types import Artifact, Inputs, file_digest

CALIBRATION_SAMPLES = 256
BATCH = 32


def prune_onnx(run: Run, before: Artifact, stage: PruneStage) -> Artifact:
    """The student's fp32 file after a prune stage."""
    round_to = stage.round_to or run.round_to
    key = {
        "previous": before.digest,
        "config": stage.model_dump(mode="json"),
        "calibration": run.data.digests["calibration"],
        "round_to": round_to,
        "seed": run.recipe.seed,
        "code": code_digest(
            "prune", "masks", "models/structure/groups", "models/patterns", "models/onnx_graph", "models/onnx_facts"
        ),
    }
    result = run.ledger.stage("prune-onnx", key, lambda folder: _cut(run, before.path, stage, round_to, folder))
    path = result.folder / MODEL_FILE
    return replace(
        before,
        name="student/fp32",
        role="student",
        path=path,
        digest=file_digest(path),
        parameters=int(result.metrics["parameters_after"]),
        facts=(*before.facts, *result.facts),
    )


def _cut(run: Run, path: Path, stage: PruneStage, round_to: int, folder: Path) -> StageOutput:
    from compressor.prune.onnx import prune

    if stage.zeros is not None:
        return _zeros(path, stage, folder)
    batches = list(_calibration(run))
    done = prune(
        read_model(path), run.samples("calibration", 2), stage, batches, round_to=round_to, seed=run.recipe.seed
    )
    save_model(done.model, folder / MODEL_FILE)
    metrics: dict[str, float | int | str] = {
        "parameters_before": done.parameters_before,
        "parameters_after": done.parameters_after,
        "mended_by": done.way,
    }
    if done.macs_before is not None and done.macs_after is not None:
        metrics |= {"macs_before": done.macs_before, "macs_after": done.macs_after}
    metrics |= {f"distance after {way}": value for way, value in done.distances.items()}
    return StageOutput(metrics, done.facts)


def _zeros(path: Path, stage: PruneStage, folder: Path) -> StageOutput:
    from compressor.models.onnx_facts import count_parameters
    from compressor.prune.onnx.sparsity import sparsify

    done = sparsify(read_model(path), stage)
    save_model(done.model, folder / MODEL_FILE)
    count = count_parameters(done.model)
    return StageOutput({"parameters_after": count, "masked_weights": done.weights, "zeros": done.zeros}, done.facts)


def _calibration(run: Run) -> Iterator[Inputs]:
    part = run.data.splits["calibration"]
    count = min(CALIBRATION_SAMPLES, len(part))
    for start in range(0, count, BATCH):
        yield part.batch(np.arange(start, min(start + BATCH, count)))


def onnx_problems(recipe: Recipe, path: Path, example: Inputs) -> list[Problem]:
    """What keeps the prune stages from being carried out on the file: seen on two samples, before anything is cut."""
    from compressor.prune.onnx import check

    stages = [(number, stage) for number, stage in enumerate(recipe.stage) if isinstance(stage, PruneStage)]
    model = read_model(path) if stages else None
    return [
        Problem(f"stage.{number}.{stage.kind}.{problem.where}", problem.what)
        for number, stage in stages
        if model is not None
        for problem in check(model, example, stage)
    ]
