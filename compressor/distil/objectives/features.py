"""Objectives on hidden states and attention projections: F1, F2 and U3 of the methods catalogue."""

from __future__ import annotations

from math import gcd
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from compressor.config import Frozen
from compressor.distil.objectives import layers, shapes
from compressor.distil.objectives.base import Batch, Context, Counts, Needs, SignalObjective, Signals, Step, Term
from compressor.errors import StageError
from compressor.recipe import Match


class Matched(SignalObjective):
    """Compares pairs of features named by a match; owns a projection per pair where widths differ."""

    default_match: ClassVar[Match | None] = Match()
    batch_wise: ClassVar[bool] = False

    def bind(self, student: Counts, teacher: Counts) -> list[str]:
        if self.match is None:
            raise ValueError("a matched objective needs a match")
        self.pairs, problems = layers.pairs(self.match, student, teacher)
        names = [frozenset(side) for side in zip(*self.pairs, strict=True)] or [frozenset(), frozenset()]
        self.needs = Needs(names[0], names[1], frozenset({"mask"}), batch_wise=self.batch_wise, same_vocab=False)
        return problems

    def prepare(self, ctx: Context) -> None:
        allowed = self.match is not None and self.match.proj == "linear"
        self._projections = nn.ModuleList(
            shapes.projection(ctx.student[a], ctx.teacher[b], allowed, ctx.generator, f"{a} -> {b}")
            for a, b in self.pairs
        ).to(ctx.device)

    def modules(self) -> nn.Module | None:
        return self._projections if any(True for _ in self._projections.parameters()) else None

    def aligned(self, s: Signals, t: Signals) -> list[tuple[Tensor, Tensor]]:
        """Float32 features of each pair, same shape, the student's through its projection."""
        found = []
        for (a, b), project in zip(self.pairs, self._projections, strict=True):
            student, teacher = shapes.same_size(s[a].float(), t[b].float())
            found.append((project(student), teacher))
        return found


class HiddenMatch(Matched):
    """Student features imitate the teacher's, layer by layer.

    Formula: sum over student layers l of MSE(W_l h_S[l], h_T[g(l)]): mean over features, mean over samples or real
    tokens. W_l is a learned linear map where widths differ (a 1x1 convolution for feature maps, the larger map
    average-pooled to the smaller), dropped at export. g is the match's map: `uniform`, `last` or `skip`.

    Shapes: tokens (B, T, d), feature maps (B, C, H, W) or vectors (B, d); padding does not count.
    Paper: Romero et al., "FitNets: Hints for Thin Deep Nets", 2015; Jiao et al., "TinyBERT: Distilling BERT for Natural
    Language Understanding", 2020; form HS in methods F1 (Wang et al., "MiniLMv2", 2021).
    Defaults: match hidden[i] with hidden[g(i)], map uniform, proj linear.
    When: a student cut from its teacher, or few training samples.
    Worked number: student [[1,1,1],[0,2,1],[1,2,1]], teacher [[1,0,2],[0,1,1],[2,2,0]]: 5/9 = 0.555556.
    """

    def __call__(self, s: Signals, t: Signals, batch: Batch, step: Step) -> Term:
        total: Tensor | None = None
        count: Tensor | float = 1.0
        for (name, _), (student, teacher) in zip(self.pairs, self.aligned(s, t), strict=True):
            values = F.mse_loss(student, teacher, reduction="none")
            values = values.mean(-1) if values.dim() < 4 else values.mean(dim=(1, 2, 3))
            part, count = shapes.sum_over_valid(values, batch.mask_of(name))
            total = part if total is None else total + part
        assert total is not None  # bind gives at least one pair
        return Term(total, count, {"hidden MSE": total.detach()})


class CosineMatch(Matched):
    """Student features point the way the teacher's do.

    Formula: 1 - cos(W h_S, h_T), summed over the matched layers, mean over samples or real tokens. Feature maps are
    averaged over space first.

    Shapes: tokens (B, T, d), feature maps (B, C, H, W) or vectors (B, d); sentence embeddings are the signal `logits`.
    Paper: Sanh et al., "DistilBERT", 2019 (methods F2).
    Defaults: match hidden[-1] with hidden[-1], proj linear.
    When: the third term of DistilBERT's triple loss; sentence embeddings, with `student = "logits", teacher =
    "logits"`.
    Worked number: student [[1,1,1],[0,2,1],[1,2,1]], teacher [[1,0,2],[0,1,1],[2,2,0]]: 0.136898.
    """

    default_match: ClassVar[Match | None] = Match(student="hidden[-1]", teacher="hidden[-1]")

    def __call__(self, s: Signals, t: Signals, batch: Batch, step: Step) -> Term:
        total: Tensor | None = None
        count: Tensor | float = 1.0
        for (name, _), (student, teacher) in zip(self.pairs, self.aligned(s, t), strict=True):
            if student.dim() == 4:
                student, teacher = student.mean(dim=(2, 3)), teacher.mean(dim=(2, 3))
            values = 1 - F.cosine_similarity(student, teacher, dim=-1)
            part, count = shapes.sum_over_valid(values, batch.mask_of(name))
            total = part if total is None else total + part
        assert total is not None  # bind gives at least one pair
        return Term(total, count, {"1 - cosine": total.detach()})


class SquareHead(Matched):
    """Layer-wise feature error, each layer in units of its teacher's own size.

    Formula: mean over layers of MSE(h_S, h_T) / MSE(0, h_T), over all real tokens of the batch. Scaling both models'
    features by the same factor changes nothing.

    Shapes: tokens (B, T, d), feature maps (B, C, H, W) or vectors (B, d); widths must be equal unless proj is linear.
    Paper: Kurtic et al., "Sparse Fine-tuning for Inference Acceleration of Large Language Models", 2023 (methods U3).
    Defaults: match hidden[i] with hidden[g(i)], map uniform, proj none.
    When: a pruned student that starts from its teacher's weights.
    Worked number: student [[1,1,1],[0,2,1],[1,2,1]], teacher [[1,0,2],[0,1,1],[2,2,0]]: 5/15 = 0.333333.
    """

    default_match: ClassVar[Match | None] = Match(proj="none")
    batch_wise: ClassVar[bool] = True  # a ratio of two sums over the batch

    def __call__(self, s: Signals, t: Signals, batch: Batch, step: Step) -> Term:
        parts = []
        for (name, _), (student, teacher) in zip(self.pairs, self.aligned(s, t), strict=True):
            error, size = (student - teacher).square(), teacher.square()
            if error.dim() == 3:
                error, size = error.sum(-1), size.sum(-1)
                mask = batch.mask_of(name)
            else:
                mask = None
            part, whole = shapes.sum_over_valid(error, mask)[0], shapes.sum_over_valid(size, mask)[0]
            parts.append(part / whole.clamp_min(torch.finfo(torch.float32).tiny))
        total = torch.stack(parts).sum()
        return Term(total, float(len(parts)), {"relative error": total.detach()})


def relation_logits(states: Tensor, heads: int) -> Tensor:
    """Scaled self-similarity of the relation heads: (..., H, T, d) -> (..., heads, T, T), width H * d cut anew."""
    *lead, original, tokens, depth = states.shape
    merged = states.float().transpose(-3, -2).reshape(*lead, tokens, heads, original * depth // heads)
    cut = merged.transpose(-3, -2)
    return cut @ cut.transpose(-1, -2) * (original * depth / heads) ** -0.5


def relation_divergence(
    teacher: Tensor, student: Tensor, heads: int, mask: Tensor | None = None, compare: str = "kl"
) -> Tensor:
    """Difference of the softmax relations, summed over relations and tokens, mean over heads.

    ``teacher``, ``student``: (R, B, H, T, d) with their own H and d; ``mask``: (B, T). Padding is neither key nor
    query. ``compare``: KL(teacher || student), or the squared error summed over keys.
    """
    a, b = relation_logits(teacher, heads), relation_logits(student, heads)
    if mask is not None:
        hidden = (mask == 0)[None, :, None, None, :]
        a, b = a.masked_fill(hidden, -1e9), b.masked_fill(hidden, -1e9)
    log_p, log_q = F.log_softmax(a, dim=-1), F.log_softmax(b, dim=-1)
    values = (log_p.exp() - log_q.exp()).square() if compare == "mse" else log_p.exp() * (log_p - log_q)
    values = values.sum(-1)
    if mask is not None:
        values = torch.where((mask != 0)[None, :, None, :], values, 0)
    return values.sum() / heads


class MiniLmRelations(SignalObjective):
    """Query, key and value relations of one teacher layer taught to one student layer; widths may differ.

    Formula: for each of Q, K, V cut the concatenated heads into A relation heads A_a of width d/A,
    R_a = softmax(A_a A_a^T / sqrt(d/A)), loss = sum over Q, K, V of 1/(A * tokens) * sum_a sum_t KL(R_T[a,t] ||
    R_S[a,t]).

    Shapes: qkv (3, B, H, T, d) of both models, mask (B, T); padding is neither key nor query. No projections.
    Paper: Wang et al., "MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained
    Transformers", 2021 (methods F1).
    Defaults: last layers of both; `heads` 0 takes the larger of the two head counts that divides both widths, else
    their greatest common divisor; `part` chooses the side of an encoder-decoder model. Base models of the paper use 48.
    `compare` "mse" takes the squared error of the relations, as AutoDistil does (methods N2).
    When: transformer students of another width or depth, task-agnostic distillation.
    Worked number: teacher [[1,0,2,1],[0,1,1,-1],[2,2,0,0]], student [[.5,1],[1,0],[1,2]], A = 2: 0.555465 a relation.
    """

    class Options(Frozen):
        heads: Annotated[int, Field(ge=0)] = 0
        teacher_layer: int = -1
        student_layer: int = -1
        compare: Literal["kl", "mse"] = "kl"
        part: Literal["decoder", "encoder"] = "decoder"

    def bind(self, student: Counts, teacher: Counts) -> list[str]:
        side = "encoder." if self.options.part == "encoder" else ""
        own = f"{side}qkv[{self.options.student_layer}]"
        match = Match(student=own, teacher=f"{side}qkv[{self.options.teacher_layer}]")
        found, problems = layers.pairs(match, student, teacher)
        if problems:
            return problems
        self.student_name, self.teacher_name = found[0]
        names = frozenset({self.student_name}), frozenset({self.teacher_name})
        self.needs = Needs(*names, frozenset({"mask"}), same_vocab=False)
        return []

    def prepare(self, ctx: Context) -> None:
        student, teacher = ctx.student[self.student_name], ctx.teacher[self.teacher_name]
        widths = [int(x.shape[-3] * x.shape[-1]) for x in (student, teacher)]
        wanted = self.options.heads
        if wanted:
            if any(width % wanted for width in widths):
                raise StageError(
                    f"minilm-relations: {wanted} relation heads do not divide the widths {widths[0]} and {widths[1]}",
                    hint="Choose `heads` as a common divisor, or leave it out.",
                )
            self.heads = wanted
            return
        common = gcd(*widths)
        fitting = [int(x.shape[-3]) for x in (student, teacher) if common % int(x.shape[-3]) == 0]
        self.heads = max(fitting, default=common)

    def __call__(self, s: Signals, t: Signals, batch: Batch, step: Step) -> Term:
        student, teacher = s[self.student_name], t[self.teacher_name]
        mask = batch.mask_of(self.student_name)
        heads = gcd(self.heads, int(student.shape[-3] * student.shape[-1]))  # sub-nets of a super-net are narrower
        total = relation_divergence(teacher, student, heads, mask, self.options.compare)
        tokens = (mask != 0).sum() if mask is not None else float(student.shape[1] * student.shape[3])
        return Term(total, tokens, {"relation KL": total.detach()})
