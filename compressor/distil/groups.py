"""Batches of whole groups: a query, its right passage and wrong ones, drawn from the data or mined with the teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.data.pairs import Groups
from compressor.distil.objectives.base import Batch, Step, Term
from compressor.distil.objectives.embedding import AdditiveMargin
from compressor.distil.stream import POOL_BATCHES, TrainingSet
from compressor.errors import StageError
from compressor.strategy import Negatives
from compressor.types import Array

if TYPE_CHECKING:
    from compressor.distil.strategies.draws import Draw

_PAIRS = AdditiveMargin()
CHUNK = 512  # queries whose passages are ranked at a time
Embed = Callable[[Array], Tensor]  # positions -> vectors (B, d)


class GroupOrder:
    """The batches of every epoch of a set with groups; a sample outside of all groups is a group of its own.

    ``negatives``: how many wrong passages a group has in a batch, drawn anew every epoch from ``pool``; None takes all
    that the data have.
    """

    def __init__(self, data: TrainingSet, groups: Groups, negatives: int | None = None, pool: Sequence[Array] = ()):
        self._lengths = data.lengths if data.lengths is not None else np.ones(len(data), np.int64)
        self._groups, self._count = groups, negatives
        self._pool = pool or [groups.of(number)[2:] for number in range(len(groups))]
        self._alone = np.setdiff1d(np.arange(len(data)), groups.members)
        self.scores = None if groups.scores is None else torch.from_numpy(groups.scores)

    def order(self, epoch: int, batch: int, seed: int) -> list[tuple[Array, Array]]:
        """Positions and group numbers of each batch; the same for the same arguments, as many in every epoch.

        A batch holds about ``batch`` samples, and groups of like length, as far as a random part of the data allows.
        """
        random = np.random.Generator(np.random.PCG64([seed, epoch]))
        units = [self._drawn(number, random) for number in range(len(self._groups))]
        units += [np.array([position]) for position in self._alone]
        rows = sum(map(len, units))
        count = max(1, min(len(units) // 2, -(-rows // batch)))
        shuffled = random.permutation(len(units))
        longest = np.array([self._lengths[unit].max() for unit in units])
        pool = POOL_BATCHES * max(1, len(units) // count)
        ordered = [
            part[np.argsort(longest[part], kind="stable")]
            for part in (shuffled[start : start + pool] for start in range(0, len(shuffled), pool))
        ]
        batches = np.array_split(np.concatenate(ordered), count)
        return [_together([units[unit] for unit in batches[at]]) for at in random.permutation(count)]

    def _drawn(self, number: int, random: np.random.Generator) -> Array:
        wrong = self._pool[number]
        if self._count is not None:
            wrong = random.permutation(wrong)[: self._count]
        return np.concatenate([self._groups.of(number)[:2], wrong]).astype(np.int64)


def _together(units: Sequence[Array]) -> tuple[Array, Array]:
    return np.concatenate(units), np.repeat(np.arange(len(units)), [len(unit) for unit in units])


def grouped(batch: Batch, draw: Draw, order: GroupOrder | None) -> Batch:
    """The batch with the groups of its samples, and what the data say of each."""
    if draw.groups is None or order is None:
        return batch
    device = batch.mask.device if batch.mask is not None else "cpu"
    scores = None if order.scores is None else order.scores[torch.from_numpy(draw.positions)].to(device)
    return replace(batch, groups=torch.from_numpy(draw.groups).to(device), scores=scores)


def pair_term(embeddings: Tensor, batch: Batch, step: Step) -> Term:
    """What the labels of pairs teach without a teacher: `additive-margin` with its defaults."""
    return _PAIRS({"logits": embeddings}, {}, batch, step)


def candidates(groups: Groups, config: Negatives, embed: Embed | None, seed: int) -> list[Array]:
    """The wrong passages that each group draws from: those of the data, else passages of other queries.

    ``embed`` ranks all passages for each query by cosine, and the first ``config.pool`` that do not answer it are taken
    (hard negatives). None takes them at random, as the null twin does, which never asks the teacher.
    """
    found = [groups.of(number)[2:] for number in range(len(groups))]
    bare = np.array([number for number, wrong in enumerate(found) if not len(wrong)], np.int64)
    if not len(bare):
        return found
    queries, right = groups.members[groups.starts[:-1]], groups.members[groups.starts[:-1] + 1]
    passages = np.unique(right)
    if len(passages) < 2:
        raise StageError("there is one passage only, so none is wrong", hint="Leave `negatives` out.")
    random = np.random.Generator(np.random.PCG64(seed))
    for chunk in np.array_split(bare, -(-len(bare) // CHUNK)):
        near = _nearest(queries[chunk], passages, config.pool + 8, embed, random)
        for number, order in zip(chunk, near, strict=True):
            wrong = order[~np.isin(order, right[queries == queries[number]])]
            found[number] = wrong[: config.pool]
    return found


def _nearest(
    queries: Array, passages: Array, count: int, embed: Embed | None, random: np.random.Generator
) -> list[Array]:
    """The first ``count`` passages for each query."""
    if embed is None:
        return [passages[random.permutation(len(passages))[:count]] for _ in queries]
    asked, corpus = (F.normalize(embed(positions).float(), dim=-1) for positions in (queries, passages))
    best: Array = (asked @ corpus.T).topk(min(count, len(passages)), dim=1).indices.numpy()
    return [passages[row] for row in best]
