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
from compressor.distil import activations, checkpoint, ensemble, optim, passes, precision, teachers
from compressor.distil.augment import augment
from compressor.distil.bank import BankKey, Layout
from compressor.distil.changes import Changes, changing, label_signal
from compressor.distil.ensemble import PanelTap
from compressor.distil.objectives.base import Context, Pass, Surveys
from compressor.distil.panel import Panel, panel_signals
from compressor.distil.precision import Numerics
from compressor.distil.processes import Processes
from compressor.distil.result import DistilResult, OnEvent, ignore
from compressor.distil.rollouts import OnPolicy
from compressor.distil.step import Parts
from compressor.distil.strategies.draws import Losses, Stream
from compressor.distil.strategies.judging import Judges
from compressor.distil.strategies.pool import Pool
from compressor.distil.stream import UNLABELLED, TrainingSet
from compressor.distil.teachers import CacheDecision, CachedTeacher, NoTeacher, OnlineTeacher, TeacherSource
from compressor.distil.terms import Weighted, build
from compressor.distil.top import TopTap
from compressor.distil.training import Progress, Training
from compressor.errors import StageError
from compressor.models import rebuild
from compressor.models.signals import SignalTap, available
from compressor.recipe import DistilStage
from compressor.schedule import Schedule
from compressor.strategy import MixupStrategy
from compressor.types import Array, LayerFact

CHECKPOINT_SECONDS = 300.0  # at most this much work is lost by a kill
CHECKPOINT = "checkpoint.pt"
PLAIN = Numerics("fp32", channels_last=False)
PROBE_SAMPLES = 4  # samples of the batch that shows the shapes of the signals

Score = Callable[[nn.Module], float]
TeacherTap = SignalTap | TopTap | PanelTap


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

    Raises:
        ConfigError: an objective does not exist, has wrong options, or asks for signals that are not there.
        StageError: the loss is not finite, the disk is full, the bank or the checkpoint is stale, nothing to learn
        from.
    """
    setup = _Setup(
        student, teacher, data, config, seed, Path(bank), teacher_digest, dict(signals), labels_only, on_event
    )
    setup.panel = None if labels_only else panel
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
        judge = score if score is not None or config.patience is None else setup.validation_accuracy()
        training = Training(parts, config, path, constant, judge, on_event, checkpoint_seconds)
        torch.manual_seed(_seed(seed, "dropout") + setup.processes.rank)  # after the probes, which draw numbers too
        if state is None:
            training.progress.forwards = parts.teacher.forwards + setup.asked  # of strategies and objectives' passes
            training.save()  # the decisions are on disk before anything depends on them
        else:
            training.restore(state)
            on_event("resume", {"epoch": training.progress.epoch, "step": training.progress.step})
        training.run()
        constant |= setup.commit()
        if setup.processes.main:
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
        self.data = TrainingSet.of(data, config.data)
        self.processes = Processes()
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.device = self.accelerator.device
        self.augment_seed = _seed(seed, "augment") if config.augment else 0
        self.asked = 0  # samples the teacher was asked about by strategies
        self.changes = Changes(())
        self.held_out: Pass | None = None
        self.panel: Panel | None = None

    def fingerprint(self) -> str:
        """SHA-256 over everything the trained student depends on."""
        facts = [self.config.model_dump(mode="json"), self.seed, self.labels_only, self.teacher_digest, self.mapping]
        facts += [self.panel.facts()] if self.panel is not None else []
        text = json.dumps([*facts, self.data.digest, checkpoint.state_digest(self.student)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def assemble(self, stack: ExitStack, state: Mapping[str, Any] | None) -> tuple[Parts, dict[str, Any]]:
        """The parts of the run, and the decisions that its checkpoint stores."""
        self.student.to(self.device)
        chosen_data = self._choose(state)
        weighted = self._objectives()
        self._install(weighted)
        taught = label_signal(weighted)
        names = {"logits", taught}.union(*(item.objective.needs.student for item in weighted))
        tap = stack.enter_context(SignalTap(self.student, sorted(names), self.mapping))
        teacher_tap = self._teacher_tap(stack, weighted)
        layouts = self._prepare(weighted, tap, teacher_tap)
        numerics = self._numerics(state)
        decision = self._cache(layouts, weighted, state)
        source = self._source(teacher_tap, layouts, decision, numerics)
        self._survey(weighted, tap, source, fresh=state is None)
        frozen, still = optim.freeze(self.student, self.config.freeze)
        stack.callback(lambda: [parameter.requires_grad_(True) for parameter in frozen])
        if numerics.channels_last:
            self.student.to(memory_format=torch.channels_last)
            stack.callback(lambda: self.student.to(memory_format=torch.contiguous_format))
        thaw = optim.Thaw(self.student, self.config.unfreeze, self.config.unfreeze_by) if self.config.unfreeze else None
        if thaw is not None:
            stack.callback(thaw.release)
        if self.config.checkpoint_activations:
            stack.enter_context(activations.checkpointed(self.student))
        projectors = nn.ModuleList(m for m in (item.objective.modules() for item in weighted) if m is not None)
        chosen = optim.optimiser(self.student, projectors.parameters(), self.config)
        # the student is not wrapped: gradients are added up once a step, with the counts they are divided by
        prepared = self.accelerator.prepare(chosen)
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
            thaw=thaw,
            data=self.data,
            load=partial(self._load, numerics),
            numerics=numerics,
            device=self.device,
            stream=Stream(
                self.data, self.config, _seed(self.seed, "order"), self._losses(source, layouts), self._agreed
            ),
            label_weight=self.label_weight,
            processes=self.processes,
            label_signal=taught,
            rollouts=self._rollouts(),
        )
        constant = {"precision": numerics.dtype, "channels_last": numerics.channels_last}
        return parts, constant | chosen_data | {"cached": decision.cached, "cache_bytes": decision.bytes}

    @property
    def label_weight(self) -> float | Schedule:
        """Of cross-entropy with the labels; 0 when no sample has one."""
        return (1.0 if self.labels_only else self.config.labels) if self.data.labelled else 0.0

    def _choose(self, state: Mapping[str, Any] | None) -> dict[str, Tensor]:
        """Let the strategies decide which samples take part; what they decided, for the checkpoint."""
        if not self.config.strategy:
            return {}
        if state is not None:
            kept, labels = (state[name].numpy() for name in ("kept", "new_labels"))
        else:
            judges = Judges(self.student, self._asked_teacher, lambda positions: self._load(PLAIN, positions, 0))
            seed = _seed(self.seed, "strategies")
            pool = Pool(self.data, judges.teacher, judges.student, seed, self.on_event)
            pool.apply(self.config.strategy, labels_only=self.labels_only)
            kept, labels = self._agreed(pool.kept), self._agreed(pool.labels)
        self.data = self.data.take(kept, labels)
        return {"kept": torch.from_numpy(kept), "new_labels": torch.from_numpy(labels)}

    def _asked_teacher(self, positions: Array, inputs: Mapping[str, Tensor]) -> Tensor:
        if self.teacher is None:
            raise StageError("there is no teacher to ask", hint="Strategies that judge samples need a PyTorch teacher.")
        self.asked += len(positions)
        return self.teacher.to(self.device).eval()(**inputs)  # type: ignore[no-any-return]

    def _losses(self, source: TeacherSource, layouts: Mapping[str, Layout]) -> Losses | None:
        """Both models' losses for strategies that choose while training; the null twin draws at random."""
        if self.labels_only:
            return None

        def taught(positions: Array, inputs: Mapping[str, Tensor]) -> Tensor:
            if "logits" in layouts:
                source.prepare(0)
                return source.signals(positions, inputs, 0)["logits"]
            source.forwards += len(positions)
            return self._asked_teacher(positions, inputs)

        judges = Judges(self.student, taught, lambda positions: self._load(PLAIN, positions, 0))
        return lambda positions: judges.losses(self.data, positions)

    def _agreed(self, values: Array) -> Array:
        """The first process's values, on all of them."""
        return self.processes.share(torch.from_numpy(values.copy())).numpy() if self.processes.count > 1 else values

    def _objectives(self) -> list[Weighted]:
        if self.labels_only:
            if not self.data.labelled:
                raise StageError(
                    "the null twin has no labels to learn from", hint="Set null_twin = false in the recipe."
                )
            return []
        if self.teacher is None:
            raise StageError("there is no teacher to learn from", hint="A distil stage needs a PyTorch teacher.")
        student = available(self.student, self.mapping)
        teacher = panel_signals(self.panel, available(self.teacher, self.mapping), ensemble.others(self.panel))
        weighted = build(self.config, student, teacher, self.processes.count)
        if not weighted and not self.label_weight:
            raise StageError("there is nothing to learn from", hint="Give the stage an objective, or the data labels.")
        return weighted

    def _install(self, weighted: Sequence[Weighted]) -> None:
        """Put the objectives' parts into the student, the same ones for the same seed."""
        self.changes = Changes(changing(weighted))
        with torch.random.fork_rng():
            torch.manual_seed(_seed(self.seed, "heads"))
            self.changes.install(self.student.eval(), self._load(PLAIN, self._few(), 0))
        self.student.to(self.device)

    def _rollouts(self) -> OnPolicy | None:
        """On-policy batches, for the student that has a teacher to judge them."""
        config = self.config.rollouts
        wanted = config is not None and config.fraction > 0 and not self.labels_only
        return OnPolicy(config, self.student, _seed(self.seed, "rollouts")) if wanted and config else None

    def _few(self) -> Array:
        return np.arange(min(PROBE_SAMPLES, len(self.data)))

    def _survey(self, weighted: Sequence[Weighted], tap: SignalTap, source: TeacherSource, *, fresh: bool) -> None:
        """Let objectives learn from the whole training set; a resumed run has what they found in its checkpoint."""
        split = self.splits.get("validation")
        if split is not None and len(split):
            held = TrainingSet([split])
            self.held_out = passes.over(held, lambda at, _: PLAIN.place(held.batch(at), self.device), self.student, tap)
        found = [item for item in weighted if isinstance(item.objective, Surveys)]
        if not fresh or not found:
            return
        seen = passes.SetPass(self.data, partial(self._load, PLAIN), source, self.student, tap)
        generator = torch.Generator().manual_seed(_seed(self.seed, "survey"))
        for item in found:
            self.on_event("note", {"text": f"{item.name}: a pass over the training set"})
            item.objective.survey(seen, generator)  # type: ignore[attr-defined]  # filtered above

    def commit(self) -> dict[str, Any]:
        """Settle the parts in the student; what the checkpoint keeps of them."""
        self.changes.commit(self.student.eval(), self.held_out)
        facts = [asdict(fact) for fact in self.changes.facts]
        return {"record": json.dumps(self.changes.record), "facts": json.dumps(facts)}

    def _teacher_tap(self, stack: ExitStack, weighted: Sequence[Weighted]) -> TeacherTap | None:
        names = frozenset[str]().union(*(item.objective.needs.teacher for item in weighted))
        if self.teacher is None or not names:
            return None
        self.teacher.to(self.device).eval()
        if self.panel is not None:
            place = partial(PLAIN.place, device=self.device)
            return stack.enter_context(PanelTap(self.panel, self.teacher, names, self.mapping, self.data, place))
        tap = stack.enter_context(SignalTap(self.teacher, sorted(names), self.mapping))
        if self.config.cache_logits is None or "logits" not in names:
            return tap  # type: ignore[no-any-return]
        read: list[Any] = [item.objective for item in weighted if "logits" in item.objective.needs.teacher]
        return TopTap(tap, self.config.cache_logits, [objective.options.temperature for objective in read])

    def _load(self, numerics: Numerics, positions: Array, view: int) -> dict[str, Tensor]:
        made = augment(self.data.batch(positions), self.config.augment, positions, view, self.augment_seed)
        return numerics.place(made, self.device)

    def _prepare(self, weighted: Sequence[Weighted], tap: SignalTap, teacher: TeacherTap | None) -> dict[str, Layout]:
        """Show the objectives real shapes, and find how the teacher's signals would lie in the bank."""
        with torch.no_grad():
            inputs = self._load(PLAIN, self._few(), 0)
            self.student.eval()
            seen, taught = tap(inputs), teacher(inputs) if teacher is not None else {}
            generator = torch.Generator().manual_seed(_seed(self.seed, "projectors"))
            for item in weighted:
                item.objective.prepare(Context(seen, taught, generator, self.device, int(seen["logits"].shape[-1])))
            if isinstance(teacher, PanelTap):
                return teacher.layouts()
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
        online = any(item.objective.needs.online_teacher for item in weighted) or self._rollouts() is not None
        online = online or any(isinstance(strategy, MixupStrategy) for strategy in self.config.strategy)
        found = teachers.decide(self.config.cache, layouts, self.data, views, online, self.bank)
        self.on_event("teacher", {"cached": found.cached, "bytes": found.bytes, "reason": found.reason})
        if self.config.augment and self.config.cache != "off" and self.config.views == 1 and self.config.epochs > 1:
            self.on_event(
                "note", {"text": "augmentation with views = 1 shows the same picture every epoch; raise views"}
            )
        return found

    def _source(
        self, tap: TeacherTap | None, layouts: Mapping[str, Layout], decision: CacheDecision, numerics: Numerics
    ) -> TeacherSource:
        if tap is None:
            return NoTeacher()
        if isinstance(tap, PanelTap):
            return self._ensemble(tap, layouts, decision, numerics)
        if not decision.cached:
            return OnlineTeacher(tap, partial(numerics.autocast, self.device))
        key = BankKey(self.teacher_digest, self.data.digest, self.config.augment, self.augment_seed, 0)
        load = partial(self._load, replace(numerics, dtype="fp32"))
        return CachedTeacher(tap, self.bank, lambda view: replace(key, view=view), layouts, load, self.data)

    def _ensemble(
        self, tap: PanelTap, layouts: Mapping[str, Layout], decision: CacheDecision, numerics: Numerics
    ) -> TeacherSource:
        sight = ensemble.Sight(self.config.augment, self.augment_seed, tap.place)
        autocast = partial(numerics.autocast, self.device)
        found = ensemble.sources(tap, sight, self.bank, cached=decision.cached, layouts=layouts, autocast=autocast)
        base = ensemble.base_weights(tap, self.splits.get("validation"), tap.place)
        shown = ", ".join(f"{m.teacher.name} {float(w):.3f}" for m, w in zip(tap.members, base, strict=True))
        self.on_event("note", {"text": f"weights of the teachers ({tap.panel.weights}): {shown}"})
        return ensemble.Ensemble(tap, found, base, _seed(self.seed, "teachers"))

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
        choosing_forwards=progress.choosing,
        record=tuple(json.loads(constant["record"])),
        facts=tuple(LayerFact(**fact) for fact in json.loads(constant["facts"])),
    )
