"""Objectives for samples with several labels: each label is a yes or no of its own (methods L9)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.config import Frozen
from compressor.distil.objectives import layers
from compressor.distil.objectives.base import Batch, Counts, Needs, SignalObjective, Signals, Step, Term
from compressor.distil.objectives.rows import LogitObjective, Rows, term
from compressor.errors import StageError
from compressor.recipe import Match


def binary_label_term(logits: Tensor, batch: Batch) -> Term:
    """Binary cross-entropy with the labels of a multi-label task, mean over samples and classes.

    ``logits`` and ``batch.labels`` are (B, C); entries below 0 are unknown and do not count.
    """
    assert batch.labels is not None  # the loop always gives labels, -100 where there is none
    known = batch.labels >= 0
    target = batch.labels.clamp_min(0).to(torch.float32)
    losses = F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none")
    return Term(torch.where(known, losses, 0).sum(), known.sum())


def binary_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL of the Bernoulli distributions sigmoid(teacher) and sigmoid(student), elementwise."""
    teacher, student = teacher.float(), student.float()
    p = teacher.sigmoid()
    yes = F.logsigmoid(teacher) - F.logsigmoid(student)
    no = F.logsigmoid(-teacher) - F.logsigmoid(-student)
    return p * yes + (1 - p) * no


class MultiLabelKd(LogitObjective):
    """The teacher's yes or no to each label, as a probability.

    Formula: sum over classes of KL(Bernoulli(sigmoid z_T) || Bernoulli(sigmoid z_S)), mean over samples.

    Shapes: logits (N, C) of both models, or (N, T, C) with a token mask; same classes.
    Paper: Yang et al., "Multi-Label Knowledge Distillation" (L2D), 2023 (methods L9).
    Defaults: none. The paper weighs it 10 beside the labels' binary cross-entropy.
    When: several labels a sample, where a softmax would make them compete.
    Worked number: the logits of `kd` give 0.418552.
    """

    log_name = "multi-label KL"

    def values(self, rows: Rows) -> Tensor:
        return binary_kl(rows.teacher, rows.student).sum(-1)


def masked_distances(vectors: Tensor, keep: Tensor) -> Tensor:
    """Distances (G, n, n) inside each group of vectors (G, n, d), in units of their mean; 0 where ``keep`` is not."""
    squared = (vectors[:, :, None] - vectors[:, None]).square().sum(-1)
    both = keep[:, :, None] & keep[:, None] & (squared > 0)
    # sqrt has no gradient at 0, where the diagonal and equal vectors lie
    distance = squared.clamp_min(1e-12).sqrt() * both
    mean = distance.sum((1, 2)) / both.sum((1, 2)).clamp_min(1)
    return distance / mean.clamp_min(1e-12)[:, None, None]


def grouped_distance_loss(student: Tensor, teacher: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Distance loss of :class:`RkdDistance` inside each group with two kept vectors or more: its sum, and how many.

    ``student``, ``teacher``: (G, n, d) with their own d; ``keep``: (G, n).
    """
    size = keep.sum(1)
    several = size > 1
    error = F.smooth_l1_loss(
        masked_distances(student.float(), keep), masked_distances(teacher.float(), keep), reduction="none"
    )
    losses = error.sum((1, 2)) / size.clamp_min(1).square()
    return torch.where(several, losses, 0).sum(), several.sum()


class LabelEmbedding(SignalObjective):
    """Distances between label-wise embeddings: of one class across samples, or of one sample across its labels.

    Formula: for `within = "class"` each class with two positive samples or more, for `within = "instance"` each sample
    with two positive labels or more, is a group; loss of `rkd-distance` among the positive embeddings of a group, mean
    over its n^2 entries, mean over groups. (The paper gives no unit for its sum; the mean is ours.)

    Shapes: label-wise embeddings (B, C, d), one vector a class, of both models, named by the match; labels (B, C) of 0
    and 1. Widths d may differ.
    Paper: Yang et al., "Multi-Label Knowledge Distillation" (L2D), 2023: CD and ID (methods L9).
    Defaults: within class, match hidden[-1] with hidden[-1]. The paper weighs classes 100 and instances 1000.
    When: multi-label models with one embedding a label (query decoders, class tokens), beside `multi-label`.
    Worked number: one class, three positive samples with the features of `rkd-distance`: 0.041349.
    """

    class Options(Frozen):
        within: Literal["class", "instance"] = "class"

    default_match: ClassVar[Match | None] = Match(student="hidden[-1]", teacher="hidden[-1]", proj="none")

    def bind(self, student: Counts, teacher: Counts) -> list[str]:
        assert self.match is not None  # there is a default
        self.pairs, problems = layers.pairs(self.match, student, teacher)
        names = [frozenset(side) for side in zip(*self.pairs, strict=True)] or [frozenset(), frozenset()]
        self.needs = Needs(names[0], names[1], frozenset({"labels"}), batch_wise=True, same_vocab=False)
        return problems

    def __call__(self, s: Signals, t: Signals, batch: Batch, step: Step) -> Term:
        found = [self._pair(s[a], t[b], batch.labels) for a, b in self.pairs]
        total = torch.stack([part for part, _ in found]).sum()
        return term(total, found[0][1], "label embedding distance")

    def _pair(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        shapes = [tuple(x.shape[:2]) for x in (student, teacher)] if student.dim() == teacher.dim() == 3 else []
        if labels is None or shapes != [tuple(labels.shape)] * 2:
            raise StageError(
                f"label-embedding: embeddings {tuple(student.shape)} and {tuple(teacher.shape)} are not one vector for "
                f"each label of {None if labels is None else tuple(labels.shape)}",
                hint="Name label-wise embeddings (samples, labels, width) in the match; the task must be multi-label.",
            )
        keep = labels > 0
        if self.options.within == "instance":
            return grouped_distance_loss(student, teacher, keep)
        return grouped_distance_loss(student.transpose(0, 1), teacher.transpose(0, 1), keep.transpose(0, 1))
