"""Metrics over tokens: accuracy, entity F1, perplexity. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from compressor.errors import RunError
from compressor.types import Array

IGNORED = -100  # label of a position that does not count: padding, special tokens, later pieces of a word
BLOCK_VALUES = 2**24  # logits that are turned into log-probabilities at a time: 128 MB of float64


def aligned(outputs: Array, labels: Array) -> Array:
    """``labels`` (N, L) at the width of ``outputs`` (N, T, ...); labels beyond it are refused."""
    width = outputs.shape[1]
    if labels.shape[1] < width:
        return np.pad(labels, [(0, 0), (0, width - labels.shape[1])], constant_values=IGNORED)
    if (labels[:, width:] != IGNORED).any():
        raise RunError(f"the model gives {width} positions, but there are labels for {labels.shape[1]}")
    return labels[:, :width]


def token_accuracy(outputs: Array, labels: Array) -> float:
    """Share of labelled tokens whose argmax is right. ``outputs`` (N, T, C), ``labels`` (N, L) with -100 elsewhere."""
    labels = aligned(outputs, labels)
    keep = labels != IGNORED
    return float(np.mean(np.argmax(outputs, axis=2)[keep] == labels[keep])) if keep.any() else 0.0


def token_f1(outputs: Array, labels: Array) -> float:
    """F1 of each class over the labelled tokens, averaged over the classes that are true or predicted (macro)."""
    labels = aligned(outputs, labels)
    keep = labels != IGNORED
    guess, truth = np.argmax(outputs, axis=2)[keep], labels[keep]
    size = outputs.shape[2]
    right = np.bincount(truth[guess == truth], minlength=size)
    seen = np.bincount(truth, minlength=size) + np.bincount(guess, minlength=size)
    return float(np.mean(2 * right[seen > 0] / seen[seen > 0])) if seen.any() else 0.0


def has_entities(names: Sequence[str]) -> bool:
    """Are the class names BIO tags?"""
    tagged = {name[:2] for name in names if name != "O"}
    return "B-" in tagged and tagged <= {"B-", "I-"}


def entity_f1(outputs: Array, labels: Array, names: Sequence[str]) -> float:
    """F1 over whole entities of BIO tags: type, first and last word must all be right (CoNLL's evaluation, 2000).

    An ``I-`` that does not continue an entity of its type begins one.
    """
    labels = aligned(outputs, labels)
    right = wanted = found = 0
    for guess, truth in zip(np.argmax(outputs, axis=2), labels, strict=True):
        keep = truth != IGNORED
        mine, theirs = (set(entities([names[tag] for tag in tags[keep]])) for tags in (guess, truth))
        right, wanted, found = right + len(mine & theirs), wanted + len(theirs), found + len(mine)
    return 2 * right / (wanted + found) if wanted + found else 0.0


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Type, first and last (exclusive) word of each entity.

    >>> entities(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"])
    [('PER', 0, 2), ('LOC', 3, 4), ('LOC', 4, 5)]
    """
    padded = ["O", *tags, "O"]
    starts = [i for i, (before, tag) in enumerate(pairwise(padded)) if tag != "O" and _begins(before, tag)]
    found = []
    for start in starts:
        end = start + 1
        while end < len(tags) and tags[end] == f"I-{tags[start][2:]}":
            end += 1
        found.append((tags[start][2:], start, end))
    return found


def _begins(before: str, tag: str) -> bool:
    return tag.startswith("B-") or before[2:] != tag[2:]


def likelihoods(logits: Array, labels: Array | None) -> Array:
    """A language model's outputs as float64 (N, 3): negative log-likelihood in nats, tokens, right guesses.

    ``logits`` (N, T, V): position t speaks of ``labels[:, t]``, -100 where nothing is asked.
    """
    if labels is None:
        raise RunError("a language model is judged by the next token of its text, and there is none")
    labels = aligned(logits, labels)
    step = max(1, BLOCK_VALUES // int(np.prod(logits.shape[1:])))
    parts = [_likelihoods(logits[at : at + step], labels[at : at + step]) for at in range(0, len(logits), step)]
    return np.concatenate(parts)


def _likelihoods(logits: Array, labels: Array) -> Array:
    keep = labels != IGNORED
    values = logits.astype(np.float64)
    top = values.max(axis=2, keepdims=True)
    total = np.log(np.exp(values - top).sum(axis=2)) + top[..., 0]
    own = np.take_along_axis(values, np.where(keep, labels, 0)[..., None], axis=2)[..., 0]
    right = (np.argmax(logits, axis=2) == labels) & keep
    return np.stack([np.where(keep, total - own, 0).sum(axis=1), keep.sum(axis=1), right.sum(axis=1)], axis=1)


def perplexity(rows: Array) -> float:
    """exp of the mean negative log-likelihood over all tokens, from the rows of :func:`likelihoods`."""
    tokens = float(rows[:, 1].sum())
    if not tokens:
        raise ValueError("there is no token to predict")
    return float(np.exp(np.asarray(rows[:, 0], dtype=np.float64).sum() / tokens))
