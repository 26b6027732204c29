"""Objectives on the geometry of a batch: F3 of the methods catalogue."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from compressor.config import Frozen
from compressor.distil.objectives import layers, shapes
from compressor.distil.objectives.base import Batch, Counts, Needs, SignalObjective, Signals, Step, Term
from compressor.recipe import Match


def distances(vectors: Tensor) -> Tensor:
    """Pairwise Euclidean distances (B, B) in units of their mean over the pairs that are not zero.

    Memory grows with B^2: differences (B, B, d) are never kept. Where a distance is 0 its gradient is 0.
    """
    distance = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")  # the other mode cancels
    return distance / (distance.sum() / (distance > 0).sum().clamp_min(1)).clamp_min(1e-12)


def angles(vectors: Tensor) -> Tensor:
    """Cosines (B, B, B) of the angle at sample i between samples j and k."""
    unit = F.normalize(vectors[None] - vectors[:, None], dim=-1)
    return unit @ unit.transpose(-1, -2)


class _Relational(SignalObjective):
    default_match: ClassVar[Match | None] = Match(student="hidden[-1]", teacher="hidden[-1]", proj="none")

    def bind(self, student: Counts, teacher: Counts) -> list[str]:
        if self.match is None:
            raise ValueError("a relational objective needs a match")
        self.pairs, problems = layers.pairs(self.match, student, teacher)
        names = [frozenset(side) for side in zip(*self.pairs, strict=True)] or [frozenset(), frozenset()]
        self.needs = Needs(names[0], names[1], frozenset({"mask"}), batch_wise=True, same_vocab=False)
        return problems

    def structure(self, vectors: Tensor) -> Tensor:
        """The relations that are compared."""
        raise NotImplementedError

    def __call__(self, s: Signals, t: Signals, batch: Batch, step: Step) -> Term:
        cap = self.options.samples
        mask = batch.mask[:cap] if batch.mask is not None else None
        total: Tensor | None = None
        count = 1
        for a, b in self.pairs:
            own = self.structure(shapes.pooled(s[a][:cap], mask))
            other = self.structure(shapes.pooled(t[b][:cap], mask))
            part = F.smooth_l1_loss(own, other, reduction="sum")
            total, count = part if total is None else total + part, own.numel()
        assert total is not None  # bind gives at least one pair
        return Term(total, float(count), {"relation error": total.detach()})


class RkdDistance(_Relational):
    """Distances between the samples of a batch become those of the teacher, up to one scale.

    Formula: smooth-L1(d_S, d_T), d_ij = |e_i - e_j| / mean of the positive distances, mean over all B^2 entries.
    Invariant to rotation and to scaling of either space.

    Shapes: any feature, pooled to (B, d): mean over space or real tokens; widths may differ.
    Paper: Park et al., "Relational Knowledge Distillation", 2019 (methods F3).
    Defaults: match hidden[-1] with hidden[-1]; the first 512 samples of a batch. Classification uses weights around 25.
    When: embeddings and ranking, where relations matter and coordinates do not.
    Worked number: teacher [[1,0,2],[0,1,1],[2,2,0]], student [[.5,1],[1,0],[1,2]]: 0.041349.
    """

    class Options(Frozen):
        samples: Annotated[int, Field(ge=2)] = 512

    def structure(self, vectors: Tensor) -> Tensor:
        return distances(vectors)


class RkdAngle(_Relational):
    """Angles between triples of samples become those of the teacher.

    Formula: smooth-L1(psi_S, psi_T), psi_ijk = cos of the angle at i between j and k, mean over all B^3 entries.
    Memory grows with the cube of the samples, so only the first `samples` of a batch are used.

    Shapes: any feature, pooled to (B, d): mean over space or real tokens; widths may differ.
    Paper: Park et al., "Relational Knowledge Distillation", 2019 (methods F3).
    Defaults: match hidden[-1] with hidden[-1]; samples 64. Classification uses weights around 50.
    When: beside `rkd-distance`, at twice its weight.
    Worked number: teacher [[1,0,2],[0,1,1],[2,2,0]], student [[.5,1],[1,0],[1,2]]: 0.080029.
    """

    class Options(Frozen):
        samples: Annotated[int, Field(ge=3)] = 64

    def structure(self, vectors: Tensor) -> Tensor:
        return angles(vectors)
