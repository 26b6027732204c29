"""The gradient of one step, normalised over the whole batch however it is cut into pieces and processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.distil.ensemble import Ensemble
from compressor.distil.groups import grouped, pair_term
from compressor.distil.masks.base import Masking, NoMasking
from compressor.distil.norms import SharedNorms
from compressor.distil.objectives.base import Batch, Signals, Step, Term
from compressor.distil.objectives.masked import hidden_tokens
from compressor.distil.objectives.multilabel import binary_label_term
from compressor.distil.optim import MovingAverage, Thaw
from compressor.distil.precision import Numerics
from compressor.distil.processes import Processes
from compressor.distil.rollouts import OnPolicy, batch_of
from compressor.distil.strategies.draws import Draw, Stream
from compressor.distil.stream import UNLABELLED, TrainingSet
from compressor.distil.teachers import TeacherSource
from compressor.distil.terms import Weighted, at_least_one, combine
from compressor.schedule import Schedule
from compressor.types import Array


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
    thaw: Thaw | None
    data: TrainingSet
    stream: Stream
    load: Callable[[Array, int], dict[str, Tensor]]
    numerics: Numerics
    device: Any
    label_weight: float | Schedule
    processes: Processes
    rollouts: OnPolicy | None = None  # the student writes some of its batches itself
    label_signal: str = "logits"  # of the student: what cross-entropy with the labels teaches
    masking: Masking = field(default_factory=NoMasking)
    hides: bool = False  # augmentation hides tokens, which an objective asks for
    norms: SharedNorms | None = None  # batch statistics over several processes


@dataclass(frozen=True)
class Piece:
    """A micro-batch: its samples and model inputs, and the labels of its samples and of their partners."""

    draw: Draw
    inputs: Mapping[str, Tensor]
    batch: Batch
    partners: Tensor | None


class Forecast:
    """Says before the backward pass what each term will be divided by.

    A term's count is nearly always a fixed multiple of something known beforehand (samples, labels, tokens). Which, is
    learned from the pieces seen; a forecast that turns out wrong costs a second pass and never a wrong gradient.
    """

    def __init__(self) -> None:
        self._ratios: list[dict[int, float]] | None = None  # of each term: fact -> count over fact, while it held

    def divisors(self, totals: Tensor) -> Tensor | None:
        """Counts (K) of the whole batch from its facts (F); None while a term has no explanation."""
        if self._ratios is None or not all(self._ratios):
            return None
        found = []
        for ratios in self._ratios:
            fact, ratio = next(iter(ratios.items()))
            found.append(float(totals[fact]) * ratio)
        return torch.tensor(found, dtype=torch.float64)

    def learn(self, facts: Sequence[Tensor], counts: Sequence[Tensor]) -> None:
        """Keep the explanations that fit these pieces: facts (F) and counts (K) of each."""
        for fact, count in zip(facts, counts, strict=True):
            if self._ratios is None:
                self._ratios = [{i: float("nan") for i in range(len(fact))} for _ in range(len(count))]
            for ratios, value in zip(self._ratios, count.tolist(), strict=True):
                _explain(ratios, fact.tolist(), value)


def _explain(ratios: dict[int, float], facts: Sequence[float], value: float) -> None:
    for number in list(ratios):
        known, fact = ratios[number], facts[number]
        if fact == 0 and value == 0:
            continue
        ratio = value / fact if fact else 0.0  # something is counted where there is none of it: no explanation
        exact = ratio == round(ratio) and ratio > 0  # whole multiples keep sums exact
        if not exact or (known == known and known != ratio):
            del ratios[number]
        else:
            ratios[number] = ratio


class Gradients:
    """Computes gradients into the parameters, the same on every process."""

    def __init__(self, parts: Parts, accumulate: int) -> None:
        self.parts, self.accumulate = parts, accumulate
        self.names = term_names(parts)
        self._labels = torch.from_numpy(parts.data.labels).to(parts.device)
        trained = [p for group in parts.optimiser.param_groups for p in group["params"]]
        self._trained = [*trained, *parts.masking.parameters()]
        self._buffers = [b for b in parts.student.buffers() if b.is_floating_point()]
        self._forecast = Forecast()
        self._counted = 1.0  # share of this process's running statistics in those that all go on with
        self._whole = accumulate == 1 and parts.processes.count == 1
        labels = parts.data.labels
        self._known = (labels != UNLABELLED).reshape(len(labels), -1).any(-1)
        self._spares = not parts.objectives and not _mixes_samples(parts.student)

    def compute(
        self, draw: Draw, view: int, step: Step, weights: Sequence[float], due: bool
    ) -> tuple[Tensor, int, bool]:
        """Fill ``grad`` of all parameters.

        ``due``: this process would like a checkpoint. Returns the weighted terms (K) of the whole batch, how many
        samples the teachers saw, and whether the first process wants a checkpoint.
        """
        before = self.parts.teacher.forwards
        if self._whole:
            values = combine(
                list(zip(weights, self._terms(self._piece(draw, view, step.index), view, step), strict=True))
            )
            self.parts.backward(values.sum())
            return values.detach(), self.parts.teacher.forwards - before, due
        values = self._cut(draw, view, step, weights)
        if self.parts.processes.count == 1:
            return values, self.parts.teacher.forwards - before, due
        return self._joined(values, self.parts.teacher.forwards - before, due)

    def _cut(self, draw: Draw, view: int, step: Step, weights: Sequence[float]) -> Tensor:
        """This process's pieces; its part of the weighted terms of the whole batch."""
        processes = self.parts.processes
        mine = [self._piece(d, view, step.index) for d in self._mine(draw)]
        if self.accumulate == 1:
            return self._once(mine[0] if mine else None, view, step, weights)
        facts = [_facts(piece) for piece in mine]
        zero = torch.zeros(_FACTS, dtype=torch.float64)
        guess = self._forecast.divisors(processes.add(torch.stack([zero, *facts]).sum(0)))
        restore = self._snapshot()
        values, counts = self._pass(mine, view, step, weights, guess)
        true = processes.add(torch.stack([self._none(), *counts]).sum(0))
        self._forecast.learn(facts, counts)
        wrong = guess is None or not torch.equal(guess, true)
        if processes.total(int(wrong)):
            restore()
            values, _ = self._pass(mine, view, step, weights, true)
        return values

    def _mine(self, draw: Draw) -> list[Draw]:
        """This process's micro-batches. Batch statistics are shared only where every process has as many of them."""
        processes, norms = self.parts.processes, self.parts.norms
        pieces = draw.pieces(self.accumulate * processes.count)
        if norms is not None and norms.layers:
            norms.shared = len(pieces) == self.accumulate * processes.count
            if not norms.shared:  # the last few samples of an epoch: the first process computes them alone
                self._counted = float(processes.main)
                return draw.pieces(self.accumulate) if processes.main else []
        mine = pieces[processes.rank :: processes.count]
        self._counted = bool(mine) / min(len(pieces), processes.count)
        return mine

    def _once(self, piece: Piece | None, view: int, step: Step, weights: Sequence[float]) -> Tensor:
        """One piece a process: counts are added up between the forward and the backward pass."""
        terms = [] if piece is None else self._terms(piece, view, step)
        counts = self._counts(terms) if terms else self._none()
        divisors = self.parts.processes.add(counts)
        if not terms:
            return torch.zeros(len(self.names), device=self.parts.device)
        values = _divided(terms, weights, divisors)
        self.parts.backward(values.sum())
        return values.detach()

    def _pass(
        self, pieces: Sequence[Piece], view: int, step: Step, weights: Sequence[float], divisors: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """All pieces once; without divisors only the counts are wanted."""
        total, counts = torch.zeros(len(self.names), device=self.parts.device), []
        silent: AbstractContextManager[Any] = torch.no_grad() if divisors is None else nullcontext()
        with silent:
            for piece in pieces:
                terms = self._terms(piece, view, step)
                counts.append(self._counts(terms))
                if divisors is not None:
                    values = _divided(terms, weights, divisors)
                    self.parts.backward(values.sum())
                    total += values.detach()
        return total, counts

    def _piece(self, draw: Draw, view: int, index: int) -> Piece:
        draw = self._teaching(draw)
        inputs = self.parts.load(draw.positions, view)
        partners = None
        if draw.partners is not None:
            inputs = _blend(inputs, self.parts.load(draw.partners, view), draw.share)
            partners = self._labels[torch.from_numpy(draw.partners)]
        labels = self._labels[torch.from_numpy(draw.positions)]
        batch = grouped(batch_of(labels, inputs, by_token=self.parts.data.by_token), draw, self.parts.stream.groups)
        if self.parts.hides:
            own = self.parts.data.batch(draw.positions)["input_ids"].to(inputs["input_ids"].device)
            batch = replace(batch, masked=hidden_tokens(inputs["input_ids"], own))
        if self.parts.rollouts is not None:
            inputs, batch = self.parts.rollouts.step(inputs, batch, index)
        return Piece(draw, inputs, batch, partners)

    def _teaching(self, draw: Draw) -> Draw:
        """Where labels alone teach, samples without one change no gradient: they are not computed."""
        if self._spares and draw.groups is not None:
            return draw.among(np.flatnonzero(np.bincount(draw.groups)[draw.groups] > 1))
        known = self._known[draw.positions]
        if not self._spares or draw.partners is not None or known.all():
            return draw
        return replace(draw, positions=draw.positions[known] if known.any() else draw.positions[:1])

    def _terms(self, piece: Piece, view: int, step: Step) -> list[Term]:
        parts = self.parts
        with parts.numerics.autocast(parts.device):
            student: Signals = parts.tap(piece.inputs)
        teacher = parts.teacher.signals(piece.draw.positions, piece.inputs, view, student, step.epoch)
        found = []
        if parts.label_weight:
            signal = student[parts.label_signal]
            if parts.data.answers:
                found.append(pair_term(signal, piece.batch, step))
            else:
                found.append(label_term(signal, piece.batch, piece.partners, piece.draw.share))
        found += [item.objective(student, teacher, self._batch(item, piece), step) for item in parts.objectives]
        return found

    def _batch(self, item: Weighted, piece: Piece) -> Batch:
        """The piece's batch as the teacher that this objective reads knows it."""
        source = self.parts.teacher
        if not isinstance(source, Ensemble):
            return piece.batch
        return source.batch(item.teacher, piece.draw.positions, piece.batch)

    def _none(self) -> Tensor:
        return torch.zeros(len(self.names), dtype=torch.float64)

    @staticmethod
    def _counts(terms: Sequence[Term]) -> Tensor:
        return torch.tensor([float(term.count) for term in terms], dtype=torch.float64)

    def _snapshot(self) -> Callable[[], None]:
        """Undoes a pass: gradients, running statistics and random numbers."""
        kept = [buffer.clone() for buffer in self.parts.student.buffers()]
        own = [buffer.clone() for buffer in self.parts.projectors.buffers()]
        random = torch.get_rng_state()

        def restore() -> None:
            with torch.no_grad():
                for module, values in ((self.parts.student, kept), (self.parts.projectors, own)):
                    for buffer, value in zip(module.buffers(), values, strict=True):
                        buffer.copy_(value)
            torch.set_rng_state(random)
            for parameter in self._trained:
                parameter.grad = None

        return restore

    def _joined(self, values: Tensor, forwards: int, due: bool) -> tuple[Tensor, int, bool]:
        """Add up gradients, running statistics and terms of all processes in one message."""
        processes = self.parts.processes
        trained = [p for p in self._trained if p.requires_grad]
        device = self.parts.device
        has = torch.tensor([float(p.grad is not None) for p in trained], device=device)
        extra = torch.tensor([float(forwards), float(due and processes.main)], device=device)
        grads = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in trained]
        means = [buffer.reshape(-1) * self._counted for buffer in self._buffers]
        message = processes.add(torch.cat([extra, values, has, *grads, *means]))
        head = len(extra) + len(values)
        at = head + len(has)
        for used, parameter in zip(message[head:at].tolist(), trained, strict=True):
            flat = message[at : at + parameter.numel()]
            # laid out like its parameter: fused optimisers read both in the order of memory (channels last)
            parameter.grad = torch.empty_like(parameter).copy_(flat.view(parameter.shape)) if used else None
            at += parameter.numel()
        for buffer in self._buffers:
            buffer.copy_(message[at : at + buffer.numel()].view(buffer.shape))
            at += buffer.numel()
        return message[len(extra) : head], int(message[0]), bool(message[1] > 0)


_FACTS = 7


def _mixes_samples(module: nn.Module) -> bool:
    """Does what one sample gives depend on the others of its batch, through batch statistics?"""
    from torch.nn.modules.batchnorm import _NormBase

    return any(isinstance(part, _NormBase) for part in module.modules())


def _facts(piece: Piece) -> Tensor:
    """What counts can be multiples of: pieces, samples and labelled ones, tokens, taught, labelled and hidden ones."""
    labels, mask, taught = piece.batch.labels, piece.batch.mask, piece.batch.taught
    known = torch.zeros(1) if labels is None else (labels != UNLABELLED).reshape(len(labels), -1)
    return torch.tensor(
        [
            1.0,
            float(len(piece.draw.positions)),
            float(known.any(-1).sum()),
            0.0 if mask is None else float((mask != 0).sum()),
            0.0 if taught is None else float((taught != 0).sum()),
            float(known.sum()),
            0.0 if piece.batch.masked is None else float((piece.batch.masked >= 0).sum()),
        ],
        dtype=torch.float64,
    )


def _divided(terms: Sequence[Term], weights: Sequence[float], divisors: Tensor) -> Tensor:
    whole = [Term(term.sum, float(divisor)) for term, divisor in zip(terms, divisors.tolist(), strict=True)]
    return torch.stack([t.sum * (w / at_least_one(t.count)) for w, t in zip(weights, whole, strict=True)])


def _blend(inputs: Mapping[str, Tensor], partners: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    return {name: tensor * share + partners[name] * (1 - share) for name, tensor in inputs.items()}


def label_term(logits: Tensor, batch: Batch, partners: Tensor | None = None, share: float = 1.0) -> Term:
    """Cross-entropy with the labels; samples (or tokens) without one count neither in the sum nor in the count.

    Several labels a sample, (B, C) for logits (B, C), are taught by :func:`binary_label_term`. With
    ``partners`` (labels of blended samples) each label counts by its share; an unknown partner leaves all to the own.
    """
    labels = batch.labels
    assert labels is not None  # the loop always gives labels, -100 where there is none
    if labels.dim() == logits.dim() == 2:
        return binary_label_term(logits, batch)
    flat = logits.float().flatten(0, -2)
    total = F.cross_entropy(flat, labels.flatten(), ignore_index=UNLABELLED, reduction="sum")
    if partners is not None:
        other = torch.where((partners == UNLABELLED) | (labels == UNLABELLED), labels, partners)
        mixed = F.cross_entropy(flat, other.flatten(), ignore_index=UNLABELLED, reduction="sum")
        total = share * total + (1 - share) * mixed
    return Term(total, (labels != UNLABELLED).sum())


def term_names(parts: Parts) -> list[str]:
    """``labels`` and the objectives; equal names get a number."""
    return names_of(parts.label_weight, parts.objectives)


def names_of(label_weight: float | Schedule, objectives: Sequence[Weighted]) -> list[str]:
    """See :func:`term_names`."""
    names = ["labels"] if label_weight else []
    for item in objectives:
        same = sum(name.split("#")[0] == item.name for name in names)
        names.append(f"{item.name}#{same + 1}" if same else item.name)
    return names
