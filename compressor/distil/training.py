"""One training run: steps, validation, checkpoints. Everything it needs is decided before (see ``loop.py``)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.distil import checkpoint
from compressor.distil.objectives.base import Batch, Signals, Step, Term
from compressor.distil.objectives.multilabel import binary_label_term
from compressor.distil.optim import MovingAverage, learning_rate
from compressor.distil.precision import Numerics
from compressor.distil.result import EpochRecord, OnEvent
from compressor.distil.stream import UNLABELLED, TrainingSet
from compressor.distil.teachers import TeacherSource
from compressor.distil.terms import Weighted, combine
from compressor.errors import StageError
from compressor.recipe import DistilStage
from compressor.types import Array

CHECK_STEPS = 32  # the loss is looked at this often, so that a GPU need not wait for every step


@dataclass
class Progress:
    """Where the run is; every field goes into the checkpoint."""

    epoch: int = 0
    step: int = 0  # in the epoch
    index: int = 0  # of all steps
    best_epoch: int = -1
    best_score: float = float("-inf")
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    forwards: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    def records(self) -> tuple[EpochRecord, ...]:
        """The history as frozen values."""
        return tuple(EpochRecord(**item) for item in self.history)


@dataclass(frozen=True)
class Parts:
    """What a run is made of."""

    student: nn.Module
    tap: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    teacher: TeacherSource
    objectives: Sequence[Weighted]
    projectors: nn.ModuleList
    optimiser: Any  # torch.optim.Optimizer
    backward: Callable[[Tensor], None]
    average: MovingAverage | None
    still: Sequence[nn.Module]  # frozen modules that stay in evaluation mode
    data: TrainingSet
    load: Callable[[Array, int], dict[str, Tensor]]
    numerics: Numerics
    device: Any
    label_weight: float
    order_seed: int
    label_signal: str = "logits"  # of the student: what cross-entropy with the labels teaches


class Meter:
    """Sums the terms of an epoch without waiting for the device, and notices a loss that is not a number."""

    def __init__(self, names: Sequence[str], device: Any) -> None:
        self.names = tuple(names)
        self.sums = torch.zeros(len(names), device=device)
        self._recent = torch.zeros(CHECK_STEPS, device=device)

    def add(self, parts: Tensor, loss: Tensor, index: int) -> None:
        """Count one step."""
        self.sums += parts
        self._recent[index % CHECK_STEPS] = loss

    def first_bad(self, index: int) -> tuple[int, float] | None:
        """Step and value of the first loss that is not finite among the last ones, ``index`` being the last step."""
        recent = self._recent.cpu()
        if bool(torch.isfinite(recent).all()):
            return None
        steps = range(max(0, index - CHECK_STEPS + 1), index + 1)
        return next((s, float(recent[s % CHECK_STEPS])) for s in steps if not torch.isfinite(recent[s % CHECK_STEPS]))


class Training:
    """Runs the epochs of a distillation from wherever the checkpoint is."""

    def __init__(
        self,
        parts: Parts,
        config: DistilStage,
        path: Path,
        constant: Mapping[str, Any],
        score: Callable[[nn.Module], float] | None,
        on_event: OnEvent,
        checkpoint_seconds: float,
    ) -> None:
        self.parts, self.config, self.path, self.constant = parts, config, path, dict(constant)
        self.score, self.on_event, self.checkpoint_seconds = score, on_event, checkpoint_seconds
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}
        self.per_epoch = len(parts.data.order(0, config.batch, parts.order_seed))
        self.meter = Meter(_term_names(parts), parts.device)
        self._trained = [p for group in parts.optimiser.param_groups for p in group["params"]]
        self._labels = torch.from_numpy(parts.data.labels).to(parts.device)
        self._saved = self._told = time.monotonic()

    def run(self) -> None:
        """Train to the end; the student is left with the weights that count."""
        while self.progress.epoch < self.config.epochs and not self._patience_over():
            self._epoch(self.progress.epoch)
            self._close_epoch()
        final = self.best or (self.parts.average.values if self.parts.average else {})
        if final:
            self.parts.student.load_state_dict(final, strict=False)
        if not self.best:
            self.progress.best_epoch = self.progress.epoch - 1

    def _patience_over(self) -> bool:
        patience, progress = self.config.patience, self.progress
        if patience is None or self.score is None or progress.best_epoch < 0:
            return False
        return progress.epoch - 1 - progress.best_epoch >= patience

    def view(self, epoch: int) -> int:
        """Which view an epoch sees: one of the fixed ones, or a fresh one when the recipe gives up caching."""
        if not self.config.augment:
            return 0
        return epoch if self.config.cache == "off" else epoch % self.config.views

    def _epoch(self, epoch: int) -> None:
        parts, progress, view = self.parts, self.progress, self.view(epoch)
        before = parts.teacher.forwards
        parts.teacher.prepare(view)
        progress.forwards += parts.teacher.forwards - before
        parts.student.train()
        for module in parts.still:
            module.eval()
        order = parts.data.order(epoch, self.config.batch, parts.order_seed)
        started = time.perf_counter()
        while progress.step < len(order):
            before = parts.teacher.forwards
            self._step(order[progress.step], view, epoch)
            progress.forwards += parts.teacher.forwards - before
            progress.step += 1
            progress.index += 1
            if progress.index % CHECK_STEPS == 0:
                self._check_loss()
            if time.monotonic() - self._saved >= self.checkpoint_seconds and progress.step < len(order):
                self._check_loss()
                progress.epoch_seconds += time.perf_counter() - started
                self.save()
                started = time.perf_counter()
            self._tell()
        self._check_loss()
        progress.epoch_seconds += time.perf_counter() - started

    def _step(self, positions: Array, view: int, epoch: int) -> None:
        parts, index = self.parts, self.progress.index
        inputs = parts.load(positions, view)
        with parts.numerics.autocast(parts.device):
            student = parts.tap(inputs)
        teacher = parts.teacher.signals(positions, inputs, view)
        batch = Batch(self._labels[torch.from_numpy(positions)], inputs.get("attention_mask"))
        step = Step(index, self.per_epoch * self.config.epochs, epoch)
        values = combine(self._terms(student, teacher, batch, step))
        loss = values.sum()
        parts.backward(loss)
        if self.config.clip is not None:
            nn.utils.clip_grad_norm_(self._trained, self.config.clip, foreach=True)
        rate = learning_rate(index, step.total, self.config)
        for group in parts.optimiser.param_groups:
            group["lr"] = rate
        parts.optimiser.step()
        parts.optimiser.zero_grad(set_to_none=True)
        if parts.average is not None:
            parts.average.update(index)
        self.meter.add(values.detach(), loss.detach(), index)

    def _terms(self, student: Signals, teacher: Signals, batch: Batch, step: Step) -> list[tuple[float, Term]]:
        found = []
        if self.parts.label_weight:
            found.append((self.parts.label_weight, label_term(student[self.parts.label_signal], batch)))
        found += [(item.weight, item.objective(student, teacher, batch, step)) for item in self.parts.objectives]
        return found

    def _check_loss(self) -> None:
        bad = self.meter.first_bad(self.progress.index - 1)
        if bad is None:
            return
        kept = f"the checkpoint of epoch {self.progress.epoch} is kept in `{self.path.parent}`"
        raise StageError(
            f"the loss became {bad[1]} at step {bad[0]} (epoch {self.progress.epoch}); {kept}",
            hint=f"Lower `learning_rate` (now {self.config.learning_rate:g}), raise `warmup`, or set `clip`.",
        )

    def _close_epoch(self) -> None:
        progress, score = self.progress, self._validate()
        means = (self.meter.sums / max(1, progress.step)).tolist()
        record = EpochRecord(
            epoch=progress.epoch,
            steps=progress.step,
            seconds=progress.epoch_seconds,
            loss=sum(means),
            learning_rate=learning_rate(progress.index - 1, self.per_epoch * self.config.epochs, self.config),
            score=score,
            terms=dict(zip(self.meter.names, means, strict=True)),
        )
        progress.history.append(asdict(record))
        progress.seconds += progress.epoch_seconds
        if self.config.patience is not None and score is not None and score > progress.best_score:
            progress.best_score, progress.best_epoch = score, progress.epoch
            self.best = {name: tensor.detach().cpu().clone() for name, tensor in self._weights().items()}
        progress.epoch, progress.step, progress.epoch_seconds = progress.epoch + 1, 0, 0.0
        self.meter.sums.zero_()
        self.save()
        event = {f.name: getattr(record, f.name) for f in fields(record) if f.name not in ("terms", "score")}
        self.on_event("epoch", event | ({} if score is None else {"score": score}))

    def _weights(self) -> dict[str, Tensor]:
        """The student's state, with the moving average where there is one."""
        state: dict[str, Tensor] = dict(self.parts.student.state_dict())
        return state | (self.parts.average.values if self.parts.average else {})

    def _validate(self) -> float | None:
        if self.score is None:
            return None
        self.parts.student.eval()
        applied: AbstractContextManager[Any] = nullcontext()
        if self.parts.average is not None:
            applied = self.parts.average.applied()
        with applied, torch.random.fork_rng(devices=[]):
            return float(self.score(self.parts.student))

    def save(self) -> None:
        """Write the checkpoint. A student with weights that are not finite is never written over a good one."""
        parts = self.parts
        if not all(bool(torch.isfinite(p).all()) for p in self._trained):
            raise StageError(
                f"the student's weights are not finite after step {self.progress.index - 1}",
                hint=f"Lower `learning_rate` (now {self.config.learning_rate:g}), or set `clip`.",
            )
        state = self.constant | {
            "done": False,
            "progress": asdict(self.progress),
            "student": parts.student.state_dict(),
            "projectors": parts.projectors.state_dict(),
            "optimiser": parts.optimiser.state_dict(),
            "average": parts.average.values if parts.average else {},
            "best": self.best,
            "sums": self.meter.sums,
            "random": torch.get_rng_state(),
        }
        checkpoint.save(self.path, state)
        self._saved = time.monotonic()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        parts = self.parts
        self.progress = Progress(**state["progress"])
        parts.student.load_state_dict(state["student"])
        parts.projectors.load_state_dict(state["projectors"])
        parts.optimiser.load_state_dict(state["optimiser"])
        if parts.average is not None:
            parts.average.load(state["average"])
        self.best = dict(state["best"])
        self.meter.sums.copy_(state["sums"])
        torch.set_rng_state(state["random"])

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self._told >= 1.0:
            self._told = now
            total = self.per_epoch * self.config.epochs
            self.on_event("progress", {"step": self.progress.index, "total": total, "epoch": self.progress.epoch})


def label_term(logits: Tensor, batch: Batch) -> Term:
    """Cross-entropy with the labels; samples (or tokens) without one count neither in the sum nor in the count.

    Several labels a sample, (B, C) for logits (B, C), are taught by :func:`binary_label_term`.
    """
    labels = batch.labels
    assert labels is not None  # the loop always gives labels, -100 where there is none
    if labels.dim() == logits.dim() == 2:
        return binary_label_term(logits, batch)
    flat = logits.float().flatten(0, -2)
    total = F.cross_entropy(flat, labels.flatten(), ignore_index=UNLABELLED, reduction="sum")
    return Term(total, (labels != UNLABELLED).sum())


def _term_names(parts: Parts) -> list[str]:
    names = ["labels"] if parts.label_weight else []
    for item in parts.objectives:
        same = sum(name.split("#")[0] == item.name for name in names)
        names.append(f"{item.name}#{same + 1}" if same else item.name)
    return names
