"""Strategies that decide once, before a stage trains: which samples take part, and with which labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import assert_never

import numpy as np
import torch
from torch import Tensor

from compressor.distil.result import OnEvent
from compressor.distil.strategies.robust import draw_exactly, robust_probabilities
from compressor.distil.stream import UNLABELLED, TrainingSet
from compressor.errors import StageError
from compressor.strategy import (
    FilterStrategy,
    MixStrategy,
    MixupStrategy,
    PseudoLabelStrategy,
    QueryStrategy,
    SelectStrategy,
    Strategy,
    SubsetStrategy,
)
from compressor.types import Array

Judge = Callable[[Array], tuple[Tensor, Tensor | None]]  # positions -> logits (B, C) or (B, T, C), mask (B, T)
CHUNK = 256  # samples of one call


class Pool:
    """The samples of a stage while strategies work on them."""

    def __init__(self, data: TrainingSet, teacher: Judge, student: Judge, seed: int, on_event: OnEvent) -> None:
        self.data, self.teacher, self.student, self.seed, self.on_event = data, teacher, student, seed, on_event
        self.kept = np.arange(len(data))  # positions in ``data``
        self.labels = data.labels.copy()

    def apply(self, strategies: Sequence[Strategy], *, labels_only: bool) -> None:
        """Carry out the strategies in order. The null twin takes the same samples but no labels of the teacher."""
        for number, strategy in enumerate(strategies):
            random = np.random.Generator(np.random.PCG64([self.seed, number]))
            match strategy:
                case FilterStrategy():
                    self._filter(strategy)
                case SubsetStrategy():
                    self._subset(strategy, random)
                case PseudoLabelStrategy():
                    if not labels_only:
                        self._label(strategy)
                case QueryStrategy():
                    self._query(strategy, random)
                case SelectStrategy() | MixStrategy() | MixupStrategy():
                    pass
                case _:
                    assert_never(strategy)
            if len(self.kept) < 2:
                raise StageError(f"the strategy `{strategy.use}` leaves {len(self.kept)} samples to train on")

    def _known(self) -> Array:
        """Of the kept samples: has it a label (any, where a sample has several)?"""
        known = self.labels[self.kept] != UNLABELLED
        found: Array = np.asarray(known.reshape(len(known), -1).any(1))
        return found

    def _of(self, part: str) -> Array:
        """Positions of the kept samples of a part."""
        own = self.data.owners[self.kept]
        if part == "transfer":
            own_part: Array = self.kept[own == 1]
            return own_part
        return self.kept[own == 0] if part == "train" else self.kept

    def _keep(self, judged: Array, chosen: Array, name: str) -> None:
        dropped = np.setdiff1d(judged, chosen)
        self.kept = np.setdiff1d(self.kept, dropped)
        self.on_event("strategy", {"text": f"{name}: {len(chosen)} of {len(judged)} samples stay"})

    def _filter(self, strategy: FilterStrategy) -> None:
        judged = self._of(strategy.part)
        if not len(judged):
            return
        scores = scored(judged, self.teacher, strategy.score)
        if strategy.threshold is not None:
            chosen = judged[scores >= strategy.threshold]
        else:
            count = max(1, round((strategy.keep or 1.0) * len(judged)))
            chosen = judged[np.argsort(-scores, kind="stable")[:count]]
        self._keep(judged, chosen, "filter")

    def _subset(self, strategy: SubsetStrategy, random: np.random.Generator) -> None:
        judged = self._of(strategy.part)
        chosen = random.permutation(judged)[: max(1, round(strategy.fraction * len(judged)))]
        self._keep(judged, chosen, "subset")
        alpha = recommended_alpha(strategy.fraction)
        self.on_event(
            "note", {"text": f"subset {strategy.fraction:g}: give the teacher about {alpha:.2f} of the weight"}
        )

    def _label(self, strategy: PseudoLabelStrategy) -> None:
        judged = self.kept[~self._known()]
        sure = 0
        for chunk in _chunks(judged):
            logits, _ = self.teacher(chunk)
            if logits.dim() != 2 or self.labels.ndim != 1:
                raise StageError("pseudo-label needs one class a sample", hint="Leave the strategy out.")
            best, guess = torch.softmax(logits.float(), -1).max(-1)
            take = (best >= strategy.threshold).numpy()
            self.labels[chunk[take]] = guess.numpy()[take]
            sure += int(take.sum())
        self.on_event("strategy", {"text": f"pseudo-label: {sure} of {len(judged)} samples"})

    def _query(self, strategy: QueryStrategy, random: np.random.Generator) -> None:
        judged = self.kept[~self._known()]
        if not len(judged):
            return
        budget = round(strategy.budget) if strategy.budget >= 1 else max(1, round(strategy.budget * len(judged)))
        if budget < len(judged):
            gains = 1.0 - scored(judged, self.student, "margin")
            wrong = min(budget - 1, round(strategy.teacher_error * budget))
            chosen = judged[draw_exactly(robust_probabilities(gains, budget, wrong), random)]
            self._keep(judged, chosen, "query")


def recommended_alpha(fraction: float) -> float:
    """Weight of the teacher's term when a random ``fraction`` of the data is kept: the less data, the more teacher.

    0.5 with all data, towards 1 with none. Direction: "Distilling the Knowledge in Data Pruning", Ben-Baruch et al.,
    2024; the straight line is ours.
    """
    return 1.0 - 0.5 * fraction


def scored(positions: Array, judge: Judge, score: str) -> Array:
    """How sure a model is of each sample, float64 (B,); sequences take the mean over their real tokens."""
    found = []
    for chunk in _chunks(positions):
        logits, mask = judge(chunk)
        two = torch.softmax(logits.float(), -1).topk(min(2, logits.shape[-1]), -1).values
        values = two[..., 0] - two[..., -1] if score == "margin" else two[..., 0]
        if score == "log-prob":
            values = values.log()
        if values.dim() == 2:
            keep = torch.ones_like(values) if mask is None else mask.to(values.dtype)
            values = (values * keep).sum(1) / keep.sum(1).clamp_min(1)
        found.append(values.double().numpy())
    return np.concatenate(found) if found else np.zeros(0)


def _chunks(positions: Array) -> list[Array]:
    return [positions[start : start + CHUNK] for start in range(0, len(positions), CHUNK)]
