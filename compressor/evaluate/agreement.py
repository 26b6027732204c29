"""How far two sets of predictions agree: argmax, closeness, and loyalty of a student to its teacher. numpy only."""

from __future__ import annotations

import numpy as np

from compressor.types import Array

PROBABILITY_TOLERANCE = 1e-2  # a row of a softmax output sums to 1 within this, int8 softmax (step 1/256) included


def predicted_class(outputs: Array) -> Array:
    """Predicted class; a single output is the logit of class 1 (its probability, when the values stay within 0..1)."""
    flat = outputs.reshape(len(outputs), -1)
    if flat.shape[1] == 1:
        return np.asarray(flat[:, 0] > (0.5 if flat.min() >= 0 and flat.max() <= 1 else 0), dtype=np.int64)
    return np.asarray(np.argmax(flat, axis=1))


def is_distribution(outputs: Array) -> bool:
    """Are the rows of a rank 2 output probabilities: non-negative, sum 1?"""
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        return False
    return bool(outputs.min() >= 0 and np.allclose(outputs.sum(axis=1), 1, atol=PROBABILITY_TOLERANCE))


def agreement(reference: Array, outputs: Array) -> float:
    """Share of samples whose argmax is that of ``reference``; both (N, C)."""
    return float(np.mean(predicted_class(reference) == predicted_class(outputs)))


def paired_error(reference: Array, outputs: Array, labels: Array) -> float | None:
    """Standard error of the difference of two models' accuracies on the same samples; None for fewer than two.

    Samples that both get right, or both wrong, add nothing: it is smaller than that of independent proportions
    (the paired proportions of McNemar, 1947). ``reference``, ``outputs``: (N, C); ``labels``: (N,).

    >>> right, wrong = np.array([[0.0, 1.0]] * 4), np.array([[0.0, 1.0]] * 3 + [[1.0, 0.0]])
    >>> paired_error(right, wrong, np.ones(4))
    0.25
    """
    if len(labels) < 2:
        return None
    first, second = (predicted_class(array) == labels for array in (reference, outputs))
    gaps = first.astype(np.float64) - second
    return float(gaps.std(ddof=1) / np.sqrt(len(gaps)))


def closeness(outputs: Array, reference: Array) -> float:
    """Mean over samples of 1 - ||output - reference|| / ||reference||, each sample's value cut to 0..1."""
    flat, wanted = (array.reshape(len(array), -1).astype(np.float64) for array in (outputs, reference))
    error, size = np.linalg.norm(flat - wanted, axis=1), np.linalg.norm(wanted, axis=1)
    relative = np.divide(error, size, out=np.where(error > 0, np.inf, 0.0), where=size > 0)
    return float(np.mean(np.clip(1 - relative, 0, 1)))


def loyalty(teacher_logits: Array, student_logits: Array) -> tuple[float, float]:
    """Label and probability loyalty of (N, C) logits (or probabilities, which are taken as they are), temperature 1.

    Label: share of equal argmax. Probability: mean over samples of 1 - sqrt(JS(p, q)), with the Jensen-Shannon
    divergence in natural logarithms ("Beyond Preserved Accuracy", Xu et al., EMNLP 2021).
    """
    teacher, student = (
        _probabilities(np.asarray(logits, dtype=np.float64)) for logits in (teacher_logits, student_logits)
    )
    middle = (teacher + student) / 2
    divergence = (_kl(teacher, middle) + _kl(student, middle)) / 2
    return agreement(teacher_logits, student_logits), float(np.mean(1 - np.sqrt(np.maximum(divergence, 0))))


def _probabilities(logits: Array) -> Array:
    if is_distribution(logits):
        return np.asarray(logits / logits.sum(axis=1, keepdims=True))
    raised: Array = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True))


def _kl(first: Array, second: Array) -> Array:
    """Per row; a zero probability contributes nothing (x log x -> 0)."""
    ratio = np.divide(first, second, out=np.ones_like(first), where=first > 0)
    return np.asarray(np.sum(first * np.log(ratio), axis=1))
