"""Objectives on scores of lists: rankers and retrievers (methods R1b, R1c, R5, R8, R10, R13)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from compressor.config import Frozen
from compressor.distil.objectives.base import Batch, Counts, Needs, SignalObjective, Signals, Step, Term
from compressor.distil.objectives.lists import Compare, Lists, lists_of, offline, padded, without_query
from compressor.distil.objectives.rows import term
from compressor.errors import StageError
from compressor.recipe import Positive


class _ListOptions(Frozen):
    student: Compare = "score"
    teacher: Literal["score", "dot", "cosine", "offline"] = "score"


class _ListObjective(SignalObjective):
    """Compares the two models' scores of the same lists."""

    several: ClassVar[bool] = True  # a list of one item teaches nothing

    class Options(_ListOptions):
        pass

    log_name: ClassVar[str] = "lists"

    def bind(self, student: Counts, teacher: Counts) -> list[str]:
        options = self.options
        taught = frozenset() if options.teacher == "offline" else frozenset({"logits"})
        fields = {"scores"} if options.teacher == "offline" else set()
        if {options.student, options.teacher} != {"score"}:
            fields.add("groups")
        # lists are cut where the batch says, so that a cut through a list would change the value
        self.needs = Needs(frozenset({"logits"}), taught, frozenset(fields), batch_wise=True, same_vocab=False)
        missing = [who for who, have in (("student", student), ("teacher", teacher)) if "logits" not in have]
        return [f"the {who} has no logits" for who in missing if who == "student" or taught]

    def lists(self, s: Signals, t: Signals, batch: Batch) -> tuple[Lists, Lists]:
        """The student's lists and the teacher's, of one shape."""
        options = self.options
        own = lists_of(s["logits"], batch, options.student, self.log_name)
        if options.teacher == "offline":
            other = offline(batch, options.student, self.log_name)
        else:
            other = lists_of(t["logits"], batch.view or batch, options.teacher, self.log_name)
            if options.teacher == "score" and batch.groups is not None:
                other = without_query(other, options.student)
        if own.scores.shape != other.scores.shape:
            raise StageError(
                f"{self.log_name}: the student has lists {tuple(own.scores.shape)}, "
                f"the teacher {tuple(other.scores.shape)}",
                hint="Both must score the same items: look at the options `student` and `teacher`.",
            )
        return own, other

    def __call__(self, s: Signals, t: Signals, batch: Batch, step: Step) -> Term:
        own, other = self.lists(s, t, batch)
        return term(*self.total(own.scores, other.scores, own.keep & other.keep), self.log_name)

    def total(self, student: Tensor, teacher: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Sum and count of the loss of lists (Q, n)."""
        raise NotImplementedError


def _sum_where(keep: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(keep, values, 0).sum(), keep.sum()


class MarginMse(_ListObjective):
    """The student's score margins between the positive and each negative become the teacher's.

    Formula: mean over queries and negatives of ((s_S(q, d+) - s_S(q, d-)) - (s_T(q, d+) - s_T(q, d-)))^2. A constant
    added to all teacher scores of a query changes nothing; no labels, no temperature.

    Shapes: see the options `student` and `teacher`. "score": logits (Q, n), a list a row, the positive first; or with
    groups one score a row, the positive first in its group. "dot", "cosine": embeddings (B, d), each group query,
    positive, negatives. "offline": scores that came with the data.
    Paper: Hofstätter et al., "Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge
    Distillation", 2020 (methods R1b).
    Defaults: student score, teacher score; a dense retriever uses student dot.
    When: rankers and retrievers with a cross-encoder as teacher; the first thing to try there.
    Worked number: the logits of `kd`, each row a list: 2.138889.
    """

    log_name = "margin MSE"

    def total(self, student: Tensor, teacher: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        error = (student[:, :1] - student[:, 1:]) - (teacher[:, :1] - teacher[:, 1:])
        return _sum_where(keep[:, 1:] & keep[:, :1], error.square())


class ScoreMse(_ListObjective):
    """The student's scores become the teacher's (cross-encoder to sentence embeddings).

    Formula: mean over scores of (s_S - s_T)^2; two logits a row are one score, z_1 - z_0 (binary classifiers).

    Shapes: as `margin-mse`; logits (B, 2) without groups are one score a row.
    Paper: Barkan et al., "Scalable Attentive Sentence-Pair Modeling via Distilled Sentence Embedding" (DSE), 2020
    (methods R1c).
    Defaults: student score, teacher score; sentence embeddings use student cosine or dot with groups of two.
    When: regression targets and pair scores whose size matters, not only their order.
    Worked number: logits [2, 1] of the teacher and [0, 3] of the student: (3 - -1)^2 = 16.
    """

    several = False
    log_name = "score MSE"

    def lists(self, s: Signals, t: Signals, batch: Batch) -> tuple[Lists, Lists]:
        def collapsed(found: Signals) -> Signals:
            z = found["logits"]
            binary = batch.groups is None and z.dim() == 2 and z.shape[1] == 2
            return {"logits": z[:, 1:] - z[:, :1]} if binary else {"logits": z}

        return super().lists(collapsed(s), collapsed(t) if self.needs.teacher else t, batch)

    def total(self, student: Tensor, teacher: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        return _sum_where(keep, (student - teacher).square())


class RankNet(_ListObjective):
    """Each pair that the teacher orders is a yes or no question to the student.

    Formula: mean over all pairs with s_T(i) > s_T(j) of log(1 + exp(s_S(j) - s_S(i))). Only the teacher's order counts,
    so permutations (a large language model's ranking) are enough; ties are no pairs.

    Shapes: as `margin-mse`.
    Paper: Burges et al., "Learning to Rank using Gradient Descent" (RankNet), 2005; Sun et al., "Instruction
    Distillation Makes Large Language Models Efficient Zero-shot Rankers", 2023 (methods R8).
    Defaults: student score, teacher score.
    When: the teacher gives an order, or scores that cannot be compared with the student's.
    Worked number: the logits of `kd`, each row a list: 0.476904.
    """

    log_name = "rank-net"

    def total(self, student: Tensor, teacher: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        ordered = teacher[:, :, None] > teacher[:, None]
        losses = F.softplus(student[:, None] - student[:, :, None])
        return _sum_where(ordered & keep[:, :, None] & keep[:, None], losses)


class ListKl(_ListObjective):
    """The student's distribution over the items of a list becomes the teacher's.

    Formula: KL(softmax(scale * s_T) || softmax(s_S / temperature)) over the items, mean over lists.

    Shapes: as `margin-mse`.
    Paper: Yang et al., "Translate-Distill: Learning Cross-Language Dense Retrieval by Translation and Distillation",
    2024 (methods R5); with scale 4 (temperature 0.25) Lin et al., "In-Batch Negatives for Knowledge Distillation with
    Tightly-Coupled Teachers for Dense Retrieval", 2021 (methods R6).
    Defaults: student score, teacher score, scale 1, temperature 1.
    When: lists of several passages a query, with scores that are logits of one scale.
    Worked number: the logits of `kd`, each row a list: 0.341269.
    """

    class Options(Frozen):
        student: Compare = "score"
        teacher: Literal["score", "dot", "cosine", "offline"] = "score"
        scale: Positive = 1.0
        temperature: Positive = 1.0

    log_name = "list KL"

    def total(self, student: Tensor, teacher: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        log_p = (self.options.scale * teacher).masked_fill(~keep, -1e9).log_softmax(-1)
        log_q = (student / self.options.temperature).masked_fill(~keep, -1e9).log_softmax(-1)
        return _sum_where(keep.any(-1), (log_p.exp() * (log_p - log_q)).sum(-1))


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",") if part.strip()]


class SelfEnsemble(SignalObjective):
    """Several scores of one model (dense, sparse, multi-vector; early exits) learn from their own weighted sum.

    Formula: s = sum over views of e_v s_v; L = 1/2 * [ (sum of w_v CE(s_v) + CE(s)) / (V + 1) + (sum of w_v KD_v) / V
    ], KD_v = -sum softmax(stop-gradient s) log softmax(s_v), CE with the first item as the positive; mean over lists.
    The KD part begins after `warmup` steps. No teacher.

    Shapes: the student's logits (Q, V, n): V views of the scores of n items, the positive first; (Q, n) is one view.
    Paper: Chen et al., "BGE M3-Embedding", 2024, weights of its published code (methods R10).
    Defaults: ensemble and terms 1 for each view, warmup 0. BGE M3 (dense, sparse, multi): ensemble "1, 0.3, 1", terms
    "1, 0.1, 1".
    When: one model with several heads that score the same list.
    Worked number: one view, scores [1, 0]: 1/2 * (0.313262 + 0.582203) = 0.447732.
    """

    class Options(Frozen):
        ensemble: str = ""
        terms: str = ""
        warmup: Annotated[int, Field(ge=0)] = 0

        @field_validator("ensemble", "terms")
        @classmethod
        def _is_a_list(cls, value: str) -> str:
            try:
                _numbers(value)
            except ValueError:
                raise ValueError("must be numbers with commas, one for each view") from None
            return value

    def bind(self, student: Counts, teacher: Counts) -> list[str]:
        self.needs = Needs(student=frozenset({"logits"}), same_vocab=False)
        return [] if "logits" in student else ["the student has no logits"]

    def _weights(self, text: str, like: Tensor) -> Tensor:
        found = _numbers(text) or [1.0] * like.shape[1]
        if len(found) != like.shape[1]:
            raise StageError(
                f"self-ensemble: {len(found)} weights for {like.shape[1]} views",
                hint="Give `ensemble` and `terms` one number for each view of the student's logits (Q, views, items).",
            )
        return like.new_tensor(found)

    def __call__(self, s: Signals, t: Signals, batch: Batch, step: Step) -> Term:
        scores = s["logits"].float()
        scores = scores[:, None] if scores.dim() == 2 else scores
        terms = self._weights(self.options.terms, scores)
        whole = (scores * self._weights(self.options.ensemble, scores)[:, None]).sum(1)
        logs = scores.log_softmax(-1)
        views = scores.shape[1]
        labels = (-(logs[..., 0] * terms).sum(1) - whole.log_softmax(-1)[:, 0]) / (views + 1)
        soft = -(whole.detach().softmax(-1)[:, None] * logs).sum(-1)
        taught = (soft * terms).sum(1) / views if step.index >= self.options.warmup else torch.zeros_like(labels)
        return term((0.5 * (labels + taught)).sum(), float(len(scores)), "self-ensemble")


class AdaptiveMargin(SignalObjective):
    """No teacher: how alike the positive and the negative are says what the margin between them should be.

    Formula: mean of ((cos(q, d+) - cos(q, d-)) - t)^2. The target is written t = cos(d+, d-) / 2 + 1/2 in the published
    code, so alike documents ask for the larger margin; gradients flow through it unless `stop_target`. With
    `distributed` every margin of the batch is also compared with the target of every pair (d+, d-) in it.

    Shapes: the student's embeddings (B, d); each group is query, positive, negatives.
    Paper: Gienapp et al., "Learning Effective Representations for Retrieval Using Self-Distillation with Adaptive
    Relevance Margins", 2024 (methods R13).
    Defaults: distributed false, stop_target false.
    When: retrieval without any teacher; the null to beat for `margin-mse`.
    Worked number: q [1,0], d+ [1,0], d- [0,1]: (1 - 1/2)^2 = 0.25.
    """

    several: ClassVar[bool] = True

    class Options(Frozen):
        distributed: bool = False
        stop_target: bool = False

    def bind(self, student: Counts, teacher: Counts) -> list[str]:
        batch_wise = True  # a group must not be cut
        self.needs = Needs(
            student=frozenset({"logits"}), batch=frozenset({"groups"}), batch_wise=batch_wise, same_vocab=False
        )
        return [] if "logits" in student else ["the student has no logits"]

    def __call__(self, s: Signals, t: Signals, batch: Batch, step: Step) -> Term:
        if batch.groups is None:
            raise StageError("adaptive-margin needs groups of query, positive and negatives")
        vectors, keep = padded(F.normalize(s["logits"].float(), dim=-1), batch.groups)
        if vectors.shape[1] < 3:
            return term(vectors.sum() * 0, 0.0, "adaptive margin")  # no wrong passage in this batch
        query, positive, negatives = vectors[:, :1], vectors[:, 1:2], vectors[:, 2:]
        margin = (query * positive).sum(-1) - (query * negatives).sum(-1)
        valid = keep[:, 2:]
        if self.options.distributed:
            documents = negatives[valid]
            target = (positive[keep[:, 1], 0] @ documents.T) / 2 + 0.5  # (Q, all negatives)
            margins = margin[valid]
            error = margins[None] - (target.detach() if self.options.stop_target else target)
            return term(error.square().sum(), float(error.numel()), "adaptive margin")
        target = (positive * negatives).sum(-1) / 2 + 0.5
        error = margin - (target.detach() if self.options.stop_target else target)
        return term(*_sum_where(valid, error.square()), "adaptive margin")
