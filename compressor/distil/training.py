"""One training run: steps, validation, checkpoints. Everything it needs is decided before (see ``loop.py``)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor.distil import checkpoint
from compressor.distil.objectives.base import Step
from compressor.distil.optim import learning_rate
from compressor.distil.result import EpochRecord, OnEvent
from compressor.distil.rollouts import state_of
from compressor.distil.schedules import Courses
from compressor.distil.step import Gradients, Parts
from compressor.distil.strategies.draws import Draw
from compressor.errors import StageError
from compressor.recipe import DistilStage

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
    choosing: int = 0  # samples the student was run on by strategies that choose
    history: list[dict[str, Any]] = field(default_factory=list)
    feedback: dict[str, list[float]] = field(default_factory=dict)  # values of feedback schedules

    def records(self) -> tuple[EpochRecord, ...]:
        """The history as frozen values."""
        return tuple(EpochRecord(**item) for item in self.history)


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
        self.total = parts.stream.steps * config.epochs
        self.gradients = Gradients(parts, config.accumulate)
        self.meter = Meter(self.gradients.names, parts.device)
        more = {} if parts.rollouts is None else parts.rollouts.courses
        self.courses = Courses(parts.label_weight, parts.objectives, self.gradients.names, more)
        self._trained = [p for group in parts.optimiser.param_groups for p in group["params"]]
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
        progress.forwards += parts.processes.total(parts.teacher.forwards - before)
        if progress.step == 0:
            self._choosing(lambda: parts.stream.begin(epoch))
        self._train_mode()
        draws, steps = parts.stream.epoch(epoch, progress.step), parts.stream.steps
        started = time.perf_counter()
        while progress.step < steps:
            draw = self._choosing(lambda: next(draws))
            due = self._step(draw, view, epoch)
            progress.step += 1
            progress.index += 1
            if progress.index % CHECK_STEPS == 0:
                self._check_loss()
            if due and progress.step < steps:
                self._check_loss()
                progress.epoch_seconds += time.perf_counter() - started
                self.save()
                started = time.perf_counter()
            self._tell()
        self._check_loss()
        progress.epoch_seconds += time.perf_counter() - started

    def _choosing(self, choose: Callable[[], Any]) -> Any:
        """Run a choice of the data strategies and count what it cost. All processes make the same one."""
        stream, teacher = self.parts.stream, self.parts.teacher
        before, taught = stream.forwards, teacher.forwards
        found = choose()
        self.progress.choosing += stream.forwards - before
        self.progress.forwards += teacher.forwards - taught
        return found

    def _train_mode(self) -> None:
        parts = self.parts
        parts.student.train()
        parts.masking.train(True)
        for module in [*parts.still, *(parts.thaw.still() if parts.thaw is not None else ())]:
            module.eval()

    def _step(self, draw: Draw, view: int, epoch: int) -> bool:
        """One step of the optimiser; is it time for a checkpoint?"""
        parts, progress = self.parts, self.progress
        step = parts.masking.begin(Step(progress.index, self.total, epoch))
        if parts.thaw is not None and parts.thaw.at(step.index, step.total):
            self._train_mode()
        weights = self.courses.apply(step.index, step.total, progress.feedback)
        if parts.rollouts is not None:
            parts.rollouts.set(self.courses.values(step.index, step.total, progress.feedback))
        due = time.monotonic() - self._saved >= self.checkpoint_seconds
        values, forwards, due = self.gradients.compute(draw, view, step, weights, due)
        progress.forwards += forwards
        parts.masking.gradients(step)
        if self.config.clip is not None:
            nn.utils.clip_grad_norm_(self._trained, self.config.clip, foreach=True)
        rate = learning_rate(step.index, step.total, self.config)
        for group in parts.optimiser.param_groups:
            group["lr"] = rate
        parts.optimiser.step()
        parts.optimiser.zero_grad(set_to_none=True)
        if parts.average is not None:
            parts.average.update(step.index)
        parts.masking.end(parts.average.values if parts.average is not None else {})
        self.meter.add(values, values.sum(), step.index)
        return due

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
            learning_rate=learning_rate(progress.index - 1, self.total, self.config),
            score=score,
            terms=dict(zip(self.meter.names, means, strict=True)),
            values=self.courses.values(progress.index - 1, self.total, progress.feedback) | self.parts.masking.values(),
        )
        self.courses.observe(
            {**record.terms, "loss": record.loss, **({} if score is None else {"score": score})}, progress.feedback
        )
        progress.history.append(asdict(record))
        progress.seconds += progress.epoch_seconds
        if score is not None and self._may_be_best(score):
            progress.best_score, progress.best_epoch = score, progress.epoch
            self.best = {name: tensor.detach().cpu().clone() for name, tensor in self._weights().items()}
        progress.epoch, progress.step, progress.epoch_seconds = progress.epoch + 1, 0, 0.0
        self.meter.sums.zero_()
        self.save()
        event = {f.name: getattr(record, f.name) for f in fields(record) if f.name not in ("terms", "score", "values")}
        named = {f"term {name}": value for name, value in record.terms.items() if len(record.terms) > 1}
        event |= named | dict(record.values) | ({} if score is None else {"score": score})
        self.on_event("epoch", event)

    def _may_be_best(self, score: float) -> bool:
        """Better than all before, and what could ship: masks that still grow or learn would change it."""
        progress = self.progress
        better = self.config.patience is not None and score > progress.best_score
        return better and self.parts.masking.complete(progress.index - 1, self.total)

    def _weights(self) -> dict[str, Tensor]:
        """The student's state, with the moving average where there is one."""
        state: dict[str, Tensor] = dict(self.parts.student.state_dict())
        return state | (self.parts.average.values if self.parts.average else {})

    def _validate(self) -> float | None:
        if self.score is None:
            return None
        found = torch.zeros((), dtype=torch.float64)
        if self.parts.processes.main:
            found.fill_(self._scored(self.score))
        return float(self.parts.processes.share(found))

    def _scored(self, score: Callable[[nn.Module], float]) -> float:
        self.parts.student.eval()
        self.parts.masking.train(False)
        applied: AbstractContextManager[Any] = nullcontext()
        if self.parts.average is not None:
            applied = self.parts.average.applied()
        with applied, torch.random.fork_rng(devices=[]):
            return float(score(self.parts.student))

    def save(self) -> None:
        """Write the checkpoint. A student with weights that are not finite is never written over a good one."""
        parts = self.parts
        if not all(bool(torch.isfinite(p).all()) for p in self._trained):
            raise StageError(
                f"the student's weights are not finite after step {self.progress.index - 1}",
                hint=f"Lower `learning_rate` (now {self.config.learning_rate:g}), or set `clip`.",
            )
        random = parts.processes.gather(torch.get_rng_state())
        self._saved = time.monotonic()
        if not parts.processes.main:
            return
        state = self.constant | {
            "done": False,
            "progress": asdict(self.progress),
            "student": parts.student.state_dict(),
            "projectors": parts.projectors.state_dict(),
            "optimiser": parts.optimiser.state_dict(),
            "average": parts.average.values if parts.average else {},
            "best": self.best,
            "sums": self.meter.sums,
            "replay": state_of(parts.rollouts),
            "masking": parts.masking.state(),
            "shares": parts.stream.shares.tolist(),
            "random": random,  # a row a process
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
        if parts.rollouts is not None:
            parts.rollouts.restore(state.get("replay", []))
        parts.masking.restore(state["masking"])
        self.best = dict(state["best"])
        self.meter.sums.copy_(state["sums"])
        parts.stream.shares = np.array(state["shares"])
        torch.set_rng_state(state["random"][min(parts.processes.rank, len(state["random"]) - 1)])

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self._told >= 1.0:
            self._told = now
            self.on_event("progress", {"step": self.progress.index, "total": self.total, "epoch": self.progress.epoch})
