"""Objectives on embeddings: where they lie and how alike they are (methods R2, W1, F5, W5)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from compressor.config import Frozen
from compressor.distil.objectives import layers, shapes
from compressor.distil.objectives.base import Batch, Counts, Needs, SignalObjective, Signals, Step, Term
from compressor.distil.objectives.features import Matched
from compressor.distil.objectives.lists import padded
from compressor.distil.objectives.rows import term
from compressor.errors import StageError
from compressor.recipe import Match, Positive

SENTENCES = Match(student="logits", teacher="logits")


def sides(vectors: Tensor, batch: Batch, name: str) -> tuple[Tensor, Tensor]:
    """First and second row (N, d) of each group: question and answer, picture and text.

    Further rows (wrong answers) and rows that stand alone are left out.

    Raises:
        StageError: the batch has no groups.
    """
    if batch.groups is None:
        raise StageError(f"{name}: the data has no groups", hint="Pairs are rows with the same group number.")
    pairs, keep = padded(vectors, batch.groups)
    if pairs.shape[1] < 2:
        return pairs[:0, 0], pairs[:0, 0]
    both = keep[:, 1]
    return pairs[both, 0], pairs[both, 1]


class EmbeddingMse(Matched):
    """The student's embedding of a sample becomes the teacher's.

    Formula: |W s / |W s| - t / |t||^2, mean over samples, summed over the matched signals; `normalise = false` leaves
    the lengths as they are. W is a learned linear map where widths differ, dropped at export. With normalised vectors
    it is 2 (1 - cos).

    Shapes: any feature, pooled to (B, d): mean over space or real tokens; sentence embeddings are the signal `logits`.
    Paper: Mao and Nakagawa, "LEALLA", 2023 (methods R2, feature term); FD of Yang et al., "CLIP-KD", 2024 (methods W1),
    whose mean over d coordinates makes its weight 2000 a weight of 2000 / d here.
    Defaults: match logits with logits, proj linear, normalise true.
    When: sentence embeddings and two-tower models; the strongest single term of CLIP-KD.
    Worked number: student [3, 4], teacher [1, 0]: (0.6 - 1)^2 + 0.8^2 = 0.8.
    """

    class Options(Frozen):
        normalise: bool = True

    default_match: ClassVar[Match | None] = SENTENCES

    def __call__(self, s: Signals, t: Signals, batch: Batch, step: Step) -> Term:
        parts, count = [], 1
        for student, teacher in self.aligned(s, t):
            a, b = (shapes.pooled(x, batch.mask) for x in (student, teacher))
            if self.options.normalise:
                a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
            parts.append((a - b).square().sum())
            count = len(a)
        return term(torch.stack(parts).sum(), float(count), "embedding MSE")


def tokens_of(feature: Tensor, limit: int) -> Tensor:
    """Tokens (B, T, d) as they are, places of a map (B, C, H, W) as tokens; at most ``limit``, evenly spread."""
    tokens = feature.flatten(2).transpose(1, 2) if feature.dim() == 4 else feature
    if tokens.shape[1] <= limit:
        return tokens
    return tokens[:, torch.linspace(0, tokens.shape[1] - 1, limit, device=tokens.device).round().long()]


def masked_rows(log_p: Tensor, keep: Tensor) -> Tensor:
    """Log-softmax of rows (..., n, m) over the kept columns (..., m)."""
    return log_p.masked_fill(~keep.unsqueeze(-2), -1e9).log_softmax(-1)


class Similarity(SignalObjective):
    """Cosine similarities among samples, or among the tokens of a sample, become those of the teacher.

    Formula: R = matrix of cosines, of each model in its own width. `compare`: "mse" is the mean of (R_S - R_T)^2, "kl"
    the KL of the rows' softmax(R / temperature), mean over rows, "cosine" 1 - cos(R_S, R_T) of the flattened matrices.
    With `pairs` R compares the first with the second row of each group, and "kl" takes rows and columns, half each.

    Shapes: any feature; over "samples" pooled to (B, d), over "tokens" (B, T, d) or the places of (B, C, H, W), padding
    left out. Widths may differ. Memory: at most `samples` squared, or `samples` tokens squared for each sample.
    Paper: Mao and Nakagawa, "LEALLA", 2023 (R2, logit term: mse over samples); CKD of Yang et al., "CLIP-KD", 2024 (W1:
    kl, pairs); token relations of Zhang et al. (TRG), 2023 (F5: kl over tokens, generic part only); RDist of Cai
    et al., "LLaVA-KD", 2024 (W5: cosine over tokens).
    Defaults: match logits with logits, compare mse, over samples, temperature 1, samples 512. CKD's temperature is that
    of the model's softmax, 0.01 to 0.07.
    When: embeddings whose distances matter and whose coordinates do not; no projection is trained.
    Worked number: student [[1,0],[0,1]], teacher [[1,0],[1,0]]: two of four cosines are 1 apart, mse 0.5.
    """

    class Options(Frozen):
        compare: Literal["mse", "kl", "cosine"] = "mse"
        over: Literal["samples", "tokens"] = "samples"
        pairs: bool = False
        temperature: Positive = 1.0
        samples: Annotated[int, Field(ge=2)] = 512

    default_match: ClassVar[Match | None] = Match(student="logits", teacher="logits", proj="none")

    def bind(self, student: Counts, teacher: Counts) -> list[str]:
        assert self.match is not None  # there is a default
        self.pairs, problems = layers.pairs(self.match, student, teacher)
        names = [frozenset(side) for side in zip(*self.pairs, strict=True)] or [frozenset(), frozenset()]
        batch = frozenset({"mask", "groups"} if self.options.pairs else {"mask"})
        batch_wise = self.options.over == "samples"
        self.needs = Needs(names[0], names[1], batch, batch_wise=batch_wise, same_vocab=False)
        if self.options.pairs and not batch_wise:
            problems.append("`pairs` compares samples, not tokens")
        return problems

    def __call__(self, s: Signals, t: Signals, batch: Batch, step: Step) -> Term:
        parts = [self._pair(s[a], t[b], batch) for a, b in self.pairs]
        return term(torch.stack([part for part, _ in parts]).sum(), parts[0][1], f"similarity {self.options.compare}")

    def _pair(self, student: Tensor, teacher: Tensor, batch: Batch) -> tuple[Tensor, float]:
        cap, mask = self.options.samples, batch.mask
        if self.options.over == "tokens":
            student, teacher = shapes.same_size(student.float(), teacher.float())
            keep = self._kept(student, mask)
            own, other = (self._cosines(x, x) for x in (tokens_of(student, cap), tokens_of(teacher, cap)))
            return self._loss(own, other, keep)
        vectors = [shapes.pooled(x, mask) for x in (student, teacher)]
        if self.options.pairs:
            own, other = (self._cosines(*(x[:cap] for x in sides(v, batch, "similarity"))) for v in vectors)
        else:
            own, other = (self._cosines(v[:cap], v[:cap]) for v in vectors)
        return self._loss(own[None], other[None], torch.ones_like(own[None, 0], dtype=torch.bool))

    @staticmethod
    def _cosines(a: Tensor, b: Tensor) -> Tensor:
        return F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).transpose(-1, -2)

    def _kept(self, student: Tensor, mask: Tensor | None) -> Tensor:
        """(B, n) which of the sampled tokens are real."""
        if student.dim() == 4 or mask is None:
            tokens = tokens_of(student, self.options.samples)
            return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return tokens_of((mask != 0).unsqueeze(-1), self.options.samples)[..., 0]

    def _loss(self, own: Tensor, other: Tensor, keep: Tensor) -> tuple[Tensor, float]:
        """Sum over matrices (G, n, n) and their number: of each the mean over its entries, rows, or itself."""
        both = keep.unsqueeze(-1) & keep.unsqueeze(-2)
        size = keep.sum(-1).clamp_min(1)
        if self.options.compare == "mse":
            values = (both * (own - other).square()).sum((1, 2)) / size.square()
        elif self.options.compare == "cosine":
            values = 1 - F.cosine_similarity((own * both).flatten(1), (other * both).flatten(1), dim=-1)
        else:
            values = self._row_kl(own, other, keep)
            if self.options.pairs:
                values = (values + self._row_kl(own.transpose(1, 2), other.transpose(1, 2), keep)) / 2
        return values.sum(), float(len(values))

    def _row_kl(self, own: Tensor, other: Tensor, keep: Tensor) -> Tensor:
        log_p, log_q = (masked_rows(x / self.options.temperature, keep) for x in (other, own))
        rows = (log_p.exp() * (log_p - log_q)).sum(-1)
        return (rows * keep).sum(-1) / keep.sum(-1).clamp_min(1)


class AdditiveMargin(SignalObjective):
    """No teacher: the two sides of a pair find each other among all sides of the batch, by a margin.

    Formula: -log e^(scale (c_ii - margin)) / (e^(scale (c_ii - margin)) + sum over j != i of e^(scale c_ij)), c_ij the
    cosine of first side i and second side j; mean over pairs, both directions added.

    Shapes: any student feature, pooled to (B, d); groups of two rows are the pairs.
    Paper: Yang et al., "Improving Multilingual Sentence Embedding using Bi-directional Dual Encoder with Additive
    Margin Softmax", 2019; the task term of Mao and Nakagawa, "LEALLA", 2023 (methods R2).
    Defaults: signal logits, margin 0.3, scale 20 (ours: the paper's scale is not known). LEALLA weighs feature, logit
    and this term 1, 1000 and 0.01 (unverified).
    When: translation or question-answer pairs, beside `embedding-mse` and `similarity`.
    Worked number: orthogonal pairs [1,0] = [1,0], [0,1] = [0,1], margin 0, scale 1: 2 * ln(1 + 1/e) = 0.626523.
    """

    class Options(Frozen):
        margin: Annotated[float, Field(ge=0)] = 0.3
        scale: Positive = 20.0

    def bind(self, student: Counts, teacher: Counts) -> list[str]:
        fields = frozenset({"groups", "mask"})
        self.needs = Needs(student=frozenset({"logits"}), batch=fields, batch_wise=True, same_vocab=False)
        return [] if "logits" in student else ["the student has no logits"]

    def __call__(self, s: Signals, t: Signals, batch: Batch, step: Step) -> Term:
        first, second = sides(F.normalize(shapes.pooled(s["logits"], batch.mask), dim=-1), batch, "additive-margin")
        own = torch.eye(len(first), device=first.device)
        scores = self.options.scale * (first @ second.T - self.options.margin * own)
        target = torch.arange(len(first), device=first.device)
        total = sum((F.cross_entropy(x, target, reduction="sum") for x in (scores, scores.T)), torch.zeros(()))
        return term(total, float(len(first)), "additive margin")
