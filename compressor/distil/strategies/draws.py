"""What one step trains on, and the iterators between the order of the data and the steps.

Everything is a function of seed, epoch, step and the student's weights at that step, so a resumed run draws what an
undisturbed one draws; the only state is the mixture of domains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from compressor.distil.groups import GroupOrder
from compressor.distil.stream import TrainingSet
from compressor.errors import StageError
from compressor.recipe import DistilStage
from compressor.strategy import MixStrategy, MixupStrategy, SelectStrategy
from compressor.types import Array

Losses = Callable[[Array], tuple[Array, Array]]  # positions -> loss of the student, loss of the teacher, float64 (B,)


@dataclass(frozen=True)
class Draw:
    """The samples of one step; with ``partners`` each is blended: ``share`` of itself, the rest of its partner.

    ``groups``: samples with equal numbers belong together (query, right passage, wrong ones), in their order.
    """

    step: int
    positions: Array
    groups: Array | None = None
    partners: Array | None = None
    share: float = 1.0

    def pieces(self, count: int) -> list[Draw]:
        """Cut for micro-batches; fewer than ``count`` where a piece would have less than two samples."""
        count = max(1, min(count, len(self.positions) // 2))
        return [self.among(cut) for cut in np.array_split(np.arange(len(self.positions)), count)]

    def among(self, kept: Array) -> Draw:
        """Some of the samples, by their places."""
        groups, partners = (None if array is None else array[kept] for array in (self.groups, self.partners))
        return replace(self, positions=self.positions[kept], groups=groups, partners=partners)


class Stream:
    """The steps of every epoch, after all strategies that choose while training."""

    def __init__(
        self,
        data: TrainingSet,
        config: DistilStage,
        seed: int,
        losses: Losses | None,
        agree: Callable[[Array], Array],
        groups: GroupOrder | None = None,
    ) -> None:
        """``losses``: None for the null twin, which draws at random. ``agree``: the first process's choice for all.
        ``groups``: batches hold whole groups; strategies that choose samples are not asked then.
        """
        self.groups = groups
        self._data, self._config, self._seed, self._losses, self._agree = data, config, seed, losses, agree
        find: dict[type, Any] = {type(strategy): strategy for strategy in config.strategy}
        self._select: Any = find.get(SelectStrategy)
        self._mix: Any = find.get(MixStrategy)
        self._mixup: Any = find.get(MixupStrategy)
        self._domains = domains(data, self._mix.by) if self._mix else []
        self.shares = np.array([len(part) for part in self._domains], dtype=np.float64) / max(1, len(data))
        self.size = config.batch if self._select is None else round(config.batch / (1 - self._select.discard))
        self.steps = len(data.order(0, self.size, seed) if groups is None else groups.order(0, config.batch, seed))
        self.forwards = 0  # samples the student was run on to choose, beyond those it was trained on

    def begin(self, epoch: int) -> None:
        """Before the first step of an epoch: the mixture follows the models."""
        if self._mix is None or self._losses is None or len(self._domains) < 2:
            return
        gaps = []
        for number, part in enumerate(self._domains):
            random = np.random.Generator(np.random.PCG64([self._seed, epoch, number, 1]))
            probe = np.sort(random.permutation(part)[: self._mix.probe])
            student, teacher = self._losses(probe)
            self.forwards += len(probe)
            gaps.append(float(student.mean() - teacher.mean()))
        self.shares = self._agree(mixture(np.array(gaps), self._mix.smoothing))

    def epoch(self, epoch: int, start: int) -> Iterator[Draw]:
        """The draws of an epoch from step ``start`` on."""
        if self.groups is not None:
            batches = self.groups.order(epoch, self._config.batch, self._seed)
            return iter(Draw(step, *batches[step]) for step in range(start, len(batches)))
        order = self._order(epoch)
        draws: Iterator[Draw] = (Draw(step, order[step]) for step in range(start, len(order)))
        for strategy in self._config.strategy:
            if isinstance(strategy, SelectStrategy):
                draws = self._selected(draws, strategy)
            elif isinstance(strategy, MixupStrategy):
                draws = self._blended(draws, strategy, epoch)
        return draws

    def _order(self, epoch: int) -> Sequence[Array]:
        if self._mix is None or len(self._domains) < 2:
            return self._data.order(epoch, self.size, self._seed)
        sizes = [len(batch) for batch in self._data.order(epoch, self.size, self._seed)]
        random = np.random.Generator(np.random.PCG64([self._seed, epoch, 2]))
        owner = np.searchsorted(np.cumsum(self.shares)[:-1], random.random(sum(sizes)), side="right")
        found = np.empty(len(owner), dtype=np.int64)
        for number, part in enumerate(self._domains):
            mine = np.flatnonzero(owner == number)
            rounds = -(-len(mine) // len(part))
            found[mine] = np.concatenate([random.permutation(part) for _ in range(rounds)] or [part[:0]])[: len(mine)]
        return np.split(found, np.cumsum(sizes)[:-1])

    def _selected(self, draws: Iterator[Draw], strategy: SelectStrategy) -> Iterator[Draw]:
        for draw in draws:
            wanted = min(self._config.batch, max(2, round(len(draw.positions) * (1 - strategy.discard))))
            keep = np.arange(min(wanted, len(draw.positions)))
            if self._losses is not None:
                student, teacher = self._losses(draw.positions)
                self.forwards += len(draw.positions)
                keep = np.sort(np.argsort(teacher - student, kind="stable")[:wanted])
            yield replace(draw, positions=self._agree(draw.positions[keep]))

    def _blended(self, draws: Iterator[Draw], strategy: MixupStrategy, epoch: int) -> Iterator[Draw]:
        for draw in draws:
            random = np.random.Generator(np.random.PCG64([self._seed, epoch, draw.step, 3]))
            share = random.beta(strategy.alpha, strategy.alpha)
            partners = random.permutation(draw.positions)
            yield replace(draw, partners=partners, share=float(max(share, 1 - share)))


def domains(data: TrainingSet, by: str) -> list[Array]:
    """Positions of each domain: the parts of the data, the classes, or what ``data.domain`` says.

    Samples without a class or domain are a domain too.
    """
    if by == "domain":
        if data.domains is None:
            raise StageError("mix by domain needs the domain of each sample", hint="Name its column in `data.domain`.")
        return [np.flatnonzero(data.domains == key) for key in np.unique(data.domains)]
    if by == "label" and data.labels.ndim != 1:
        raise StageError("mix by label needs one class a sample", hint='Set by = "part".')
    keys = data.owners if by == "part" else data.labels
    return [np.flatnonzero(keys == key) for key in np.unique(keys)]


def mixture(gaps: Array, smoothing: float) -> Array:
    """Shares of the domains: ``smoothing * softmax(exp(gap)) + (1 - smoothing) / N``.

    ``gaps`` are mean losses of the student minus the teacher's, so exp(gap) is the ratio of their perplexities.
    Source: Liu et al., "DDK: Distilling Domain Knowledge for Efficient Large Language Models", 2024.
    """
    ratios = np.exp(np.clip(gaps, -20, 6))  # exp(exp(6)) still is a number after the largest is taken off
    weights = np.exp(ratios - ratios.max())
    found: Array = smoothing * weights / weights.sum() + (1 - smoothing) / len(gaps)
    return found
