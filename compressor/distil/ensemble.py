"""The signals of several teachers, each from its own bank or run, and their combination."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from compressor.data.alignment import shared_vocabulary
from compressor.distil.augment import augment, uniforms
from compressor.distil.bank import BankKey, Layout
from compressor.distil.objectives.base import Batch, Signals, Vocabularies
from compressor.distil.onnx_tap import OnnxTap
from compressor.distil.panel import MAIN, Panel, Teacher
from compressor.distil.stream import UNLABELLED, TrainingSet
from compressor.distil.teachers import CachedTeacher, OnlineTeacher, TeacherSource
from compressor.errors import StageError
from compressor.models.signals import SignalTap, available, output_mask
from compressor.types import Array

STEPS = 200  # of the weights' fit: the likelihood of a mixture is concave in its weights
LEAST_WEIGHT = 1e-6
PROBE = 4
BATCH = 256
Place = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass
class Member:
    """A teacher at work: its tap, what is wanted of it, and its samples."""

    teacher: Teacher
    tap: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    names: tuple[str, ...]
    data: TrainingSet

    @property
    def joins(self) -> bool:
        """Are its logits over the student's classes?"""
        return not self.teacher.foreign

    def ordered(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Logits in the main teacher's order of classes."""
        order = list(self.teacher.order)
        return {name: tensor[..., order] if order and name == "logits" else tensor for name, tensor in found.items()}


class PanelTap:
    """All teachers of a panel, opened for the signals that the objectives read.

    Called like the tap of one teacher it shows the signals of the first samples, whatever the inputs: so the objectives
    see shapes.

    Args:
        panel: who teaches.
        main: the main teacher's module.
        names: signals that are read: ``logits`` (combined), ``hidden[2]`` (the main one's), ``second:logits``.
        mapping: signal names -> module paths of the main teacher.
        data: the training samples as the student sees them, without augmentation.
        place: puts inputs on the device.
    """

    def __init__(
        self,
        panel: Panel,
        main: nn.Module,
        names: Iterable[str],
        mapping: Mapping[str, str],
        data: TrainingSet,
        place: Place,
    ) -> None:
        self.panel, self.place = panel, place
        self.embedding = panel.teachers[0].model.task == "sentence-embedding"  # unit vectors, not logits
        self.names, self.data = frozenset(names), data
        self._stack = ExitStack()
        self._main, self._mapping = main, mapping
        self.members: list[Member] = []

    def __enter__(self) -> Self:
        for teacher in self.panel.teachers:
            wanted = self._wanted(teacher.name)
            if wanted:
                own = self.data if teacher.splits is None else _set_of(teacher.splits, self.data.rows)
                self.members.append(Member(teacher, self._tap(teacher, wanted), wanted, own))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _wanted(self, name: str) -> tuple[str, ...]:
        prefix = f"{name}:"
        own = {signal.removeprefix(prefix) for signal in self.names if signal.startswith(prefix)}
        if name == MAIN:
            own |= {signal for signal in self.names if ":" not in signal}
        joins = "logits" in self.names and not self._foreign(name)
        return tuple(sorted(own | ({"logits"} if joins else set())))

    def _foreign(self, name: str) -> bool:
        return next(teacher for teacher in self.panel.teachers if teacher.name == name).foreign

    def _tap(self, teacher: Teacher, names: tuple[str, ...]) -> Any:
        module = self._main if teacher.name == MAIN else teacher.model.module
        if module is None:
            assert teacher.model.onnx is not None  # a model is a module or a file
            return OnnxTap(teacher.model.onnx, teacher.model.inputs)
        module.eval().to(next(self._main.parameters()).device)
        mapping = self._mapping if teacher.name == MAIN else teacher.signals or {}
        return self._stack.enter_context(SignalTap(module, list(names), mapping))

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        few = np.arange(min(PROBE, len(self.data)))
        with torch.no_grad():
            found = [member.ordered(member.tap(self.place(member.data.batch(few)))) for member in self.members]
            count = max(1, len(self.joined))
            weights = torch.full((len(few), count), 1.0 / count)
            return self.merged(found, weights.to(next(iter(found[0].values())).device))

    def layouts(self) -> dict[str, Layout]:
        """How the signals lie in the banks, under ``name:signal``."""
        few = np.arange(min(PROBE, len(self.data)))
        found = {}
        with torch.no_grad():
            for member in self.members:
                inputs = self.place(member.data.batch(few))
                signals = member.tap(inputs)
                for name in member.names:
                    layout = Layout.of(name, signals[name], output_mask(inputs))
                    found[f"{member.teacher.name}:{name}"] = layout
        return found

    def merged(self, found: Sequence[Mapping[str, Tensor]], weights: Tensor) -> dict[str, Tensor]:
        """Signals of single teachers under ``name:signal``, the main one's under their own names, combined logits."""
        merged: dict[str, Tensor] = {}
        for member, signals in zip(self.members, found, strict=True):
            merged |= {f"{member.teacher.name}:{name}": tensor for name, tensor in signals.items()}
            if member.teacher.name == MAIN:
                merged |= signals
        if "logits" in self.names:
            joint = [signals["logits"] for member, signals in zip(self.members, found, strict=True) if member.joins]
            merged["logits"] = combined(joint, weights, embedding=self.embedding)
        return merged

    @property
    def joined(self) -> list[Member]:
        """The teachers whose logits are combined: those over the student's classes."""
        return [member for member in self.members if member.joins]


def _set_of(splits: Mapping[str, Any], rows: Array | None) -> TrainingSet:
    """The samples of the student's training set as another teacher sees them, in the same order."""
    found = TrainingSet([splits[name] for name in ("train", "transfer") if name in splits and len(splits[name])])
    return found if rows is None else found.take(rows)


def combined(logits: Sequence[Tensor], weights: Tensor, *, embedding: bool = False) -> Tensor:
    """One set of logits whose softmax is the weighted mean of the teachers' probabilities (methods L11, M1).

    Unit embeddings are averaged and brought to unit length again.

    Args:
        logits: of each teacher, (B, ..., C).
        weights: (B, M), rows that sum to 1.
    """
    shape = (len(weights), *[1] * (logits[0].dim() - 1))
    columns = [weights[:, number].reshape(shape) for number in range(len(logits))]
    if embedding:
        total = torch.stack([value.float() * w for value, w in zip(logits, columns, strict=True)]).sum(0)
        return total / total.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    parts = [torch.log_softmax(z.float(), -1) + w.clamp_min(1e-30).log() for z, w in zip(logits, columns, strict=True)]
    return torch.logsumexp(torch.stack(parts), dim=0)


def sample_weights(rule: str, base: Tensor, logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """(B, M) weights of the teachers for each sample.

    ``confidence``: base weight times 1 - H(p) / log C. ``agreement``: times p(label), where there is a label. ``fixed``
    and ``learned``: the base weights.
    """
    rows = base[None].expand(len(labels), -1)
    if rule in {"confidence", "agreement"} and logits[0].dim() == 2:
        factors = []
        for z in logits:
            log_p = torch.log_softmax(z.float(), -1)
            if rule == "confidence":
                entropy = -(log_p.exp() * log_p).sum(-1)
                factors.append(1 - entropy / np.log(z.shape[-1]))
            else:
                own = log_p.gather(1, labels.clamp_min(0)[:, None])[:, 0].exp()
                factors.append(torch.where(labels >= 0, own, torch.ones_like(own)))
        rows = rows * torch.stack(factors, 1)
    rows = rows.clamp_min(LEAST_WEIGHT)
    return rows / rows.sum(1, keepdim=True)


def dropped(weights: Tensor, logits: Sequence[Tensor], student: Tensor, coins: Tensor, drop: float) -> Tensor:
    """Teacher dropping of UNIC (methods M3): per sample the teacher farthest from the student stays, others may go.

    Args:
        weights: (B, M).
        logits: of each teacher, (B, C); ``student`` (B, C): its own, whose KL from each teacher is the distance.
        coins: (B, M), uniform in [0, 1).
        drop: probability that a teacher is left out.
    """
    log_q = torch.log_softmax(student.detach().float(), -1)
    gaps = []
    for z in logits:
        log_p = torch.log_softmax(z.float(), -1)
        gaps.append((log_p.exp() * (log_p - log_q)).flatten(1).sum(1))
    keep = coins >= drop
    keep.scatter_(1, torch.stack(gaps, 1).argmax(1, keepdim=True), True)
    left = weights * keep
    return left / left.sum(1, keepdim=True)


def fitted_weights(correct: Array) -> Array:
    """Mixture weights (M,) that give held-out labels the highest likelihood.

    The softmax of logits trained by exponentiated gradients, which for a mixture is the EM step: the logits grow by the
    log of a teacher's mean responsibility.

    Args:
        correct: probability that each teacher gives the right class, (N, M).
    """
    logits = np.zeros(correct.shape[1])
    for _ in range(STEPS):
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        share = correct * weights
        share /= np.maximum(share.sum(1, keepdims=True), 1e-30)
        logits += np.log(np.maximum(share.mean(0) / np.maximum(weights, 1e-30), 1e-30))
    weights = np.exp(logits - logits.max())
    found: Array = weights / weights.sum()
    return found


class Ensemble:
    """The teachers' signals of a batch: each from its source, combined per sample."""

    def __init__(self, tap: PanelTap, sources: Sequence[TeacherSource], base: Tensor, seed: int) -> None:
        self._tap, self._sources, self.base, self._seed = tap, tuple(sources), base, seed
        self._more = 0
        self._shared: dict[str, Vocabularies] = {}

    @property
    def forwards(self) -> int:
        """Samples that the teachers saw, all together."""
        return self._more + sum(source.forwards for source in self._sources)

    @forwards.setter
    def forwards(self, value: int) -> None:
        self._more += value - self.forwards

    def prepare(self, view: int) -> None:
        """Fill every bank that this epoch reads."""
        for source in self._sources:
            source.prepare(view)

    def signals(
        self,
        positions: Array,
        inputs: Mapping[str, Tensor],
        view: int,
        student: Signals | None = None,
        epoch: int = 0,
    ) -> Mapping[str, Tensor]:
        members, panel = self._tap.members, self._tap.panel
        found = [
            member.ordered(source.signals(positions, inputs, view))
            for member, source in zip(members, self._sources, strict=True)
        ]
        device = next(iter(inputs.values())).device
        base = self.base.to(device)
        weights = base[None].expand(len(positions), -1)
        if "logits" in self._tap.names:
            logits = [signals["logits"] for member, signals in zip(members, found, strict=True) if member.joins]
            labels = self._tap.data.labels
            known = labels[positions] if labels.ndim == 1 else np.full(len(positions), UNLABELLED)
            weights = sample_weights(panel.weights, base, logits, torch.from_numpy(known.astype(np.int64)).to(device))
            if panel.drop and student is not None and "logits" in student:
                coins = torch.from_numpy(uniforms(self._seed, positions, epoch, len(logits)))
                weights = dropped(weights, logits, student["logits"], coins.to(device), panel.drop)
        return self._tap.merged(found, weights)

    def batch(self, name: str, positions: Array, batch: Batch) -> Batch:
        """``batch`` for an objective that reads teacher ``name``, which may cut the same text into other tokens."""
        member = next((item for item in self._tap.members if item.teacher.name == name), None)
        if member is None or not member.teacher.foreign or batch.mask is None:
            return batch
        inputs, fields = (self._tap.place(x) for x in (member.data.batch(positions), member.data.fields(positions)))
        mask = inputs["attention_mask"]
        labels = torch.from_numpy(member.data.labels[positions]).to(mask.device)
        view = Batch(
            to_width(labels, mask.shape[1], UNLABELLED), mask,
            ends=to_width(fields["ends"], mask.shape[1], -1), starts=fields["starts"],
        )  # fmt: skip
        ends = to_width(fields["student_ends"], batch.mask.shape[1], -1)
        return replace(batch, ends=ends, view=view, vocabularies=self._vocabularies(member, mask))

    def _vocabularies(self, member: Member, like: Tensor) -> Vocabularies:
        """The student's vocabulary beside this teacher's, made once."""
        name = member.teacher.name
        if name not in self._shared:
            found = shared_vocabulary(self._tap.panel.teachers[0].model, member.teacher.model)
            tensors = (torch.from_numpy(x).to(like.device) for x in (found.same, found.known, found.pieces))
            self._shared[name] = Vocabularies(*tensors)
        return self._shared[name]


def to_width(rows: Tensor, width: int, fill: int) -> Tensor:
    """Rows (B, L) cut or filled to (B, width)."""
    return torch.nn.functional.pad(rows, (0, max(0, width - rows.shape[1])), value=fill)[:, :width]


@dataclass(frozen=True)
class Sight:
    """What every teacher's inputs are made with: the student's augmentation, its seed, and the place they go to."""

    augment: tuple[str, ...]
    seed: int
    place: Place

    def load(self, member: Member, positions: Array, view: int) -> dict[str, Tensor]:
        """Inputs of these samples as this teacher sees them."""
        names = () if member.teacher.clean else self.augment
        hidden = member.data.mask_id
        return self.place(augment(member.data.batch(positions), names, positions, view, self.seed, hidden))


def sources(
    tap: PanelTap, sight: Sight, root: Path, *, cached: bool, layouts: Mapping[str, Layout], autocast: Callable[[], Any]
) -> list[TeacherSource]:
    """A source for each teacher: its own bank under its own digest, or the teacher on every batch."""
    found: list[TeacherSource] = []
    for member in tap.members:
        teacher, load = member.teacher, partial(sight.load, member)
        if not cached:
            own = teacher.clean or teacher.splits is not None  # otherwise it sees the very batch, blended or generated
            found.append(OnlineTeacher(member.tap, autocast, load if own else None))
            continue
        names = () if teacher.clean else sight.augment
        digest = teacher.model.provenance.digest
        key = BankKey(digest, member.data.digest, names, sight.seed if names else 0, 0, teacher.tokenizer)
        lie = {name: layouts[f"{teacher.name}:{name}"] for name in member.names}
        found.append(
            CachedTeacher(
                member.tap, root, _key(key, still=teacher.clean), lie, load, member.data, own_tokens=teacher.foreign
            )
        )
    return found


def _key(key: BankKey, *, still: bool) -> Callable[[int], BankKey]:
    """The key of a view; a teacher that sees the clean sample has one view only."""
    return lambda view: key if still else replace(key, view=view)


def base_weights(tap: PanelTap, validation: Any, place: Place) -> Tensor:
    """(M,) weights of the teachers, from the recipe or fitted on the validation labels."""
    given = np.array([member.teacher.weight for member in tap.joined], dtype=np.float64)
    given /= max(given.sum(), 1e-30)
    if tap.panel.weights != "learned" or "logits" not in tap.names:
        return torch.from_numpy(given).float()
    if validation is None or validation.labels is None:
        raise StageError("learned weights need labelled validation samples", hint='Set teacher.weights = "fixed".')
    correct = [_correct(member, validation, place) for member in tap.joined]
    return torch.from_numpy(fitted_weights(np.stack(correct, 1))).float()


def _correct(member: Member, validation: Any, place: Place) -> Array:
    """Probability of the right class for each validation sample."""
    splits = member.teacher.splits
    data = TrainingSet([validation if splits is None else splits["validation"]])
    found = []
    with torch.no_grad():
        for start in range(0, len(data), BATCH):
            positions = np.arange(start, min(start + BATCH, len(data)))
            logits = member.ordered(member.tap(place(data.batch(positions))))["logits"].float().cpu()
            labels = torch.from_numpy(np.asarray(validation.labels)[positions])
            found.append(torch.softmax(logits, -1).gather(1, labels[:, None])[:, 0].double().numpy())
    return np.concatenate(found)


def others(panel: Panel | None) -> dict[str, dict[str, int]]:
    """Signals that each further teacher offers."""
    found = {}
    for teacher in panel.teachers if panel is not None else ():
        module = teacher.model.module
        if teacher.name != MAIN:
            found[teacher.name] = {"logits": 1} if module is None else available(module, teacher.signals or {})
    return found
