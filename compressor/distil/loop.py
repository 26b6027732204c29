"""Distil a teacher into a student: all is decided here, then :class:`compressor.distil.training.Training` runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor.data.types import DataBundle
from compressor.distil import checkpoint, optim, precision, teachers
from compressor.distil.augment import augment
from compressor.distil.bank import BankKey, Layout
from compressor.distil.objectives.base import Context
from compressor.distil.precision import Numerics
from compressor.distil.result import DistilResult, OnEvent, ignore
from compressor.distil.stream import UNLABELLED, TrainingSet
from compressor.distil.teachers import CacheDecision, CachedTeacher, NoTeacher, OnlineTeacher, TeacherSource
from compressor.distil.terms import Weighted, build
from compressor.distil.training import Parts, Progress, Training
from compressor.errors import StageError
from compressor.models.signals import SignalTap, available
from compressor.recipe import DistilStage
from compressor.types import Array

CHECKPOINT_SECONDS = 300.0  # at most this much work is lost by a kill
CHECKPOINT = "checkpoint.pt"
PROBE_SAMPLES = 4  # samples of the batch that shows the shapes of the signals

Score = Callable[[nn.Module], float]


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

    Raises:
        ConfigError: an objective does not exist, has wrong options, or asks for signals that are not there.
        StageError: the loss is not finite, the disk is full, the bank or the checkpoint is stale, nothing to learn
        from.
    """
    setup = _Setup(
        student, teacher, data, config, seed, Path(bank), teacher_digest, dict(signals), labels_only, on_event
    )
    path = Path(work) / CHECKPOINT
    Path(work).mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(checkpoint.disk_errors(Path(work)))
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(_deterministic())
        fingerprint = setup.fingerprint()
        state = checkpoint.load(path, fingerprint)
        if state is not None and state["done"]:
            student.load_state_dict(state["student"])
            student.eval()
            return _result(Progress(**state["progress"]), state)
        parts, constant = setup.assemble(stack, state)
        constant["fingerprint"] = fingerprint
        judge = score if score is not None or config.patience is None else setup.validation_accuracy()
        training = Training(parts, config, path, constant, judge, on_event, checkpoint_seconds)
        torch.manual_seed(_seed(seed, "dropout"))  # after the probes, which draw numbers too
        if state is None:
            training.save()  # the decisions are on disk before anything depends on them
        else:
            training.restore(state)
            on_event("resume", {"epoch": training.progress.epoch, "step": training.progress.step})
        training.run()
        _finish(student, path, constant, training.progress)
        return _result(training.progress, constant)


class _Setup:
    """Turns the arguments of :func:`distil` into the parts of a run."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataBundle,
        config: DistilStage,
        seed: int,
        bank: Path,
        teacher_digest: str,
        mapping: dict[str, str],
        labels_only: bool,
        on_event: OnEvent,
    ) -> None:
        from accelerate import Accelerator

        self.student, self.teacher, self.config, self.seed = student, teacher, config, seed
        self.bank, self.teacher_digest, self.mapping = bank, teacher_digest, mapping
        self.labels_only, self.on_event = labels_only, on_event
        self.splits = data.splits
        self.data = TrainingSet.of(data)
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.device = self.accelerator.device
        self.augment_seed = _seed(seed, "augment") if config.augment else 0
        self.label_weight = (1.0 if labels_only else config.labels) if self.data.labelled else 0.0

    def fingerprint(self) -> str:
        """SHA-256 over everything the trained student depends on."""
        facts = [self.config.model_dump(mode="json"), self.seed, self.labels_only, self.teacher_digest, self.mapping]
        text = json.dumps([*facts, self.data.digest, checkpoint.state_digest(self.student)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def assemble(self, stack: ExitStack, state: Mapping[str, Any] | None) -> tuple[Parts, dict[str, Any]]:
        """The parts of the run, and the decisions that its checkpoint stores."""
        weighted = self._objectives()
        self.student.to(self.device)
        names = {"logits"}.union(*(item.objective.needs.student for item in weighted))
        tap = stack.enter_context(SignalTap(self.student, sorted(names), self.mapping))
        teacher_tap = self._teacher_tap(stack, weighted)
        layouts = self._prepare(weighted, tap, teacher_tap)
        numerics = self._numerics(state)
        decision = self._cache(layouts, weighted, state)
        source = self._source(teacher_tap, layouts, decision, numerics)
        frozen, still = optim.freeze(self.student, self.config.freeze)
        stack.callback(lambda: [parameter.requires_grad_(True) for parameter in frozen])
        if numerics.channels_last:
            self.student.to(memory_format=torch.channels_last)
            stack.callback(lambda: self.student.to(memory_format=torch.contiguous_format))
        projectors = nn.ModuleList(m for m in (item.objective.modules() for item in weighted) if m is not None)
        chosen = optim.optimiser(self.student, projectors.parameters(), self.config)
        _, prepared = self.accelerator.prepare(self.student, chosen)
        parts = Parts(
            student=self.student,
            tap=tap,
            teacher=source,
            objectives=weighted,
            projectors=projectors,
            # accelerate's wrapper only skips steps of accumulated gradients and scales float16; the loop does neither
            optimiser=prepared.optimizer,
            backward=self.accelerator.backward,
            average=optim.MovingAverage(self.student, self.config.ema) if self.config.ema else None,
            still=still,
            data=self.data,
            load=partial(self._load, numerics),
            numerics=numerics,
            device=self.device,
            label_weight=self.label_weight,
            order_seed=_seed(self.seed, "order"),
        )
        constant = {"precision": numerics.dtype, "channels_last": numerics.channels_last}
        return parts, constant | {"cached": decision.cached, "cache_bytes": decision.bytes}

    def _objectives(self) -> list[Weighted]:
        if self.labels_only:
            if not self.data.labelled:
                raise StageError(
                    "the null twin has no labels to learn from", hint="Set null_twin = false in the recipe."
                )
            return []
        if self.teacher is None:
            raise StageError("there is no teacher to learn from", hint="A distil stage needs a PyTorch teacher.")
        weighted = build(self.config, available(self.student, self.mapping), available(self.teacher, self.mapping))
        if not weighted and not self.label_weight:
            raise StageError("there is nothing to learn from", hint="Give the stage an objective, or the data labels.")
        return weighted

    def _teacher_tap(self, stack: ExitStack, weighted: Sequence[Weighted]) -> SignalTap | None:
        names = frozenset[str]().union(*(item.objective.needs.teacher for item in weighted))
        if self.teacher is None or not names:
            return None
        self.teacher.to(self.device).eval()
        return stack.enter_context(SignalTap(self.teacher, sorted(names), self.mapping))  # type: ignore[no-any-return]

    def _load(self, numerics: Numerics, positions: Array, view: int) -> dict[str, Tensor]:
        made = augment(self.data.batch(positions), self.config.augment, positions, view, self.augment_seed)
        return numerics.place(made, self.device)

    def _prepare(self, weighted: Sequence[Weighted], tap: SignalTap, teacher: SignalTap | None) -> dict[str, Layout]:
        """Show the objectives real shapes, and find how the teacher's signals would lie in the bank."""
        with torch.no_grad():
            if teacher is None:
                return {}
            numerics = Numerics("fp32", channels_last=False)
            inputs = self._load(numerics, np.arange(min(PROBE_SAMPLES, len(self.data))), 0)
            self.student.eval()
            seen, taught = tap(inputs), teacher(inputs)
            generator = torch.Generator().manual_seed(_seed(self.seed, "projectors"))
            for item in weighted:
                item.objective.prepare(Context(seen, taught, generator, self.device))
            return {name: Layout.of(name, signal, inputs.get("attention_mask")) for name, signal in taught.items()}

    def _numerics(self, state: Mapping[str, Any] | None) -> Numerics:
        if state is not None:
            return Numerics(state["precision"], state["channels_last"])
        positions = self.data.order(0, self.config.batch, _seed(self.seed, "order"))[0]
        inputs = self._load(Numerics("fp32", channels_last=False), positions, 0)
        found = precision.decide(self.config.precision, self.student, inputs, self.device, self.bank)
        self.on_event("precision", {"dtype": found.dtype, "channels_last": found.channels_last})
        return found

    def _cache(
        self, layouts: Mapping[str, Layout], weighted: Sequence[Weighted], state: Mapping[str, Any] | None
    ) -> CacheDecision:
        if not layouts:
            return CacheDecision(False, 0, "no teacher")
        if state is not None:
            return CacheDecision(bool(state["cached"]), int(state["cache_bytes"]), "as the run began")
        views = min(self.config.views, self.config.epochs) if self.config.augment else 1
        online = any(item.objective.needs.online_teacher for item in weighted)
        found = teachers.decide(self.config.cache, layouts, self.data, views, online, self.bank)
        self.on_event("teacher", {"cached": found.cached, "bytes": found.bytes, "reason": found.reason})
        if self.config.augment and self.config.cache != "off" and self.config.views == 1 and self.config.epochs > 1:
            self.on_event(
                "note", {"text": "augmentation with views = 1 shows the same picture every epoch; raise views"}
            )
        return found

    def _source(
        self, tap: SignalTap | None, layouts: Mapping[str, Layout], decision: CacheDecision, numerics: Numerics
    ) -> TeacherSource:
        if tap is None:
            return NoTeacher()
        if not decision.cached:
            return OnlineTeacher(tap, partial(numerics.autocast, self.device))
        key = BankKey(self.teacher_digest, self.data.digest, self.config.augment, self.augment_seed, 0)
        load = partial(self._load, replace(numerics, dtype="fp32"))
        return CachedTeacher(tap, self.bank, lambda view: replace(key, view=view), layouts, load, self.data)

    def validation_accuracy(self) -> Score | None:
        """Share of labelled validation samples the module gets right; None when there are no labels to judge by."""
        split = self.splits.get("validation")
        if split is None or split.labels is None or len(split) == 0:
            self.on_event(
                "note", {"text": "patience needs a score or labelled validation samples; training all epochs"}
            )
            return None
        held = TrainingSet([split])
        numerics = Numerics("fp32", channels_last=False)

        def accuracy(module: nn.Module) -> float:
            with torch.no_grad():
                right = 0
                for start in range(0, len(held), 256):
                    positions = np.arange(start, min(start + 256, len(held)))
                    guess = module(**numerics.place(held.batch(positions), self.device)).argmax(-1).cpu().numpy()
                    right += int((guess == held.labels[positions]).sum())
                return right / int((held.labels != UNLABELLED).sum())

        return accuracy


def _seed(seed: int, purpose: str) -> int:
    """Seeds of the separate random streams (48 bits)."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{purpose}".encode()).digest()[:6], "big")


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
    )
