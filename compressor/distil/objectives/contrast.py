"""Contrast between student and teacher, and between their activations' distributions (methods R3, W1, F6, F9)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from compressor.config import Frozen
from compressor.distil.objectives import layers, shapes
from compressor.distil.objectives.base import Batch, Context, Counts, Needs, SignalObjective, Signals, Step, Term
from compressor.distil.objectives.embedding import SENTENCES, sides
from compressor.distil.objectives.features import Matched
from compressor.distil.objectives.rows import term
from compressor.recipe import Match, Positive


def info_nce(student: Tensor, teacher: Tensor, temperature: float, extra: Tensor | None = None) -> Tensor:
    """-log of the share of teacher i among all teachers (and ``extra`` (K, d)) for student i: one value a row.

    ``student``, ``teacher``: (N, d); compared by cosine over ``temperature``.
    """
    against = teacher if extra is None else torch.cat([teacher, extra])
    scores = F.normalize(student, dim=-1) @ F.normalize(against, dim=-1).T / temperature
    target = torch.arange(len(student), device=student.device)
    return F.cross_entropy(scores, target, reduction="none")


class Memory(nn.Module):  # type: ignore[misc]  # torch is not typed here
    """The last teacher embeddings, a ring of ``size`` vectors; buffers, so that a checkpoint holds them."""

    vectors: Tensor
    filled: Tensor
    place: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(size, width))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))

    def seen(self) -> Tensor:
        """What is remembered, (filled, d)."""
        return self.vectors[: int(self.filled)].clone()  # a copy: the ring moves on before the gradient is taken

    def add(self, vectors: Tensor) -> None:
        """Remember the teachers of a batch (without gradient), over the oldest."""
        new = vectors[-len(self.vectors) :]
        places = (self.place + torch.arange(len(new), device=new.device)) % len(self.vectors)
        self.vectors[places] = new
        self.place.copy_((self.place + len(new)) % len(self.vectors))
        self.filled.copy_((self.filled + len(new)).clamp_max(len(self.vectors)))


class Contrastive(Matched):
    """The student's embedding of a sample finds the teacher's embedding of the same sample among all others.

    Formula: -log e^(cos(s_i, t_i) / temperature) / sum over j of e^(cos(s_i, t_j) / temperature), j over the batch and
    a queue of the last `queue` teacher embeddings; mean over samples. `cross`: student's first side against the
    teacher's second side of each pair and the other way round, mean of both. `scales = "1,2,4"`: feature maps are
    pooled to 1x1, 2x2 and 4x4, each place is a sample of its own, summed over scales.

    Shapes: any feature, pooled to (B, d): mean over space or real tokens; a linear map where widths differ.
    Paper: Gao et al., "DistilCSE: Effective Knowledge Distillation For Contrastive Sentence Embeddings", 2021 (methods
    R3); ICL of Yang et al., "CLIP-KD: An Empirical Study of CLIP Model Distillation", 2024 (W1: cross); after Wang et
    al., "Contrastive Representation Distillation via Multi-Scale Feature Decoupling", 2025 (F6: scales; temperature 0.1
    there is our choice).
    Defaults: match logits with logits, temperature 0.05, queue 0, cross false, scales "1".
    When: embeddings for search. A queue longer than the data set holds the sample itself as a negative.
    Worked number: orthogonal [1,0] and [0,1], student = teacher, temperature 1: ln(1 + 1/e) = 0.313262.
    """

    class Options(Frozen):
        temperature: Positive = 0.05
        queue: Annotated[int, Field(ge=0)] = 0
        cross: bool = False
        scales: str = "1"

        @field_validator("scales")
        @classmethod
        def _are_sizes(cls, value: str) -> str:
            if not value or not all(part.strip().isdecimal() and int(part) for part in value.split(",")):
                raise ValueError('must be whole numbers with commas, such as "1,2,4"')
            return value

    default_match: ClassVar[Match | None] = SENTENCES
    batch_wise: ClassVar[bool] = True

    def bind(self, student: Counts, teacher: Counts) -> list[str]:
        problems = super().bind(student, teacher)
        if self.options.cross:
            fields = self.needs.batch | {"groups"}
            self.needs = Needs(self.needs.student, self.needs.teacher, fields, batch_wise=True, same_vocab=False)
        several = self.options.scales != "1"
        if self.options.queue and (len(self.pairs) > 1 or several or self.options.cross):
            problems.append("`queue` needs one pair of signals, scales 1 and cross false")
        if self.options.cross and several:
            problems.append("`cross` compares samples, it takes no scales")
        return problems

    def prepare(self, ctx: Context) -> None:
        super().prepare(ctx)
        self._memory: Memory | None = None
        if self.options.queue:
            width = shapes.width(ctx.teacher[self.pairs[0][1]])
            self._memory = Memory(self.options.queue, width).to(ctx.device)

    def modules(self) -> nn.Module | None:
        if self._memory is None:
            return super().modules()
        return nn.ModuleList([self._projections, self._memory])

    def __call__(self, s: Signals, t: Signals, batch: Batch, step: Step) -> Term:
        parts, tau = [], self.options.temperature
        for student, teacher in self.aligned(s, t):
            own, other = (shapes.pooled(x, batch.mask) for x in (student, teacher))
            if self.options.cross:
                (own_a, own_b), (a, b) = (sides(x, batch, "contrastive") for x in (own, other))
                parts.append((info_nce(own_a, b, tau) + info_nce(own_b, a, tau)).mean() / 2)
            elif self.options.scales == "1":
                parts.append(self._samples(own, other).mean())
            else:
                parts.append(self._scales(student, teacher))
        count = float(len(next(iter(s.values()))))
        return term(torch.stack(parts).sum() * count, count, "contrastive")

    def _samples(self, own: Tensor, other: Tensor) -> Tensor:
        if self._memory is None:
            return info_nce(own, other, self.options.temperature)
        values = info_nce(own, other, self.options.temperature, self._memory.seen())
        self._memory.add(other.detach())
        return values

    def _scales(self, student: Tensor, teacher: Tensor) -> Tensor:
        found = []
        for size in map(int, self.options.scales.split(",")):
            own, other = (
                F.adaptive_avg_pool2d(x, size).flatten(2).transpose(1, 2).flatten(0, 1) if x.dim() == 4 else x
                for x in (student, teacher)
            )
            found.append(info_nce(own, other, self.options.temperature).mean())
        return torch.stack(found).sum()


def channel_vectors(feature: Tensor, mask: Tensor | None) -> Tensor:
    """A vector of length 1 for each channel: (B, C, H, W) -> (B, C, H * W), tokens (B, T, d) -> (B, d, T)."""
    if feature.dim() == 4:
        return F.normalize(feature.flatten(2), dim=-1)
    if mask is not None:
        feature = feature * (mask != 0).unsqueeze(-1)
    return F.normalize(feature.transpose(1, 2), dim=-1)


class NeuronSelectivity(SignalObjective):
    """The student's channels fire at the places where the teacher's channels do, whichever channel it is.

    Formula: mean <t_i, t_j>^2 + mean <s_i, s_j>^2 - 2 mean <s_i, t_j>^2 over pairs of channels, each channel's map a
    vector of length 1 (maximum mean discrepancy with kernel <x, y>^2); mean over samples.

    Shapes: feature maps (B, C, H, W), the larger pooled to the smaller, or tokens (B, T, d); channels may differ.
    Paper: Huang and Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017; used by
    Tang et al., "VidLanKD: Improving Language Understanding via Video-Distilled Knowledge Transfer", 2021 (methods F9).
    Defaults: match hidden[-1] with hidden[-1].
    When: feature maps of unequal width, without a projection.
    Worked number: one student channel [1,0], one teacher channel [0,1]: 1 + 1 - 0 = 2.
    """

    default_match: ClassVar[Match | None] = Match(student="hidden[-1]", teacher="hidden[-1]", proj="none")

    def bind(self, student: Counts, teacher: Counts) -> list[str]:
        assert self.match is not None  # there is a default
        self.pairs, problems = layers.pairs(self.match, student, teacher)
        names = [frozenset(side) for side in zip(*self.pairs, strict=True)] or [frozenset(), frozenset()]
        self.needs = Needs(names[0], names[1], frozenset({"mask"}), same_vocab=False)
        return problems

    def __call__(self, s: Signals, t: Signals, batch: Batch, step: Step) -> Term:
        parts, count = [], 1
        for a, b in self.pairs:
            own, other = (channel_vectors(x, batch.mask) for x in shapes.same_size(s[a].float(), t[b].float()))
            kernels = [
                (x @ y.transpose(1, 2)).square().mean((1, 2)) for x, y in ((other, other), (own, own), (own, other))
            ]
            parts.append((kernels[0] + kernels[1] - 2 * kernels[2]).sum())
            count = len(own)
        return term(torch.stack(parts).sum(), float(count), "neuron selectivity")
