"""Layers that find their teacher while the student loses some of its own: U2 of the methods catalogue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from compressor.config import Frozen
from compressor.distil.objectives import layers, shapes
from compressor.distil.objectives.base import Batch, Context, Counts, Needs, SignalObjective, Signals, Step, Term


class Layerwise(SignalObjective):
    """Some teacher layers teach whichever student layer is nearest at the moment, in order, among those alive.

    Formula: sum over the taught teacher layers i of MSE(W h_S[m(i)], h_T[i]): mean over features, mean over real
    tokens. m(i) is the student layer of least error that is still alive (masks that learn may take layers away) and
    lies below m(i+1): from the top down, so that the order is kept. W is one linear map for all layers, dropped at
    export; it starts as the identity where widths are equal.

    Shapes: tokens (B, T, d).
    Paper: Xia et al., "Structured Pruning Learns Compact and Accurate Models", 2022 (methods U2).
    Defaults: `layers` 4, spread over the teacher and ending at its last (12 layers: 3, 6, 9, 12).
    When: with `cofi`; for a student whose layers do not correspond to the teacher's by position.
    Worked number: taught layers [1,1] and [3,3], student layers [3,3], [2,2], [0,0] and W the identity: the second
    takes layer 1 of error 0, nothing below it is left for the first, which takes layer 1 too: (1-3)^2 = 4.
    """

    class Options(Frozen):
        layers: Annotated[int, Field(ge=1)] = 4

    batch_wise: ClassVar[bool] = True  # the nearest layer is found over the batch

    def bind(self, student: Counts, teacher: Counts) -> list[str]:
        own, other = layers.count(student, "hidden"), layers.count(teacher, "hidden")
        if min(own, other) < 2 or not layers.count(student, "qkv"):
            return ["`layerwise` needs transformers with layers on both sides"]
        taught = layers.layer_map(min(self.options.layers, other - 1), other - 1, "uniform")
        self.taught = tuple(f"hidden[{layer + 1}]" for layer in taught)
        self.own = tuple(f"hidden[{layer}]" for layer in range(1, own))
        self.needs = Needs(
            frozenset(self.own), frozenset(self.taught), frozenset({"mask"}), batch_wise=True, same_vocab=False
        )
        return []

    def prepare(self, ctx: Context) -> None:
        inputs, outputs = (shapes.width(signals[names[0]]) for signals, names in self._sides(ctx.student, ctx.teacher))
        made = shapes.projection(
            ctx.student[self.own[0]], ctx.teacher[self.taught[0]], True, ctx.generator, "layerwise"
        )
        if inputs == outputs:
            made = nn.Linear(inputs, outputs, bias=False)
            nn.init.eye_(made.weight)
        self._transform = made.to(ctx.device)

    def _sides(self, s: Signals, t: Signals) -> tuple[tuple[Signals, Sequence[str]], tuple[Signals, Sequence[str]]]:
        return (s, self.own), (t, self.taught)

    def modules(self) -> nn.Module | None:
        return self._transform

    def __call__(self, s: Signals, t: Signals, batch: Batch, step: Step) -> Term:
        alive = step.alive if len(step.alive) == len(self.own) else (True,) * len(self.own)
        own = [self._transform(s[name].float()) for name in self.own]
        taught = [t[name].float() for name in self.taught]
        with torch.no_grad():
            errors = torch.stack([torch.stack([_error(o, e, batch.mask)[0] for o in own]) for e in taught])
        found = alignment(errors.tolist(), alive)
        parts = [_error(own[layer], taught[number], batch.mask) for number, layer in enumerate(found)]
        total = torch.stack([part for part, _ in parts]).sum()
        return Term(
            total, parts[0][1], {f"layer of {number}": torch.tensor(float(m)) for number, m in enumerate(found)}
        )


def alignment(errors: Sequence[Sequence[float]], alive: Sequence[bool]) -> list[int]:
    """Student layer of each taught layer, from ``errors[taught][student]``; ties go to the lower layer.

    Where nothing below is left alive, the layer above is shared; where none is alive at all, every layer may be taken.

    >>> alignment([[4.0, 1.0, 1.0], [0.0, 1.0, 9.0]], [True, True, True])
    [0, 0]
    >>> alignment([[4.0, 1.0, 2.0], [9.0, 1.0, 0.5]], [True, True, True])
    [1, 2]
    """
    usable = [layer for layer, on in enumerate(alive) if on] or list(range(len(alive)))
    found, limit = [], len(alive)
    for row in reversed(errors):
        below = [layer for layer in usable if layer < limit] or [limit if limit < len(alive) else usable[-1]]
        limit = min(below, key=lambda layer: (row[layer], layer))
        found.append(limit)
    return found[::-1]


def _error(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | float]:
    return shapes.sum_over_valid((student - teacher).square().mean(-1), mask)
