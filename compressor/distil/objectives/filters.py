"""Filters that keep of a layer what the task needs: F4 of the methods catalogue."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from compressor.config import Frozen
from compressor.distil.objectives import layers, shapes
from compressor.distil.objectives.base import Batch, Context, Counts, Needs, Pass, SignalObjective, Signals, Step, Term
from compressor.distil.objectives.ladder import positions
from compressor.distil.objectives.rows import UNLABELLED
from compressor.errors import StageError
from compressor.recipe import Match, Positive


class TaskAwareFilters(SignalObjective):
    """Layers are compared through filters that first learned, on the frozen models, what the task needs (TED).

    Formula: stage 1, before the first step: for each matched layer of each model a filter g (linear, d -> `size`) and a
    probe head learn the labels from the frozen layer. Stage 2: mean over pairs of MSE(g_S(h_S), g_T(h_T)): mean over
    features, mean over samples or real tokens; the teacher's filters are frozen, the student's learn on.

    Shapes: tokens (B, T, d), feature maps (B, C, H, W; the larger pooled to the smaller), vectors (B, d). Labels (B,).
    Paper: Liang et al., "Less is More: Task-aware Layer-wise Distillation for Language Model Compression", 2023
    (methods F4).
    Defaults: match hidden[i] with hidden[g(i)], map uniform; size 0: the teacher's width; epochs 1 and learning_rate
    1e-3 of stage 1. Beside `kd` at temperature 2; the published weights are 20 for `kd` and 50 to 100 for this.
    When: a student with far less capacity than its layers' teachers. `hidden` is the same without filters.
    Worked number: filters that change nothing, student [[1,1,1],[0,2,1],[1,2,1]], teacher [[1,0,2],[0,1,1],[2,2,0]]:
    5/9 = 0.555556.
    """

    class Options(Frozen):
        size: Annotated[int, Field(ge=0)] = 0
        epochs: Annotated[int, Field(ge=1)] = 1
        learning_rate: Positive = 1e-3

    default_match: ClassVar[Match | None] = Match()

    def bind(self, student: Counts, teacher: Counts) -> list[str]:
        assert self.match is not None  # the default is given
        self.pairs, problems = layers.pairs(self.match, student, teacher)
        names = [frozenset(side) for side in zip(*self.pairs, strict=True)] or [frozenset(), frozenset()]
        self.needs = Needs(names[0], names[1], frozenset({"mask"}), same_vocab=False, training_pass=True)
        return problems

    def prepare(self, ctx: Context) -> None:
        self.classes = ctx.classes
        self._parts = nn.ModuleList()
        for own, other in self.pairs:
            given, wanted = shapes.width(ctx.student[own]), shapes.width(ctx.teacher[other])
            size = self.options.size or wanted
            part = nn.Module()
            part.student = _drawn(given, size, ctx.generator)
            frozen = _drawn(wanted, size, ctx.generator)
            part.register_buffer("weight", frozen.weight.detach().clone())  # buffers: the teacher's filter is frozen
            part.register_buffer("bias", frozen.bias.detach().clone())
            self._parts.append(part)
        self._parts.to(ctx.device)

    def modules(self) -> nn.Module | None:
        return self._parts

    def survey(self, training: Pass, generator: torch.Generator) -> None:
        """Stage 1, on both frozen models at once."""
        with torch.enable_grad():  # it trains, whatever the caller does
            self._train(training, generator)

    def _train(self, training: Pass, generator: torch.Generator) -> None:
        device = self._parts[0].weight.device
        probes = nn.ModuleList(_Probe(part, self.classes, generator) for part in self._parts).to(device)
        optimiser = torch.optim.AdamW(probes.parameters(), lr=self.options.learning_rate)
        learned = False
        for _ in range(self.options.epochs):
            for seen in training(True):
                labels = seen.batch.labels
                if labels is None or labels.dim() != 1 or not bool((labels != UNLABELLED).any()):
                    continue
                loss = torch.stack(
                    [
                        F.cross_entropy(logits, labels, ignore_index=UNLABELLED)
                        for (own, other), probe in zip(self.pairs, probes, strict=True)
                        for logits in probe(seen.student[own], seen.teacher[other], seen.batch.mask)
                    ]
                ).sum()
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                learned = True
        if not learned:
            raise StageError(
                "task-aware-filters: no sample with one class to learn the filters from",
                hint="It needs labelled classification data; without labels use `hidden`.",
            )
        for part, probe in zip(self._parts, probes, strict=True):
            part.weight.copy_(probe.teacher.weight.detach())
            part.bias.copy_(probe.teacher.bias.detach())
        self._parts.zero_grad(set_to_none=True)

    def __call__(self, s: Signals, t: Signals, batch: Batch, step: Step) -> Term:
        total: Tensor | None = None
        count: Tensor | float = 1.0
        for (own, other), part in zip(self.pairs, self._parts, strict=True):
            student, teacher = (positions(x) for x in shapes.same_size(s[own].float(), t[other].float()))
            filtered = F.linear(teacher, part.weight, part.bias)
            values = F.mse_loss(part.student(student), filtered, reduction="none").mean(-1)
            if s[own].dim() == 4:
                values = values.mean(-1)
            found, count = shapes.sum_over_valid(values, batch.mask)
            total = found if total is None else total + found
        assert total is not None  # bind gives at least one pair
        total = total / len(self.pairs)
        return Term(total, count, {"filtered MSE": total.detach()})


class _Probe(nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    """Filter and probe head of one pair, for both models; the student's filter is the one that stage 2 goes on with."""

    def __init__(self, part: nn.Module, classes: int, generator: torch.Generator) -> None:
        super().__init__()
        size, width = part.weight.shape
        self.student = part.student
        self.teacher = nn.Linear(width, size)
        with torch.no_grad():
            self.teacher.weight.copy_(part.weight)
            self.teacher.bias.copy_(part.bias)
        self.heads = nn.ModuleList(_drawn(size, classes, generator) for _ in range(2))

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits (B, C) of the two probes: the filter is linear, so it may follow the pooling."""
        first = self.heads[0](self.student(shapes.pooled(student, mask)))
        return first, self.heads[1](self.teacher(shapes.pooled(teacher, mask)))


def _drawn(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * inputs**-0.5)
    return layer
