"""Distil stages: the student learns from the teacher, the null twin from labels only."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.distil.probes.hacking import HackingMonitor
from compressor.distil.processes import Processes, launched
from compressor.ledger import Event, StageOutput, code_digest, ignore_event
from compressor.recipe import DistilStage
from compressor.stages.rounds import in_rounds, with_teacher
from compressor.stages.run import RECORD_FILE, Line, Run
from compressor.stages.sequences import with_sequences
from compressor.strategy import FilterStrategy, QueryStrategy

if TYPE_CHECKING:
    from torch import nn

    from compressor.distil.result import DistilResult

START = "start"  # folder of the student as it enters the stage, for the other processes
TAUGHT = "taught"  # and of the student of the round before, where that is the teacher


def distil(run: Run, line: Line, stage: DistilStage, *, labels_only: bool, taught: Run | None = None) -> Line:
    """``line`` trained on the teacher, or (``labels_only``) the same student trained without it.

    ``taught``: the run with another teacher in the place of its own, for this stage alone.
    """
    from compressor.distil.changes import shapes_student

    if not labels_only and (stage.rounds > 1 or stage.labels == "estimate"):
        return in_rounds(run, line, stage, distil)
    taught = taught or _qat_teacher(run, line, stage, labels_only)
    config = stage.model_dump(mode="json")
    if labels_only:  # what only the teacher's terms use must not make a new twin
        config = {
            name: value
            for name, value in config.items()
            if name not in {"objective", "cache", "cache_logits", "labels", "rollouts", "sequences", "rounds"}
        }
        config["objective"] = [item.model_dump(mode="json") for item in stage.objective if shapes_student(item)]
    # the twin sees the same samples, so where the teacher chooses them the twin depends on it too
    judged = any(isinstance(strategy, FilterStrategy | QueryStrategy) for strategy in stage.strategy)
    key = {
        "previous": line.key,
        "config": config,
        "labels_only": labels_only,
        "teacher": taught.model.provenance.digest if judged or not labels_only else None,
        "signals": run.recipe.teacher.signals,
        **({"panel": taught.panel.facts()} if taught.panel is not None and not labels_only else {}),
        "data": {name: run.data.digests[name] for name in sorted(run.data.digests) if name not in {"test", "fresh"}},
        "seed": run.recipe.seed,
        **({"round_to": run.round_to} if stage.cofi is not None else {}),
        **({"cost": run.cost_name} if stage.supernet is not None and stage.supernet.budget.latency_ms else {}),
        **({"rules": run.rules.model_dump(mode="json")} if stage.qat is not None else {}),
        "code": code_digest(
            "distil",
            "masks",
            "models/shapes",
            "search",
            "models/fakequant",
            "models/heads",
            "models/patterns",
            "models/placement",
            "models/quantizers",
            "models/signals",
            "models/silent",
            "models/sparse",
            "models/structure",
            "qat",
            "schedule",
            "strategy",
        ),
    }
    name = "null-twin" if labels_only else "distil"
    result = run.ledger.stage(
        name, key, lambda folder: _train(taught, line, stage, folder, labels_only=labels_only), resumable=True
    )
    record = json.loads((result.folder / RECORD_FILE).read_text())  # objectives may have left parts in the student
    return Line(line.role, result.key, run.stored_module(result.folder), record)


def _qat_teacher(run: Run, line: Line, stage: DistilStage, labels_only: bool) -> Run:
    """The run whose teacher is the student as it enters a stage of fake quantization, where the recipe asks for it."""
    if labels_only or stage.qat is None or stage.qat.teacher == "original":
        return run
    return replace(with_teacher(run, line.load(), line.key), before=line)


def _train(run: Run, line: Line, stage: DistilStage, folder: Path, *, labels_only: bool) -> StageOutput:
    from copy import deepcopy

    from compressor.models.rebuild import save_student

    student, work = deepcopy(line.load()), folder / "scratch"
    if launched() > 1:
        if stage.sequences is not None and not labels_only:
            with_sequences(run, stage.sequences)  # stored, before the others ask for them
        (work / START).mkdir(parents=True, exist_ok=True)
        save_student(work / START, student, line.record)
        order = {"stage": stage.model_dump(mode="json"), "labels_only": labels_only, "work": str(work)}
        order |= {"seed": run.recipe.seed, "taught_by": None if run.before is None else run.before.key}
        if run.before is not None:
            (work / TAUGHT).mkdir(exist_ok=True)
            save_student(work / TAUGHT, run.teacher, run.before.record)
        Processes().tell(order)
    monitor = None if labels_only else _monitor(run, folder)
    score = run.validation_score if monitor is None else partial(run.validation_score, watch=monitor.observe)
    on_event = run.on_event if monitor is None else _both(monitor.on_event, run.on_event)
    result = _fit(run, student, stage, work, score, on_event, labels_only=labels_only)
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
    if result.choosing_forwards:
        metrics["choosing_forwards"] = result.choosing_forwards
    history = [{**vars(epoch), "terms": dict(epoch.terms), "values": dict(epoch.values)} for epoch in result.history]
    (folder / "history.json").write_text(json.dumps(history, indent=1))
    if monitor is not None:
        (folder / "divergences.json").write_text(monitor.text())
    return StageOutput(metrics, result.facts)


def follow(run: Run) -> None:
    """What every process but the first does in a run of several: train along, and leave all else to the first."""
    from compressor.models.rebuild import load_student

    processes = Processes()
    while (order := processes.hear()) is not None:
        work = Path(order["work"])
        student, stage = load_student(work / START, run.teacher), DistilStage.model_validate(order["stage"])
        seeded = replace(run, recipe=run.recipe.model_copy(update={"seed": order["seed"]}))
        if order["taught_by"] is not None:
            seeded = with_teacher(seeded, load_student(work / TAUGHT, run.teacher), order["taught_by"])
        _fit(seeded, student, stage, work, seeded.validation_score, ignore_event, labels_only=order["labels_only"])


def release() -> None:
    """The first process lets the others go: nothing more is trained."""
    if launched() > 1:
        Processes().tell(None)


def _fit(
    run: Run,
    student: nn.Module,
    stage: DistilStage,
    work: Path,
    score: Callable[[nn.Module], float],
    on_event: Event,
    *,
    labels_only: bool,
) -> DistilResult:
    """Train ``student`` in place; all processes of a run do this at the same time."""
    from compressor.distil import loop, lora

    for parameter in student.parameters():
        parameter.requires_grad_(True)
    data = run.data if stage.sequences is None or labels_only else with_sequences(run, stage.sequences)
    if stage.lora is not None:
        lora.adapt(student, stage.lora, run.recipe.seed)
    result = loop.distil(
        student,
        run.teacher,
        data,
        stage,
        seed=run.recipe.seed,
        work=work,
        bank=run.ledger.cache / "teacher",
        labels_only=labels_only,
        teacher_digest=run.model.provenance.digest,
        signals=run.recipe.teacher.signals,
        score=score,
        on_event=on_event,
        panel=run.panel,
        round_to=run.round_to,
        cost=run.cost,
        rules=run.rules,
    )
    if stage.lora is not None:
        lora.merge(student)
    return result


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
