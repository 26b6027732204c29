"""Distil a teacher into a student: all is decided here, then :class:`compressor.distil.training.Training` runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressor.data.types import DataBundle
from compressor.distil import checkpoint
from compressor.distil.panel import Panel
from compressor.distil.result import DistilResult, OnEvent, ignore
from compressor.distil.setup import Setup, seed_of
from compressor.distil.training import Progress, Training
from compressor.distil.validation import Score, validation_accuracy
from compressor.models import rebuild
from compressor.profile import QuantizationRules
from compressor.recipe import DistilStage
from compressor.types import LayerFact

CHECKPOINT_SECONDS = 300.0  # at most this much work is lost by a kill
CHECKPOINT = "checkpoint.pt"


def distil(
    student: nn.Module,
    teacher: nn.Module | None,
    data: DataBundle,
    config: DistilStage,
    *,
    seed: int,
    work: Path,
    bank: Path,
    teacher_digest: str,
    signals: Mapping[str, str],
    labels_only: bool = False,
    score: Score | None = None,
    on_event: OnEvent = ignore,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    panel: Panel | None = None,
    round_to: int = 1,
    cost: Callable[[Any], float] | None = None,
    rules: QuantizationRules | None = None,
) -> DistilResult:
    """Train ``student`` in place on labels and on ``teacher``.

    A run that was killed at any point is continued by the same call and ends with the same bytes as an undisturbed one.

    Args:
        student, teacher: modules that take their inputs by name and return one tensor (``LoadedModel.module``).
        data: ``train``, perhaps ``transfer`` (no labels), and ``validation`` when ``patience`` is set without
            ``score``.
        seed: of data order, augmentation, projectors and dropout, each with a stream of its own.
        work: folder of this run's checkpoint.
        bank: folder of cached teacher outputs, shared by all runs.
        teacher_digest: digest of the teacher's weights, part of the bank's key.
        signals: signal name -> module path, for modules whose structure does not tell.
        labels_only: the null twin: same steps, order and seeds with weight 1 on the labels; the teacher is never run.
        score: validation score of a module in evaluation mode, higher is better; called once an epoch.
        on_event: told ``(kind, fields)``; kinds in :mod:`compressor.distil.result`.
        checkpoint_seconds: a checkpoint is written at every epoch's end and when this much time has passed.
        panel: several teachers, or views of their own; ``teacher`` is the module of its first.
        round_to: the device's multiple of channels and neurons, for masks that learn which of them go.
        cost: milliseconds of a layer's shape, for a super-net's budget.
        rules: what the device's int8 takes, for fake quantization (``config.qat``).

    Raises:
        ConfigError: an objective does not exist, has wrong options, or asks for signals that are not there.
        StageError: the loss is not finite, the disk is full, the bank or the checkpoint is stale, nothing to learn
        from.
    """
    setup = Setup(
        student, teacher, data, config, seed, Path(bank), teacher_digest, dict(signals), labels_only, on_event
    )
    setup.panel = None if labels_only else panel
    setup.round_to, setup.cost = round_to, cost
    setup.rules = rules or QuantizationRules()
    path = Path(work) / CHECKPOINT
    Path(work).mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(checkpoint.disk_errors(Path(work)))
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(_deterministic())
        fingerprint = setup.fingerprint()
        state = checkpoint.load(path, fingerprint)
        if state is not None and state["done"]:
            rebuild.apply(student, json.loads(state["record"]))
            student.load_state_dict(state["student"])
            student.eval()
            return _result(Progress(**state["progress"]), state)
        parts, constant = setup.assemble(stack, state)
        constant["fingerprint"] = fingerprint
        judge = score
        if score is None and config.patience is not None:
            judge = validation_accuracy(data.splits.get("validation"), setup.device, on_event)
        training = Training(parts, config, path, constant, judge, on_event, checkpoint_seconds)
        torch.manual_seed(seed_of(seed, "dropout") + setup.processes.rank)  # after the probes, which draw numbers too
        if state is None:
            # strategies and objectives may have asked both models already
            training.progress.forwards = parts.teacher.forwards + setup.choosing.asked
            training.progress.choosing = setup.choosing.tried
            training.save()  # the decisions are on disk before anything depends on them
        else:
            training.restore(state)
            on_event("resume", {"epoch": training.progress.epoch, "step": training.progress.step})
        training.run()
        constant |= setup.commit()
        if setup.processes.main:
            _finish(student, path, constant, training.progress)
        return _result(training.progress, constant)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Deterministic kernels where torch has them; the caller's setting is put back."""
    was, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time and changes no result here
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def _finish(student: nn.Module, path: Path, constant: Mapping[str, Any], progress: Progress) -> None:
    """The last checkpoint holds the result alone, so that the same call again returns at once."""
    student.eval()
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in student.state_dict().items()}
    checkpoint.save(path, dict(constant) | {"done": True, "student": weights, "progress": asdict(progress)})


def _result(progress: Progress, constant: Mapping[str, Any]) -> DistilResult:
    return DistilResult(
        history=progress.records(),
        best_epoch=progress.best_epoch,
        seconds=progress.seconds,
        steps=progress.index,
        teacher_forwards=progress.forwards,
        cached=bool(constant["cached"]),
        cache_bytes=int(constant["cache_bytes"]),
        precision=str(constant["precision"]),
        choosing_forwards=progress.choosing,
        record=tuple(json.loads(constant["record"])),
        facts=tuple(LayerFact(**fact) for fact in json.loads(constant["facts"])),
    )
