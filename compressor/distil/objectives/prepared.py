"""Objectives that look at the whole training set before the first step: L5 and R2b of the methods catalogue."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from compressor.config import Frozen
from compressor.distil.objectives import layers, shapes
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
from compressor.recipe import Match
from compressor.types import LayerFact


class NormDirection(SignalObjective):
    """Student features grow and turn to the mean of the teacher's features of their class (norm and direction).

    Formula: mean over labelled samples of 1 - <f_S, c_y / |c_y|> / max(|f_S|, |f_T|); c_y: mean of the teacher's
    features of class y over the training set; f_S through a learned linear map where widths differ, dropped at export.

    Shapes: vectors (B, d); feature maps are averaged over space. Labels (B,).
    Paper: Wang et al., "Improving Knowledge Distillation via Regularizing Feature Norm and Direction", 2023 (methods
    L5).
    Defaults: match pooled with pooled, proj linear; beside `labels = 1` and `kd` at temperature 4.
    When: beside `kd` on labelled pictures. One pass over the training set first.
    Worked number: f_S [[1,1,1],[0,2,1],[1,2,1]], f_T [[1,0,2],[0,1,1],[2,2,0]], one sample a class: 0.233772.
    """

    default_match: ClassVar[Match | None] = Match(student="pooled", teacher="pooled")

    def bind(self, student: Counts, teacher: Counts) -> list[str]:
        assert self.match is not None  # the default is given
        pairs, problems = layers.pairs(self.match, student, teacher)
        if len(pairs) > 1:
            problems.append("norm-direction compares one signal with one signal")
        if not problems:
            self.own, self.other = pairs[0]
            names = frozenset({self.own}), frozenset({self.other})
            self.needs = Needs(*names, frozenset({"labels"}), same_vocab=False, training_pass=True)
        return problems

    def prepare(self, ctx: Context) -> None:
        student, teacher = shapes.pooled(ctx.student[self.own], None), shapes.pooled(ctx.teacher[self.other], None)
        allowed = self.match is not None and self.match.proj == "linear"
        self._parts = nn.Module()
        self._parts.project = shapes.projection(student, teacher, allowed, ctx.generator, f"{self.own} -> {self.other}")
        self._parts.register_buffer("means", torch.zeros(ctx.classes, teacher.shape[-1]))  # of length 1
        self._parts.to(ctx.device)

    def modules(self) -> nn.Module | None:
        return self._parts

    def survey(self, training: Pass, generator: torch.Generator) -> None:
        total = torch.zeros(self._parts.means.shape, dtype=torch.float64)
        for seen in training(False):
            labels = _classes(seen.batch)
            known = labels != UNLABELLED
            feature = shapes.pooled(seen.teacher[self.other], seen.batch.mask)[known].double().cpu()
            total.index_add_(0, labels[known].cpu(), feature)
        self._parts.means.copy_(F.normalize(total, dim=-1))  # a mean points where its sum does

    def __call__(self, s: Signals, t: Signals, batch: Batch, step: Step) -> Term:
        labels = _classes(batch)
        student = self._parts.project(shapes.pooled(s[self.own], batch.mask))
        teacher = shapes.pooled(t[self.other], batch.mask)
        size = torch.maximum(student.norm(dim=-1), teacher.norm(dim=-1)).clamp_min(torch.finfo(torch.float32).tiny)
        mean = self._parts.means[labels.clamp_min(0)]
        values = 1 - (student * mean).sum(-1) / size
        known = (labels != UNLABELLED) & (mean.abs().sum(-1) > 0)
        total = torch.where(known, values, 0).sum()
        return Term(total, known.sum(), {"1 - projection": total.detach()})


def _classes(batch: Batch) -> Tensor:
    labels = batch.labels
    if labels is None or labels.dim() != 1:
        raise StageError("norm-direction needs one class a sample", hint="Use it with labelled classification data.")
    return labels


class HomomorphicProjection(SignalObjective):
    """A short embedding learns the principal components of the teacher's (homomorphic projective distillation).

    Formula: MSE(tanh(W f + b), V_k^T e), mean over the k components, mean over samples; V_k: the first k principal
    directions of the teacher's embeddings e over the training set (their mean is not removed, as released).

    Shapes: student embedding (B, d_S) before normalisation, teacher embedding (B, d_T); output (B, k).
    Paper: Zhao et al., "Compressing Sentence Representation for Semantic Retrieval via Homomorphic Projective
    Distillation", 2022 (methods R2b).
    Defaults: size 128, tanh, keep: the dense layer stays in the student, whose embedding is then `size` wide. With
    `keep = false` the dense layer is dropped at export and the student's own vector ships. Match: pooled with logits.
    A dense layer that stays begins as V_k over the mean length of f where d_S = d_T (ours): a student cut from its
    teacher then starts near the target. The null twin has the same layer with random weights.
    When: retrieval with smaller vectors. One pass over the training set first.
    Worked number: k = d_T, W the identity without tanh and f = V_k^T e: 0.
    """

    class Options(Frozen):
        size: Annotated[int, Field(ge=1)] = 128
        tanh: bool = True
        keep: bool = True

    default_match: ClassVar[Match | None] = Match(student="pooled", teacher="logits")
    place: ClassVar[str] = "pooling"
    _fresh: tuple[nn.Linear, float] | None = (
        None  # a dense layer that was just put in, the mean length of what it reads
    )

    @property
    def in_twin(self) -> bool:
        """Does the part make the student what it is? Then the null twin has it too, untaught."""
        return bool(self.options.keep)

    def bind(self, student: Counts, teacher: Counts) -> list[str]:
        assert self.match is not None  # the default is given
        pairs, problems = layers.pairs(self.match, student, teacher)
        if len(pairs) > 1:
            problems.append("homomorphic-projection compares one signal with one signal")
        if self.options.keep and self.match.student != "pooled":
            problems.append("`keep` puts the dense layer behind the pooling: the match's student must be `pooled`")
        if not problems:
            self.own, self.other = pairs[0]
            self.own = "projected" if self.options.keep else self.own
            names = frozenset({self.own}), frozenset({self.other})
            self.needs = Needs(*names, same_vocab=False, training_pass=True)
        return problems

    def unfit(self, student: nn.Module) -> list[str]:
        if not self.options.keep or self._existing(student) is not None:
            return []
        if any(isinstance(part, heads.ProjectedPooling) for part in student.modules()):
            return ["the student's embedding was projected to another size already"]
        if structure_of(student).pooling is None:
            return ["the student is no sentence encoder: set `keep = false`"]
        return []

    def _existing(self, student: nn.Module) -> heads.ProjectedPooling | None:
        found = [part for part in student.modules() if isinstance(part, heads.ProjectedPooling)]
        return next((part for part in found if part.dense.out_features == self.options.size), None)

    def install(self, student: nn.Module, example: Signals) -> Steps:
        if not self.options.keep or self._existing(student) is not None:
            return ()
        pooling = structure_of(student).pooling
        assert pooling is not None  # `unfit` looked
        read: list[Tensor] = []
        hook = pooling.register_forward_hook(lambda _module, _args, output: read.append(output))
        with torch.no_grad():
            width = int(student(**example).shape[-1])
        hook.remove()
        step: dict[str, Any] = {"op": "head", "module": heads.path_of(student, pooling), "kind": "projection"}
        step |= {"width": width, "size": self.options.size, "tanh": self.options.tanh}
        made = heads.replace_head(student, step).to(next(iter(example.values())).device)
        self._fresh = made.dense, float(read[-1].float().norm(dim=-1).mean())
        return (step,)

    def commit(self, student: nn.Module, steps: Steps, validation: Pass | None) -> Committed:
        if not self.options.keep:
            return Committed(steps)
        found = self._existing(student)
        assert found is not None  # `install` put it there
        after, path = f"{found.dense.out_features} wide", heads.path_of(student, found)
        why = "a dense layer behind the pooling learned the teacher's principal components"
        return Committed(
            steps, (LayerFact("distil", path, "projected", f"{found.dense.in_features} wide", after, why),)
        )

    def prepare(self, ctx: Context) -> None:
        student, teacher = ctx.student[self.own], ctx.teacher[self.other]
        size = self.options.size
        if size > teacher.shape[-1]:
            raise StageError(
                f"homomorphic-projection: size {size} of embeddings that are {teacher.shape[-1]} wide",
                hint="A projection cannot be wider than what it projects; lower `size`.",
            )
        self._parts = nn.Module()
        self._parts.register_buffer("components", torch.zeros(teacher.shape[-1], size))
        if not self.options.keep:
            self._parts.dense = nn.Linear(student.shape[-1], size)
            bound = student.shape[-1] ** -0.5
            with torch.no_grad():
                for parameter in self._parts.dense.parameters():
                    parameter.copy_(torch.rand(parameter.shape, generator=ctx.generator) * 2 * bound - bound)
        self._parts.to(ctx.device)

    def modules(self) -> nn.Module | None:
        return self._parts

    def survey(self, training: Pass, generator: torch.Generator) -> None:
        width = self._parts.components.shape[0]
        count, total = 0, torch.zeros(width, dtype=torch.float64)
        square = torch.zeros(width, width, dtype=torch.float64)
        for seen in training(False):
            rows = seen.teacher[self.other].double().cpu()
            count, total, square = count + len(rows), total + rows.sum(0), square + rows.T @ rows
        mean = total / max(1, count)
        _, vectors = torch.linalg.eigh(square / max(1, count) - torch.outer(mean, mean))
        first = vectors.flip(1)[:, : self.options.size]
        sign = first.gather(0, first.abs().argmax(0, keepdim=True)).sign()  # a direction has no sign of its own
        self._parts.components.copy_(first * sign)
        if self._fresh is not None and self._fresh[0].in_features == width:
            dense, length = self._fresh
            with torch.no_grad():
                dense.weight.copy_(self._parts.components.T / max(length, 1e-6))
                dense.bias.zero_()

    def __call__(self, s: Signals, t: Signals, batch: Batch, step: Step) -> Term:
        student = s[self.own].float()
        if not self.options.keep:
            student = self._parts.dense(student)
            student = torch.tanh(student) if self.options.tanh else student
        values = F.mse_loss(student, t[self.other].float() @ self._parts.components, reduction="none").mean(-1)
        return Term(values.sum(), float(len(values)), {"projected MSE": values.sum().detach()})
