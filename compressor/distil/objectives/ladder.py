"""Ladder projectors from every block of a student to one or several teachers: M3 of the methods catalogue."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from compressor.config import Frozen
from compressor.distil.objectives import layers, shapes
from compressor.distil.objectives.base import Batch, Context, Counts, Needs, Pass, SignalObjective, Signals, Step, Term
from compressor.recipe import Match, Ratio


def cosine_and_smooth(student: Tensor, teacher: Tensor) -> Tensor:
    """(1 - cos) / 2 + smooth-L1 (beta 1, mean over features) / 2 of (..., d): (...)."""
    near = F.smooth_l1_loss(student, teacher, reduction="none").mean(-1)
    found: Tensor = 0.5 * (1 - F.cosine_similarity(student, teacher, dim=-1)) + 0.5 * near
    return found


def positions(feature: Tensor) -> Tensor:
    """Maps (B, C, H, W) as (B, H * W, C); tokens and vectors as they are; float32."""
    return (feature.flatten(2).transpose(1, 2) if feature.dim() == 4 else feature).float()


class Ladder(SignalObjective):
    """All blocks of the student together imitate each teacher, and the teacher it is farthest from is never left out.

    Formula: for teacher t L_t = 1/2 (1 - cos(s, f_t)) + 1/2 smoothL1(s, f_t), s = sum over blocks of MLP_(block,t)
    (h_block), f_t in units of its standard deviation about its mean over the training set. For each sample the teacher
    with the largest L_t counts, every other one with probability 1 - drop; sum of the losses that count over their
    number.

    Shapes: student hidden[i], teacher's `signal` of any width: tokens (B, T, d), maps (B, C, H, W) or vectors (B, d).
    `level` `pooled` compares one vector a sample, `tokens` each token or place (mean over them).
    Paper: Sariyildiz et al., "UNIC: Universal Classification Models via Multi-teacher Distillation", ECCV 2024 (methods
    M3); it keeps running means, which one pass over the training set replaces here.
    Defaults: signal hidden[-1] of every teacher (of `[[teacher.more]]` too), hidden 768, drop 0.5, level pooled.
    When: several teachers, or a student of another family. The projectors are dropped at export.
    Worked number: s [[1,1,1],[0,2,1],[1,2,1]], f [[1,0,2],[0,1,1],[2,2,0]]: 0.207338.
    """

    class Options(Frozen):
        signal: str = "hidden[-1]"
        hidden: Annotated[int, Field(ge=1)] = 768
        drop: Ratio = 0.5
        level: Literal["pooled", "tokens"] = "pooled"

    def bind(self, student: Counts, teacher: Counts) -> list[str]:
        blocks = layers.count(student, "hidden")
        self.rungs = [f"hidden[{i}]" for i in range(blocks)]
        problems = [] if blocks else ["the student has no `hidden` signals"]
        prefixes = ["", *sorted({name.split(":")[0] + ":" for name in teacher if ":" in name} - {"main:"})]
        self.taught: list[str] = []
        for prefix in prefixes:
            own = {n.removeprefix(prefix): c for n, c in teacher.items() if (":" in n) == bool(prefix)}
            found, wrong = layers.pairs(Match(student=self.options.signal, teacher=self.options.signal), own, own)
            who = f"{prefix} " if prefix else ""
            problems += [who + text.replace("student", "teacher") for text in wrong[:1]]
            self.taught += [prefix + other for _, other in found]
        names = frozenset(self.rungs), frozenset(self.taught)
        self.needs = Needs(*names, frozenset({"mask"}), same_vocab=False, training_pass=True)
        return problems

    def prepare(self, ctx: Context) -> None:
        self._seed = int(torch.randint(2**31, (1,), generator=ctx.generator))
        bound_seed = torch.Generator().manual_seed(self._seed)
        self._parts = nn.ModuleList()
        for name in self.taught:
            size = shapes.width(ctx.teacher[name])
            part = nn.Module()
            part.rungs = nn.ModuleList(
                nn.Sequential(nn.Linear(width, self.options.hidden), nn.GELU(), nn.Linear(self.options.hidden, size))
                for width in (shapes.width(ctx.student[rung]) for rung in self.rungs)
            )
            part.register_buffer("mean", torch.zeros(size))
            part.register_buffer("deviation", torch.ones(size))
            self._parts.append(part)
        with torch.no_grad():
            for layer in (part for part in self._parts.modules() if isinstance(part, nn.Linear)):
                for parameter in layer.parameters():
                    random = torch.rand(parameter.shape, generator=bound_seed)
                    parameter.copy_((random * 2 - 1) * layer.in_features**-0.5)
        self._parts.to(ctx.device)

    def modules(self) -> nn.Module | None:
        return self._parts

    def survey(self, training: Pass, generator: torch.Generator) -> None:
        sums = [torch.zeros(2, len(part.mean), dtype=torch.float64) for part in self._parts]
        counts = [0.0] * len(self.taught)
        for seen in training(False):
            for number, name in enumerate(self.taught):
                rows, mask = self._level(seen.teacher[name], seen.batch.mask)
                kept = (rows if mask is None else rows[mask != 0]).reshape(-1, rows.shape[-1]).double().cpu()
                counts[number] += len(kept)
                sums[number] += torch.stack([kept.sum(0), kept.square().sum(0)])
        for part, (total, square), count in zip(self._parts, sums, counts, strict=True):
            mean = total / max(1.0, count)
            part.mean.copy_(mean)
            part.deviation.copy_((square / max(1.0, count) - mean.square()).clamp_min(1e-12).sqrt())

    def _level(self, feature: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Features (B, d) or (B, P, d), and the mask of their positions where there is one."""
        if self.options.level == "pooled":
            return shapes.pooled(feature, mask), None
        found = positions(feature)
        return found, mask if mask is not None and found.dim() == 3 and found.shape[:2] == mask.shape else None

    def losses(self, s: Signals, t: Signals, batch: Batch) -> Tensor:
        """(teachers, B)."""
        found = []
        for name, part in zip(self.taught, self._parts, strict=True):
            climbed: Tensor | None = None
            for rung, project in zip(self.rungs, part.rungs, strict=True):
                own = s[rung]
                if self.options.level == "tokens" and own.dim() == 4 and t[name].dim() == 4:
                    own = F.adaptive_avg_pool2d(own.float(), t[name].shape[2:])
                up = project(self._level(own, batch.mask)[0])
                climbed = up if climbed is None else climbed + up
            assert climbed is not None  # bind gives at least one rung
            wanted, mask = self._level(t[name], batch.mask)
            values = cosine_and_smooth(climbed, (wanted - part.mean) / part.deviation)
            if values.dim() == 2:
                keep = torch.ones_like(values) if mask is None else (mask != 0).float()
                values = (values * keep).sum(1) / keep.sum(1).clamp_min(1)
            found.append(values)
        return torch.stack(found)

    def __call__(self, s: Signals, t: Signals, batch: Batch, step: Step) -> Term:
        values = self.losses(s, t, batch)
        counted = kept_teachers(values.detach(), self.options.drop, self._seed + step.index)
        total = (values * counted).sum()
        return Term(total, counted.sum(), {"ladder": total.detach()})


def kept_teachers(losses: Tensor, drop: float, seed: int) -> Tensor:
    """1 where a teacher counts for a sample, (teachers, B): the worst always, others with probability 1 - ``drop``."""
    random = torch.rand(losses.shape, generator=torch.Generator().manual_seed(seed)).to(losses.device)
    worst = F.one_hot(losses.argmax(0), len(losses)).T.to(losses.dtype)
    return torch.maximum(worst, (random >= drop).to(losses.dtype))
