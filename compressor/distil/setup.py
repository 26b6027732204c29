"""From the arguments of a distillation to the parts of its run: models, taps, teachers, data, optimiser."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor.data.types import DataBundle
from compressor.distil import activations, checkpoint, ensemble, lengths, optim, passes, precision, teachers
from compressor.distil.augment import augment
from compressor.distil.bank import BankKey, Layout
from compressor.distil.changes import Changes, changing, label_signal, shapes_student
from compressor.distil.ensemble import PanelTap
from compressor.distil.groups import GroupOrder, candidates
from compressor.distil.masks import masking_of
from compressor.distil.masks.base import Masking, NoMasking
from compressor.distil.norms import SharedNorms
from compressor.distil.objectives.base import Context, Pass, Surveys
from compressor.distil.panel import Panel, panel_signals
from compressor.distil.precision import Numerics
from compressor.distil.processes import Processes
from compressor.distil.result import OnEvent
from compressor.distil.rollouts import OnPolicy
from compressor.distil.rounding import Rounding, calibration, install
from compressor.distil.step import Parts
from compressor.distil.strategies.choosing import Choosing
from compressor.distil.strategies.draws import Stream
from compressor.distil.stream import TrainingSet
from compressor.distil.supernet import supernet_of
from compressor.distil.teachers import CacheDecision, CachedTeacher, NoTeacher, OnlineTeacher, TeacherSource
from compressor.distil.terms import Weighted, build, offered_fields
from compressor.distil.top import TopTap
from compressor.distil.validation import PLAIN
from compressor.errors import StageError
from compressor.models.signals import SignalTap, available, output_mask
from compressor.profile import QuantizationRules
from compressor.recipe import DistilStage
from compressor.schedule import Schedule
from compressor.strategy import MixupStrategy
from compressor.types import Array

PROBE_SAMPLES = 4  # samples of the batch that shows the shapes of the signals

TeacherTap = SignalTap | TopTap | PanelTap


class Setup:
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
        self.choosing = Choosing(student, teacher, partial(self._load, PLAIN), self.processes)
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.device = self.accelerator.device
        self.augment_seed = seed_of(seed, "augment") if config.augment else 0
        self.changes = Changes(())
        self.untaught: list[Weighted] = []
        self.held_out: Pass | None = None
        self.panel: Panel | None = None
        self.masking: Masking = NoMasking()
        self.cost: Callable[[Any], float] | None = None  # of a layer's shape, for budgets in milliseconds
        self.round_to = 1  # multiple of channels, neurons and hidden dimensions that learnt masks leave
        self.rules = QuantizationRules()  # of the device, for fake quantization
        self.rounding = Rounding()

    def fingerprint(self) -> str:
        """SHA-256 over everything the trained student depends on."""
        facts = [self.config.model_dump(mode="json"), self.seed, self.labels_only, self.teacher_digest, self.mapping]
        facts += [self.panel.facts()] if self.panel is not None else []
        facts += [self.round_to] if self.config.cofi is not None else []
        facts += [self.rules.model_dump(mode="json")] if self.config.qat is not None else []
        text = json.dumps([*facts, self.data.digest, checkpoint.state_digest(self.student)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def assemble(self, stack: ExitStack, state: Mapping[str, Any] | None) -> tuple[Parts, dict[str, Any]]:
        """The parts of the run, and the decisions that its checkpoint stores."""
        self.student.to(self.device)
        if self.teacher is not None:
            self.teacher.to(self.device)
        chosen_data = self._choose(state)
        weighted = self._objectives()
        self._install(weighted)
        taught = label_signal(weighted)
        names = {"logits", taught}.union(*(item.objective.needs.student for item in weighted))
        tap = stack.enter_context(SignalTap(self.student, sorted(names), self.mapping))
        step_tap = lengths.apart(tap) if self.data.groups is not None and lengths.separable(names) else tap
        teacher_tap = self._teacher_tap(stack, weighted)
        layouts = self._prepare(weighted, tap, teacher_tap)
        numerics = self._numerics(state)
        decision = self._cache(layouts, weighted, state)
        source = self._source(teacher_tap, layouts, decision, numerics)
        self._survey(weighted, tap, source, fresh=state is None)
        order, mined = self._groups(source, state, cached="logits" in layouts)
        frozen, still = optim.freeze(self.student, self.config.freeze)
        stack.callback(lambda: [parameter.requires_grad_(True) for parameter in frozen])
        if numerics.channels_last:
            self.student.to(memory_format=torch.channels_last)
            stack.callback(lambda: self.student.to(memory_format=torch.contiguous_format))
        thaw = optim.Thaw(self.student, self.config.unfreeze, self.config.unfreeze_by) if self.config.unfreeze else None
        if thaw is not None:
            stack.callback(thaw.release)
        norms = SharedNorms(self.student, self.processes)
        stack.enter_context(norms.installed())
        if self.config.checkpoint_activations:
            stack.enter_context(activations.checkpointed(self.student))
        projectors = nn.ModuleList(m for m in (item.objective.modules() for item in weighted) if m is not None)
        chosen = optim.optimiser(self.student, projectors.parameters(), self.config)
        # the student is not wrapped: gradients are added up once a step, with the counts they are divided by
        prepared = self.accelerator.prepare(chosen)
        # after the optimiser and the frozen names, which are those of the plain student
        self.masking = masking_of(
            self.student,
            self.config,
            self._example,
            seed_of(self.seed, "masks"),
            self.round_to,
            prepared.optimizer,
        )
        if self.config.supernet is not None:
            shared = supernet_of(self, names, weighted, teacher_tap)
            self.masking, step_tap = shared, shared.tap
        # the null twin draws at random where the student's own losses choose
        losses = None if self.labels_only else self.choosing.losses(self.data, source, cached="logits" in layouts)
        parts = Parts(
            student=self.student,
            tap=step_tap,
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
            stream=Stream(self.data, self.config, seed_of(self.seed, "order"), losses, self.processes.agreed, order),
            label_weight=self.label_weight,
            processes=self.processes,
            label_signal=taught,
            rollouts=self._rollouts(),
            masking=self.masking,
            hides="mask" in self.config.augment,
            norms=norms,
        )
        constant = {"precision": numerics.dtype, "channels_last": numerics.channels_last}
        return parts, constant | chosen_data | mined | {"cached": decision.cached, "cache_bytes": decision.bytes}

    @property
    def label_weight(self) -> float | Schedule:
        """Of cross-entropy with the labels; 0 when no sample has one."""
        weight = self.config.labels
        if self.labels_only or weight == "estimate":  # the stage settles an estimate before it trains
            weight = 1.0
        return weight if self.data.labelled else 0.0

    def _choose(self, state: Mapping[str, Any] | None) -> dict[str, Tensor]:
        """Let the strategies decide which samples take part; what they decided, for the checkpoint."""
        if not self.config.strategy:
            return {}
        seed = seed_of(self.seed, "strategies")
        if state is None:
            found = self.choosing.pool(self.data, self.config, seed, self.on_event, labels_only=self.labels_only)
        else:
            found = state["kept"].numpy(), state["new_labels"].numpy()
        self.data = self.data.take(*found)
        return {"kept": torch.from_numpy(found[0]), "new_labels": torch.from_numpy(found[1])}

    def _objectives(self) -> list[Weighted]:
        if self.labels_only:
            self.untaught = self._untaught()
            if not self.data.labelled:
                raise StageError(
                    "the null twin has no labels to learn from", hint="Set null_twin = false in the recipe."
                )
            return []
        if self.teacher is None:
            raise StageError("there is no teacher to learn from", hint="A distil stage needs a PyTorch teacher.")
        student = available(self.student, self.mapping)
        teacher = panel_signals(self.panel, available(self.teacher, self.mapping), ensemble.others(self.panel))
        fields = offered_fields(self.config, self.panel, self.data.groups)
        weighted = build(self.config, student, teacher, self.processes.count, fields)
        if not weighted and not self.label_weight:
            raise StageError("there is nothing to learn from", hint="Give the stage an objective, or the data labels.")
        return weighted

    def _install(self, weighted: Sequence[Weighted]) -> None:
        """Put the objectives' parts into the student, the same ones for the same seed."""
        self.changes = Changes(changing([*weighted, *self.untaught]))
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(self.seed, "heads"))
            self.changes.install(self.student.eval(), self._example())
        if self.config.qat is not None:
            held = TrainingSet([self.splits["calibration"]]) if self.splits.get("calibration") else self.data
            batches = partial(calibration, held, self.config.qat.samples, partial(PLAIN.place, device=self.device))
            self.rounding = install(self.student, self.config.qat, self.rules, self._example(), batches)
        self.student.to(self.device)

    def _untaught(self) -> list[Weighted]:
        """For the null twin: the objectives whose part makes the student what it is. They teach it nothing."""
        if self.teacher is None:
            return []
        found = tuple(item for item in self.config.objective if shapes_student(item))
        stage = self.config.model_copy(update={"objective": found, "labels": 1.0})
        return build(stage, available(self.student, self.mapping), available(self.teacher, self.mapping))

    def _groups(
        self, source: TeacherSource, state: Mapping[str, Any] | None, *, cached: bool
    ) -> tuple[GroupOrder | None, dict[str, Tensor]]:
        """Batches of whole groups where the data have some, and the passages mined for them, for the checkpoint."""
        known, config = self.data.groups, self.config.negatives
        if known is None or config is None:
            return (None if known is None else GroupOrder(self.data, known)), {}
        if state is not None:
            pool = np.split(state["mined"].numpy(), np.cumsum(state["mined_sizes"].numpy())[:-1])
        else:
            embed = None
            if not self.labels_only and config.mine == "teacher":
                embed = self.choosing.embedder(source, cached=cached)
                self.on_event("note", {"text": "negatives: the teacher ranks the passages of each query"})
            pool = candidates(known, config, embed, seed_of(self.seed, "negatives"))
        sizes = torch.tensor([len(wrong) for wrong in pool])
        mined = {"mined": torch.from_numpy(np.concatenate(pool)), "mined_sizes": sizes}
        return GroupOrder(self.data, known, config.count, pool), mined

    def _rollouts(self) -> OnPolicy | None:
        """On-policy batches, for the student that has a teacher to judge them."""
        config = self.config.rollouts
        wanted = config is not None and config.used and not self.labels_only
        return OnPolicy(config, self.student, seed_of(self.seed, "rollouts")) if wanted and config else None

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
        generator = torch.Generator().manual_seed(seed_of(self.seed, "survey"))
        for item in found:
            self.on_event("note", {"text": f"{item.name}: a pass over the training set"})
            item.objective.survey(seen, generator)  # type: ignore[attr-defined]  # filtered above

    def commit(self) -> dict[str, Any]:
        """Settle the parts in the student; what the checkpoint keeps of them."""
        self.changes.commit(self.student.eval(), self.held_out)
        done = self.masking.commit(self.student, self._example)
        facts = [asdict(fact) for fact in (*self.changes.facts, *self.rounding.facts, *done.facts)]
        steps = [*self.changes.record, *self.rounding.steps, *done.steps]
        return {"record": json.dumps(steps), "facts": json.dumps(facts)}

    def _example(self) -> dict[str, Tensor]:
        """Model inputs of a few samples."""
        return self._load(PLAIN, self._few(), 0)

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
        names, hidden = self.config.augment, self.data.mask_id
        made = augment(self.data.batch(positions), names, positions, view, self.augment_seed, hidden)
        return numerics.place(made, self.device)

    def _prepare(self, weighted: Sequence[Weighted], tap: SignalTap, teacher: TeacherTap | None) -> dict[str, Layout]:
        """Show the objectives real shapes, and find how the teacher's signals would lie in the bank."""
        with torch.no_grad():
            inputs = self._load(PLAIN, self._few(), 0)
            self.student.eval()
            seen, taught = tap(inputs), teacher(inputs) if teacher is not None else {}
            generator = torch.Generator().manual_seed(seed_of(self.seed, "projectors"))
            for item in weighted:
                item.objective.prepare(Context(seen, taught, generator, self.device, int(seen["logits"].shape[-1])))
            if isinstance(teacher, PanelTap):
                return teacher.layouts()
            return {name: Layout.of(name, signal, output_mask(inputs)) for name, signal in taught.items()}

    def _numerics(self, state: Mapping[str, Any] | None) -> Numerics:
        if state is not None:
            return Numerics(state["precision"], state["channels_last"])
        positions = self.data.order(0, self.config.batch, seed_of(self.seed, "order"))[0]
        wanted = "fp32" if self.config.qat is not None else self.config.precision  # codes are exact in float32 alone
        found = precision.decide(wanted, self.student, self._load(PLAIN, positions, 0), self.device, self.bank)
        bf16 = self.processes.agreed(np.array([found.dtype == "bf16"]))[0]  # timed, so processes might differ
        found = replace(found, dtype="bf16" if bf16 else "fp32")
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
        cached = bool(self.processes.agreed(np.array([found.cached]))[0])  # the free disk may differ a little
        found = replace(found, cached=cached)
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
        shown = ", ".join(f"{m.teacher.name} {float(w):.3f}" for m, w in zip(tap.joined, base, strict=True))
        self.on_event("note", {"text": f"weights of the teachers ({tap.panel.weights}): {shown}"})
        return ensemble.Ensemble(tap, found, base, seed_of(self.seed, "teachers"))


def seed_of(seed: int, purpose: str) -> int:
    """Seeds of the separate random streams (48 bits)."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{purpose}".encode()).digest()[:6], "big")
