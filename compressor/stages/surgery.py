"""Surgeries: student and prune stages, stored as a smaller module and the record that rebuilds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compressor.ledger import StageOutput, code_digest
from compressor.recipe import PruneStage, StudentStage
from compressor.stages.run import Line, Run
from compressor.types import LayerFact

CURVES_FILE = "curves.json"


def surgery(run: Run, line: Line, stage: StudentStage | PruneStage) -> Line:
    """``line`` after a student or prune stage."""
    key = {
        "previous": line.key,
        "config": stage.model_dump(mode="json"),
        "calibration": run.data.digests["calibration"],
        "round_to": _multiple(run, stage),
        "seed": run.recipe.seed,
        **({"cost": run.cost_name} if _measures(stage) else {}),
        "code": code_digest(
            "prune",
            "students",
            "models/rebuild",
            "models/cost",
            "models/structure",
            "models/vocabulary",
            "models/lowrank",
            "models/omp",
            "models/patterns",
            "models/shapes",
            "models/signals",
            "models/sparse",
            "models/tokens",
            "masks",
            "search",
        ),
    }
    result = run.ledger.stage(stage.kind, key, lambda folder: _cut(run, line, stage, folder))
    record = json.loads((result.folder / "record.json").read_text())
    return Line(line.role, result.key, run.stored_module(result.folder), record)


def _measures(stage: StudentStage | PruneStage) -> bool:
    """Does the stage ask what layers cost?"""
    if isinstance(stage, PruneStage):
        return stage.target_speedup is not None
    return stage.search is not None and stage.search.budget.latency_ms is not None


def _multiple(run: Run, stage: StudentStage | PruneStage) -> int:
    """The channel multiple of a cut: the recipe's own, otherwise the widest wish of the profiles."""
    return (stage.round_to if isinstance(stage, PruneStage) else None) or run.round_to


def _cut(run: Run, line: Line, stage: StudentStage | PruneStage, folder: Path) -> StageOutput:
    from compressor.models.cost import count_macs
    from compressor.models.rebuild import save_student

    module, example = line.load(), run.tensors(run.samples("calibration", 2))
    metrics: dict[str, float | int | str]
    match stage:
        case PruneStage() if stage.zeros is not None:
            from compressor.prune.sparsity import sparsify

            sparse = sparsify(module, stage)
            metrics = {"masked_weights": sparse.weights, "zeros": sparse.zeros}
            made, record, facts = sparse.module, sparse.record, sparse.facts
        case PruneStage():
            from compressor.prune import prune

            done = prune(
                module,
                example,
                stage,
                run.calibration_tensors(512),
                round_to=_multiple(run, stage),
                seed=run.recipe.seed,
                cost=run.cost,
                curves=_curves(run, line, stage) if stage.scope == "sensitivity" else None,
            )
            metrics = {
                "parameters_before": done.parameters_before,
                "parameters_after": done.parameters_after,
                "macs_before": done.macs_before,
                "macs_after": done.macs_after,
            }
            made, record, facts = done.module, done.record, done.facts
        case StudentStage():
            from compressor.stages.searching import settled
            from compressor.students import make_student

            module, exchanged = _exchanged(run, module, stage)
            found = settled(run, module, stage, example, folder)
            student = make_student(
                module,
                found.stage,
                example,
                seed=run.recipe.seed,
                calibration=run.calibration_tensors(256),
                round_to=_multiple(run, stage),
            )
            made, record, facts = student.module, student.record, (*exchanged, *found.facts, *student.facts)
            metrics = {**found.metrics, "parameters_after": student.parameters_after}
            if stage.drop_tokens:
                metrics |= {"macs_before": count_macs(module, example), "macs_after": count_macs(made, example)}
    save_student(folder, made, [*line.record, *record])
    return StageOutput(metrics, facts)


def _exchanged(run: Run, module: Any, stage: StudentStage) -> tuple[Any, list[LayerFact]]:
    """The model with the tables that another tokenizer asks for, where one does."""
    if stage.tokenizer is None or run.original is None:
        return module, []
    from compressor.students.transplant import settle, texts_of

    texts = texts_of(run.original, run.teacher_data) if stage.transplant == "mixed" and run.teacher_data else ()
    return settle(module, run.original, stage, texts, run.recipe.seed)


def _curves(run: Run, line: Line, stage: PruneStage) -> Any:
    """Sensitivity of every group, a stage of its own: another budget reads it back."""
    from compressor.prune import sensitivity_of
    from compressor.prune.sensitivity import as_json, from_json

    budget = {"target_speedup", "cost", "round_to", "rounds"}
    key = {
        "previous": line.key,
        "config": stage.model_dump(mode="json", exclude=budget),
        "calibration": run.data.digests["calibration"],
        "validation": run.data.digests["validation"],
        "seed": run.recipe.seed,
        "code": code_digest("prune", "evaluate", "models/structure"),
    }

    def work(folder: Path) -> StageOutput:
        example, data = run.tensors(run.samples("calibration", 2)), run.calibration_tensors(512)
        curves = sensitivity_of(line.load(), example, stage, data, run.validation_score, seed=run.recipe.seed)
        (folder / CURVES_FILE).write_text(json.dumps(as_json(curves), indent=1))
        return StageOutput({"groups": len(curves)})

    result = run.ledger.stage("sensitivity", key, work)
    return from_json(json.loads((result.folder / CURVES_FILE).read_text()))
