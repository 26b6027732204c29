"""Distil stages: the student learns from the teacher, the null twin from labels only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from compressor.distil.probes.hacking import HackingMonitor
from compressor.ledger import Event, StageOutput, code_digest
from compressor.recipe import DistilStage
from compressor.stages.run import RECORD_FILE, Line, Run
from compressor.stages.sequences import with_sequences


def distil(run: Run, line: Line, stage: DistilStage, *, labels_only: bool) -> Line:
    """``line`` trained on the teacher, or (``labels_only``) the same student trained without it."""
    config = stage.model_dump(mode="json")
    if labels_only:  # what only the teacher's terms use must not make a new twin
        config = {
            name: value
            for name, value in config.items()
            if name not in {"objective", "cache", "cache_logits", "labels", "rollouts", "sequences"}
        }
    key = {
        "previous": line.key,
        "config": config,
        "labels_only": labels_only,
        "teacher": None if labels_only else run.model.provenance.digest,
        "signals": run.recipe.teacher.signals,
        **({"panel": run.panel.facts()} if run.panel is not None and not labels_only else {}),
        "data": {name: run.data.digests[name] for name in sorted(run.data.digests) if name not in {"test", "fresh"}},
        "seed": run.recipe.seed,
        "code": code_digest("distil", "models/signals", "models/heads"),
    }
    name = "null-twin" if labels_only else "distil"
    result = run.ledger.stage(
        name, key, lambda folder: _train(run, line, stage, folder, labels_only=labels_only), resumable=True
    )
    record = json.loads((result.folder / RECORD_FILE).read_text())  # objectives may have left parts in the student
    return Line(line.role, result.key, run.stored_module(result.folder), record)


def _train(run: Run, line: Line, stage: DistilStage, folder: Path, *, labels_only: bool) -> StageOutput:
    from copy import deepcopy

    from compressor.distil import loop, lora
    from compressor.models.rebuild import save_student

    student = deepcopy(line.load())
    for parameter in student.parameters():
        parameter.requires_grad_(True)
    data = run.data if stage.sequences is None or labels_only else with_sequences(run, stage.sequences)
    if stage.lora is not None:
        lora.adapt(student, stage.lora, run.recipe.seed)
    monitor = None if labels_only else _monitor(run, folder)
    result = loop.distil(
        student,
        run.teacher,
        data,
        stage,
        seed=run.recipe.seed,
        work=folder / "scratch",
        bank=run.ledger.cache / "teacher",
        labels_only=labels_only,
        teacher_digest=run.model.provenance.digest,
        signals=run.recipe.teacher.signals,
        score=run.validation_score if monitor is None else partial(run.validation_score, watch=monitor.observe),
        on_event=run.on_event if monitor is None else _both(monitor.on_event, run.on_event),
        panel=run.panel,
    )
    if stage.lora is not None:
        lora.merge(student)
    save_student(folder, student.eval(), [*line.record, *result.record])
    best = result.history[result.best_epoch]
    metrics: dict[str, float | int | str] = {
        "best_epoch": result.best_epoch + 1,
        "epochs": len(result.history),
        "steps": result.steps,
        "teacher_forwards": result.teacher_forwards,
        "precision": result.precision,
    }
    if best.score is not None:
        metrics["validation"] = round(best.score, 6)
    history = [{**vars(epoch), "terms": dict(epoch.terms)} for epoch in result.history]
    (folder / "history.json").write_text(json.dumps(history, indent=1))
    if monitor is not None:
        (folder / "divergences.json").write_text(monitor.text())
    return StageOutput(metrics, result.facts)


def _monitor(run: Run, folder: Path) -> HackingMonitor | None:
    """Watches divergence from the teacher and from the labels on validation, for classifiers with labels."""
    labels = run.data.splits["validation"].labels
    if run.model.task not in {"image-classification", "text-classification"} or labels is None:
        return None
    (folder / "scratch").mkdir(parents=True, exist_ok=True)
    return HackingMonitor(folder / "scratch" / "divergences.json", run.teacher_validation, labels)


def _both(first: Event, second: Event) -> Event:
    """An event told to two listeners."""

    def tell(kind: str, fields: Mapping[str, Any]) -> None:
        first(kind, fields)
        second(kind, fields)

    return tell
