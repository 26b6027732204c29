"""Objectives that train a head beside or instead of the student's own: L8, D1 and L13 of the methods catalogue."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from compressor.config import Frozen
from compressor.distil.objectives import divergence, layers
from compressor.distil.objectives.base import (
    Batch,
    Committed,
    Context,
    Counts,
    Needs,
    Pass,
    SignalObjective,
    Signals,
    Step,
    Steps,
    Term,
)
from compressor.distil.objectives.rows import UNLABELLED
from compressor.errors import StageError
from compressor.models import heads
from compressor.models.signals import structure_of
from compressor.recipe import Match, Positive
from compressor.types import LayerFact

MOMENTS_BYTES = 2**30  # of second moments that LELP holds; it is made for few classes


class _NewHead(SignalObjective):
    """Replaces the last linear layer of a classifier by a head of the tool."""

    place: ClassVar[str] = "head"
    kind: ClassVar[str]

    def unfit(self, student: nn.Module) -> list[str]:
        structure = structure_of(student)
        if self._existing(student) is not None:
            return []
        if structure.pooling is not None or not isinstance(structure.head, nn.Linear):
            return ["the student has no linear classifier whose head could be replaced"]
        path = heads.path_of(student, structure.head)
        parent = student.get_submodule(path.rpartition(".")[0])
        return [f"the student's head is a {type(parent).__name__} already"] if isinstance(parent, heads.Head) else []

    def _existing(self, student: nn.Module) -> heads.Head | None:
        """The head that an earlier stage of the same kind left in the student."""
        raise NotImplementedError

    def _numbers(self) -> dict[str, Any]:
        return {}

    def install(self, student: nn.Module, example: Signals) -> Steps:
        if self._existing(student) is not None:
            return ()
        head = structure_of(student).head
        assert head is not None  # `unfit` looked
        step = {"op": "head", "module": heads.path_of(student, head), "kind": self.kind, **self._numbers()}
        heads.replace_head(student, step)
        return (step,)

    def _path(self, student: nn.Module) -> str:
        found = self._existing(student)
        assert found is not None  # `install` put it there
        return heads.path_of(student, found)


class SubclassEmbedding(_NewHead):
    """Pseudo-subclasses from the teacher's embeddings: more to learn from where there are few classes (LELP).

    Formula: KL(p || softmax(z)), summed over C * S subclasses, mean over samples. p(c, s) = softmax(teacher logits)[c]
    * softmax over s of V_c^T (h - mu_c) / sharpness; z the student's C * S outputs, whose class logits are
    log sum_s exp z. V_c: the first S principal directions, whitened, of the teacher's embeddings h of class c, after
    what its own classifier reads was projected away. Embeddings without a label go to the teacher's class.

    Shapes: teacher pooled (B, d) and logits (B, C), student subclasses (B, C * S).
    Paper: Loo et al., "Linear Projections of Teacher Embeddings for Few-Class Distillation", 2024 (methods L8); the
    placement of `sharpness` is ours.
    Defaults: subclasses 5, sharpness 1. The student keeps its C * S outputs and their log-sum-exp when it is exported.
    When: two to ten classes, where soft labels say little. One pass over the training set first.
    Worked number: subclasses 1, the logits of `kd`: 0.341269, as `kd` at tau 1.
    """

    class Options(Frozen):
        subclasses: Annotated[int, Field(ge=1, le=64)] = 5
        sharpness: Positive = 1.0

    kind = "subclass"

    def bind(self, student: Counts, teacher: Counts) -> list[str]:
        self.needs = Needs(frozenset({"subclasses"}), frozenset({"logits", "pooled"}), frozenset(), training_pass=True)
        return [f"the teacher has no signal `{name}`" for name in ("logits", "pooled") if name not in teacher]

    def _existing(self, student: nn.Module) -> heads.Head | None:
        found = [part for part in heads.heads_of(student).values() if isinstance(part, heads.SubclassHead)]
        return next((part for part in found if part.subclasses == self.options.subclasses), None)

    def _numbers(self) -> dict[str, Any]:
        return {"subclasses": self.options.subclasses}

    def prepare(self, ctx: Context) -> None:
        classes, width = ctx.teacher["logits"].shape[-1], ctx.teacher["pooled"].shape[-1]
        self._directions = nn.Module()
        self._directions.register_buffer("weight", torch.zeros(classes, self.options.subclasses, width))
        self._directions.register_buffer("offset", torch.zeros(classes, self.options.subclasses))
        self._directions.to(ctx.device)

    def modules(self) -> nn.Module | None:
        return self._directions

    def survey(self, training: Pass, generator: torch.Generator) -> None:
        moments = _ClassMoments(*self._directions.weight.shape[::2])
        for seen in training(False):
            labels = seen.batch.labels
            guess = seen.teacher["logits"].argmax(-1)
            known = guess if labels is None else torch.where(labels == UNLABELLED, guess, labels)
            moments.add(seen.teacher["pooled"].cpu(), seen.teacher["logits"].cpu(), known.cpu())
        away = moments.away()
        for number in range(moments.classes):
            mean, directions = moments.principal(number, away, self.options.subclasses)
            self._directions.weight[number].copy_(directions)
            self._directions.offset[number].copy_(directions @ mean)

    def targets(self, t: Signals) -> Tensor:
        """Log p(c, s), (B, C * S)."""
        place = torch.einsum("bd,csd->bcs", t["pooled"].float(), self._directions.weight) - self._directions.offset
        inside = F.log_softmax(place / self.options.sharpness, dim=-1)
        classes = divergence.log_probabilities(t["logits"], 1.0)
        found: Tensor = (classes.unsqueeze(-1) + inside).flatten(1)
        return found

    def __call__(self, s: Signals, t: Signals, batch: Batch, step: Step) -> Term:
        log_p, log_q = self.targets(t), divergence.log_probabilities(s["subclasses"], 1.0)
        total = (log_p.exp() * (log_p - log_q)).sum()
        return Term(total, float(len(log_p)), {"subclass KL": total.detach()})

    def commit(self, student: nn.Module, steps: Steps, validation: Pass | None) -> Committed:
        path, count = self._path(student), self.options.subclasses
        reason = "classes are the log-sum-exp of their subclasses"
        fact = LayerFact("distil", path, "widened", "C outputs", f"{count} outputs a class", reason)
        return Committed(steps, (fact,))


class _ClassMoments:
    """Sums of embeddings by class, in float64: means and principal directions without a second pass."""

    def __init__(self, classes: int, width: int) -> None:
        if (classes + 1) * width * width * 8 > MOMENTS_BYTES:
            raise StageError(
                f"lelp: {classes} classes of {width} wide embeddings need more than 1 GiB",
                hint="It is made for few classes; use `kd`.",
            )
        self.classes = classes
        self.count = torch.zeros(classes, dtype=torch.float64)
        self.sum = torch.zeros(classes, width, dtype=torch.float64)
        self.square = torch.zeros(classes, width, width, dtype=torch.float64)
        self.logits = torch.zeros(classes, dtype=torch.float64)
        self.product = torch.zeros(width, classes, dtype=torch.float64)

    def add(self, embedding: Tensor, logits: Tensor, labels: Tensor) -> None:
        embedding, logits = embedding.double(), logits.double()
        self.logits += logits.sum(0)
        self.product += embedding.T @ logits
        for number in labels.unique().tolist():
            part = embedding[labels == number]
            self.count[number] += len(part)
            self.sum[number] += part.sum(0)
            self.square[number] += part.T @ part

    def away(self) -> Tensor:
        """(d, d): removes what the logits read of an embedding, their weights being found by least squares."""
        total, mean = self.count.sum().clamp_min(1), self.sum.sum(0) / self.count.sum().clamp_min(1)
        covariance = self.square.sum(0) - total * torch.outer(mean, mean)
        cross = self.product - torch.outer(mean, self.logits)
        weights = torch.linalg.pinv(covariance, rtol=1e-8, hermitian=True) @ cross
        left, values, _ = torch.linalg.svd(weights, full_matrices=False)
        basis = left[:, values > 1e-6 * values.max().clamp_min(torch.finfo(torch.float64).tiny)]
        return torch.eye(len(basis), dtype=torch.float64) - basis @ basis.T

    def principal(self, number: int, away: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
        """Mean (d,) and ``wanted`` whitened directions (S, d); a direction without variance is 0."""
        count = self.count[number].clamp_min(1)
        mean = self.sum[number] / count
        covariance = away @ (self.square[number] / count - torch.outer(mean, mean)) @ away
        values, vectors = torch.linalg.eigh(covariance)
        values, vectors = values.flip(0)[:wanted], vectors.flip(1)[:, :wanted]
        sign = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()  # a direction has no sign of its own
        alive = values > 1e-9 * values[0].clamp_min(torch.finfo(torch.float64).tiny)
        scale = torch.where(alive, values.clamp_min(torch.finfo(torch.float64).tiny).rsqrt(), 0)
        found = torch.zeros(wanted, len(mean), dtype=torch.float64)
        found[: len(values)] = (vectors * sign * scale).T
        return mean.float(), found.float()


class DualHeadKd(_NewHead):
    """One head learns the labels, another the teacher, and the student ships their mixture (dual-head optimisation).

    Formula: tau^2 KL(p_tau || q_tau) with q from the second head, z_2 = 100 * W f / |f|, mean over all samples; the
    stage's `labels` teaches the first head only. Output: log(a softmax(z_1) + (1 - a) softmax(z_2 / b)).

    Shapes: teacher logits (B, C), student taught (B, C).
    Paper: Kang et al., "Simple yet Effective Semi-supervised Knowledge Distillation from Vision-Language Models via
    Dual-Head Optimization" (DHO), 2025 (methods D1).
    Defaults: temperature 2; a and b 0.5 during training, then chosen on the validation part (a in 0..1, b in 0.25..4).
    Both heads start from the student's own.
    When: few labels and much unlabelled data (`data.transfer`), where gradients of labels and teacher conflict.
    Worked number: the second head giving the student logits of `kd`: 0.495474 at tau 2.
    """

    class Options(Frozen):
        temperature: Positive = 2.0

    kind = "dual"
    label_signal = "labelled"

    def bind(self, student: Counts, teacher: Counts) -> list[str]:
        self.needs = Needs(frozenset({"taught"}), frozenset({"logits"}))
        return [] if "logits" in teacher else ["the teacher has no logits"]

    def _existing(self, student: nn.Module) -> heads.Head | None:
        return next((part for part in heads.heads_of(student).values() if isinstance(part, heads.DualHead)), None)

    def __call__(self, s: Signals, t: Signals, batch: Batch, step: Step) -> Term:
        tau = self.options.temperature
        total = divergence.forward_kl(t["logits"], s["taught"], tau).sum() * tau**2
        return Term(total, float(len(s["taught"])), {"tau^2 KL(teacher||second head)": total.detach()})

    def commit(self, student: nn.Module, steps: Steps, validation: Pass | None) -> Committed:
        head = self._existing(student)
        assert isinstance(head, heads.DualHead)  # `install` put it there
        reason = "no labelled validation part: the published a and b"
        if validation is not None:
            found = tune_mixture(validation)
            if found is not None:
                head.mix.fill_(found[0])
                head.temperature.fill_(found[1])
                reason = "a and b chosen on the validation part"
        after = f"a = {float(head.mix):g}, b = {float(head.temperature):g}"
        return Committed(steps, (LayerFact("distil", self._path(student), "fused", "two heads", after, reason),))


MIXES = tuple(i / 10 for i in range(11))
TEMPERATURES = (0.25, 0.5, 1.0, 2.0, 4.0)


def tune_mixture(validation: Pass) -> tuple[float, float] | None:
    """(a, b) of the best mixture on labelled samples: accuracy, then likelihood, then nearness to 0.5 and 0.5."""
    labelled, taught, labels = [], [], []
    for seen in validation(True):
        known = torch.zeros(0) if seen.batch.labels is None else seen.batch.labels != UNLABELLED
        if not bool(known.any()):
            continue
        assert seen.batch.labels is not None  # some are known
        labelled.append(seen.student["labelled"][known].float().cpu())
        taught.append(seen.student["taught"][known].float().cpu())
        labels.append(seen.batch.labels[known].cpu())
    if not labels:
        return None
    first, second, wanted = torch.cat(labelled), torch.cat(taught), torch.cat(labels)
    best: tuple[tuple[float, float, float], tuple[float, float]] | None = None
    for a in MIXES:
        for b in TEMPERATURES:
            mixed = heads.DualHead.mixed(first, second, torch.tensor(a), torch.tensor(b))
            right = float((mixed.argmax(-1) == wanted).float().mean())
            rank = (right, -round(float(F.nll_loss(mixed, wanted)), 6), -abs(a - 0.5) - abs(b - 0.5))
            if best is None or rank > best[0]:
                best = (rank, (a, b))
    return best[1] if best is not None else None


class AuxiliaryHead(SignalObjective):
    """Extra outputs learn side questions about a sample and are dropped at export (multi-aspect distillation).

    Formula: mean over questions and samples of BCE(sigmoid(W f + b), y). y is the teacher's yes-probability of each
    question, sigmoid of the matched signal; or, with `answers`, yes (1) or no (0) by the sample's class.

    Shapes: student pooled (B, d), teacher signal (B, Q), or labels (B,).
    Paper: Lee et al., "Multi-aspect Knowledge Distillation with Large Language Model", 2025 (methods L13).
    Defaults: match pooled with logits (each class a question); `answers` empty: one word of 0 and 1 for each class, in
    the order of the classes, a digit for each question, as "110 010 001".
    When: something is known of the samples or their classes beside the label.
    Worked number: one question, student output 0, answer yes: ln 2 = 0.693147.
    """

    class Options(Frozen):
        answers: Annotated[str, Field(pattern=r"^([01]+( [01]+)*)?$")] = ""

    default_match = Match(student="pooled", teacher="logits")

    def bind(self, student: Counts, teacher: Counts) -> list[str]:
        assert self.match is not None  # the default is given
        words = self.options.answers.split()
        self.answers = [[float(digit) for digit in word] for word in words]
        if words:
            problems = [] if len({len(word) for word in words}) == 1 else ["`answers`: words of different lengths"]
            problems += [] if "pooled" in student else ["the student has no signal `pooled`"]
            self.needs = Needs(frozenset({"pooled"}), frozenset(), frozenset({"labels"}), same_vocab=False)
            return problems
        pairs, problems = layers.pairs(self.match, student, teacher)
        if len(pairs) > 1:
            problems.append("extra outputs read one signal of the student and learn one of the teacher")
        if not problems:
            self.needs = Needs(frozenset({pairs[0][0]}), frozenset({pairs[0][1]}), same_vocab=False)
        return problems

    def prepare(self, ctx: Context) -> None:
        (own,) = self.needs.student
        questions = len(self.answers[0]) if self.answers else ctx.teacher[next(iter(self.needs.teacher))].shape[-1]
        if self.answers and ctx.classes and len(self.answers) != ctx.classes:
            raise StageError(
                f"auxiliary-head: `answers` speaks of {len(self.answers)} classes, the student has {ctx.classes}",
                hint="Give one word for each class.",
            )
        self._head = nn.Linear(ctx.student[own].shape[-1], questions)
        bound = self._head.in_features**-0.5
        with torch.no_grad():
            for parameter in self._head.parameters():
                parameter.copy_(torch.rand(parameter.shape, generator=ctx.generator) * 2 * bound - bound)
        self._head.register_buffer("answers", torch.tensor(self.answers or [[0.0]]))
        self._head.to(ctx.device)

    def modules(self) -> nn.Module | None:
        return self._head

    def __call__(self, s: Signals, t: Signals, batch: Batch, step: Step) -> Term:
        (own,) = self.needs.student
        asked = self._head(s[own].float())
        if not self.answers:
            (other,) = self.needs.teacher
            values = F.binary_cross_entropy_with_logits(asked, t[other].float().sigmoid(), reduction="none").mean(-1)
            return Term(values.sum(), float(len(values)), {"question BCE": values.sum().detach()})
        assert batch.labels is not None  # declared
        known = batch.labels != UNLABELLED
        wanted = self._head.answers[batch.labels.clamp_min(0)]
        values = F.binary_cross_entropy_with_logits(asked, wanted, reduction="none").mean(-1)
        total = torch.where(known, values, 0).sum()
        return Term(total, known.sum(), {"question BCE": total.detach()})
