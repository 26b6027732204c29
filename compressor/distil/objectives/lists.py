"""Lists of scores: from rows of a batch to one line a query, whoever made the scores. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.distil.objectives.base import Batch
from compressor.errors import StageError

Compare = Literal["score", "dot", "cosine"]


@dataclass(frozen=True)
class Lists:
    """Scores (Q, n) of the items of each list and which of them exist; the first is the positive where there is one."""

    scores: Tensor
    keep: Tensor


def padded(rows: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (B, ...) of each group as one line: (Q, n, ...), and ``keep`` (Q, n), false where a group is shorter.

    >>> padded(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([7, 7, 9]))
    (tensor([[1., 2.],
            [3., 0.]]), tensor([[ True,  True],
            [ True, False]]))
    """
    _, line, sizes = groups.unique(return_inverse=True, return_counts=True)
    order = line.argsort(stable=True)
    place = torch.arange(len(line), device=line.device) - (sizes.cumsum(0) - sizes)[line[order]]
    shape = (len(sizes), int(sizes.max()))
    found = rows.new_zeros((*shape, *rows.shape[1:]))
    keep = torch.zeros(shape, dtype=torch.bool, device=rows.device)
    keep[line[order], place] = True
    return found.index_put((line[order], place), rows[order]), keep


def lists_of(signal: Tensor, batch: Batch, compare: Compare, name: str) -> Lists:
    """The lists of a model's output.

    ``score``: each row of (Q, n) is a list; with ``batch.groups`` each row (B,) or (B, 1) is one item of its group.
    ``dot``, ``cosine``: rows (B, d) are embeddings; the first of a group is the query, the others are its items.

    Raises:
        StageError: the output has another shape, or groups are missing.
    """
    if compare == "score":
        return _of_scores(signal.float(), batch, name)
    if batch.groups is None or signal.dim() != 2:
        raise StageError(
            f"{name}: embeddings {tuple(signal.shape)} cannot be compared without groups of query and documents",
            hint='The data must come as groups; score pairs or lists with `"score"`.',
        )
    vectors, keep = padded(signal.float(), batch.groups)
    if compare == "cosine":
        vectors = F.normalize(vectors, dim=-1)
    return Lists((vectors[:, 1:] * vectors[:, :1]).sum(-1), keep[:, 1:])


def offline(batch: Batch, student: Compare, name: str) -> Lists:
    """Lists of the scores that came with the data, without the query's row where the student compares embeddings."""
    if batch.scores is None or batch.groups is None:
        raise StageError(f"{name}: the data has no offline scores", hint='Use `teacher = "score"` with a teacher.')
    return without_query(Lists(*padded(batch.scores.float(), batch.groups)), student)


def without_query(lists: Lists, student: Compare) -> Lists:
    """One score a row speaks of the query's row too, which an embedding model does not score."""
    if student == "score":
        return lists
    return Lists(lists.scores[:, 1:], lists.keep[:, 1:])


def _of_scores(signal: Tensor, batch: Batch, name: str) -> Lists:
    if batch.groups is None and signal.dim() == 2:
        return Lists(signal, torch.ones_like(signal, dtype=torch.bool))
    if batch.groups is not None and (signal.dim() == 1 or signal.shape[1:] == (1,)):
        return Lists(*padded(signal.reshape(-1), batch.groups))
    raise StageError(
        f"{name}: an output {tuple(signal.shape)} is not a list of scores",
        hint="Give one score a row with groups, or lists (queries, items) without groups.",
    )
