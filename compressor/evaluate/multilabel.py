"""Metrics of several labels a sample: F1 and mean average precision. numpy only, equal to torchmetrics (tested)."""

from __future__ import annotations

import numpy as np

from compressor.types import Array


def chosen(outputs: Array) -> Array:
    """bool (N, C): probability at least one half. Values that all lie in 0..1 are probabilities, others logits."""
    inside = outputs.size > 0 and outputs.min() >= 0 and outputs.max() <= 1
    return np.asarray(outputs > (0.5 if inside else 0.0))


def known(outputs: Array, labels: Array) -> tuple[Array, Array]:
    """The rows that have labels (a row of -100 has none)."""
    keep = labels[:, 0] >= 0
    return outputs[keep], labels[keep] > 0.5


def micro_f1(outputs: Array, labels: Array) -> float:
    """2 TP / (2 TP + FP + FN) over all labels of all samples; 0 where nothing is right or wrong."""
    right, wrong = _counts(*known(outputs, labels))
    total = 2 * right.sum() + wrong.sum()
    return float(2 * right.sum() / total) if total else 0.0


def macro_f1(outputs: Array, labels: Array) -> float:
    """The F1 of each label, averaged over the labels that are true or predicted at least once."""
    right, wrong = _counts(*known(outputs, labels))
    seen = right + wrong > 0
    return float(np.mean(2 * right[seen] / (2 * right[seen] + wrong[seen]))) if seen.any() else 0.0


def _counts(outputs: Array, labels: Array) -> tuple[Array, Array]:
    guess = chosen(outputs)
    return (guess & labels).sum(axis=0), (guess ^ labels).sum(axis=0)


def mean_average_precision(outputs: Array, labels: Array) -> float:
    """Area under the precision-recall steps of each label, averaged over the labels that are true at least once.

    AP = sum over thresholds of (recall step) * precision; equal scores share one threshold.
    """
    outputs, labels = known(outputs, labels)
    found = [_average_precision(outputs[:, c], labels[:, c]) for c in range(labels.shape[1]) if labels[:, c].any()]
    return float(np.mean(found)) if found else 0.0


def _average_precision(scores: Array, labels: Array) -> float:
    order = np.argsort(-scores, kind="stable")
    hits, scores = np.cumsum(labels[order]), scores[order]
    last = np.append(scores[1:] != scores[:-1], True)  # the last of each run of equal scores
    recall, precision = hits[last] / hits[-1], hits[last] / (np.flatnonzero(last) + 1)
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))
