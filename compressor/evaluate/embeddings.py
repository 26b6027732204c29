"""Metrics of sentence embeddings: rank correlation of similarities, and ranking of passages. numpy only."""

from __future__ import annotations

import zlib

import numpy as np

from compressor.types import Array

PAIR_CAP = 200_000  # pairs of the similarity matrix that the rank correlation looks at: 1.6 MB of float64
RANKED = 10  # nDCG@10, as the BEIR benchmark reports it
BLOCK = 1024  # queries that are ranked at a time


def similarity_correlation(outputs: Array, reference: Array, cap: int = PAIR_CAP) -> float:
    """Spearman's rank correlation of the pairwise cosine similarities of two sets of N embeddings (widths may differ).

    All N (N - 1) / 2 pairs, or ``cap`` of them drawn with a fixed seed that depends on N only: the same pairs for every
    model, so that scores compare. Ties get their mean rank. 1.0 when both are constant and equal.
    """
    first, second = _pairs(len(outputs), cap)
    mine, theirs = (
        _ranks(_cosines(np.asarray(array, dtype=np.float64), first, second)) for array in (outputs, reference)
    )
    return _correlation(mine, theirs)


def _correlation(mine: Array, theirs: Array) -> float:
    mine, theirs = mine - mine.mean(), theirs - theirs.mean()
    size = np.sqrt(np.sum(mine**2) * np.sum(theirs**2))
    return float(np.sum(mine * theirs) / size) if size > 0 else float(np.array_equal(mine, theirs))


def _pairs(count: int, cap: int) -> tuple[Array, Array]:
    if count < 2:
        raise ValueError("a correlation of similarities needs at least two samples")
    if count * (count - 1) // 2 <= cap:
        first, second = np.triu_indices(count, k=1)
        return first, second
    random = np.random.Generator(np.random.PCG64(zlib.crc32(f"pairs-{count}".encode())))
    first = random.integers(0, count, cap)
    return first, (first + random.integers(1, count, cap)) % count  # never a sample with itself


def _cosines(embeddings: Array, first: Array, second: Array) -> Array:
    unit = _unit(embeddings)
    step = max(1, 4_000_000 // unit.shape[1])  # pairs at a time: two blocks of 32 MB
    parts = [
        np.einsum("ij,ij->i", unit[first[at : at + step]], unit[second[at : at + step]])
        for at in range(0, len(first), step)
    ]
    return np.concatenate(parts)


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse], dtype=np.float64)


def pair_correlation(outputs: Array, judgements: Array) -> float:
    """Spearman's rank correlation between the cosine of both texts of a pair and its human score (STS).

    ``outputs`` (M, D): one row a text. ``judgements`` float (M, 2): number of the pair, score of the pair; the texts of
    a pair are neighbours. Raises ValueError with fewer than two pairs.
    """
    first = np.arange(0, len(outputs), 2)
    if len(first) < 2:
        raise ValueError("a correlation with human scores needs at least two pairs")
    cosines = _cosines(np.asarray(outputs, dtype=np.float64), first, first + 1)
    return _correlation(_ranks(cosines), _ranks(np.asarray(judgements[first, 1], dtype=np.float64)))


def ranking_gain(outputs: Array, judgements: Array, at: int = RANKED) -> float:
    """Mean nDCG@``at`` over the queries: :func:`ranking_gains`."""
    return float(ranking_gains(outputs, judgements, at).mean())


def ranking_gains(outputs: Array, judgements: Array, at: int = RANKED) -> Array:
    """nDCG@``at`` of each query (Q,), all passages of the set being the corpus.

    ``outputs`` (M, D) by cosine. ``judgements`` int (M, 2): number of the query (equal texts have equal numbers) and 0
    for a query, number of the query it answers (-1: none) and 1 + number of the passage for a passage. A passage is
    relevant (gain 1) to the queries that a row of it answers; a query that nothing answers does not count. DCG with
    log2(rank + 1) (Jarvelin and Kekalainen, 2002); ties keep the order of the passages. Raises ValueError without
    queries.
    """
    ask, answer = np.flatnonzero(judgements[:, 1] == 0), np.flatnonzero(judgements[:, 1] > 0)
    queries, first_query = np.unique(judgements[ask, 0], return_index=True)
    passages, first_passage = np.unique(judgements[answer, 1], return_index=True)
    answered = np.isin(queries, judgements[answer, 0])
    queries, first_query = queries[answered], first_query[answered]
    if not len(queries):
        raise ValueError("there are no queries to rank passages for")
    unit = _unit(np.asarray(outputs, dtype=np.float64))
    asked, corpus = unit[ask[first_query]], unit[answer[first_passage]]
    answer = answer[np.isin(judgements[answer, 0], queries)]
    rows = np.searchsorted(queries, judgements[answer, 0])
    columns = np.searchsorted(passages, judgements[answer, 1])
    found = []
    for start in range(0, len(queries), BLOCK):
        here = (rows >= start) & (rows < start + BLOCK)
        relevant = np.zeros((min(BLOCK, len(queries) - start), len(passages)), dtype=bool)
        relevant[rows[here] - start, columns[here]] = True
        found.append(_gains(asked[start : start + BLOCK] @ corpus.T, relevant, at))
    return np.concatenate(found)


def _gains(scores: Array, relevant: Array, at: int) -> Array:
    """nDCG of each row."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :at]
    discounts = 1 / np.log2(np.arange(2, order.shape[1] + 2))
    found = np.take_along_axis(relevant, order, axis=1) @ discounts
    ideal = np.concatenate([[0.0], np.cumsum(discounts)])[np.minimum(relevant.sum(axis=1), order.shape[1])]
    return np.asarray(found / ideal)


def _unit(embeddings: Array) -> Array:
    length = np.linalg.norm(embeddings, axis=1, keepdims=True)
    found: Array = np.divide(embeddings, length, out=np.zeros_like(embeddings), where=length > 0)
    return found


def regression_loyalty(reference: Array, outputs: Array, cap: int = PAIR_CAP) -> float:
    """How near the student's scalar answers are to the teacher's, 0..1; the answers are cosine similarities of pairs.

    1 - mean |y_S - y_T| / (max y_T - min y_T), cut to 0..1. This is our definition: the paper that named the measure
    (methods M1) gives no formula. ``reference`` and ``outputs`` are (N, D), widths may differ.
    """
    first, second = _pairs(len(outputs), cap)
    theirs, mine = (_cosines(np.asarray(array, dtype=np.float64), first, second) for array in (reference, outputs))
    span, gap = float(theirs.max() - theirs.min()), float(np.mean(np.abs(mine - theirs)))
    if span <= 0:
        return float(gap == 0)
    return float(np.clip(1 - gap / span, 0, 1))
