"""Loyalty of a student to its teacher, by task (methods M1). numpy only."""

from __future__ import annotations

import numpy as np

from compressor.evaluate.agreement import loyalty
from compressor.evaluate.embeddings import regression_loyalty
from compressor.evaluate.tokens import IGNORED, aligned
from compressor.types import EMBEDDING, MULTI_LABEL, TEXT2TEXT, Array, Task

ONE_CLASS = frozenset({"image-classification", "text-classification"})


def class_loyalty(task: Task, teacher: Array, student: Array, labels: Array | None) -> tuple[float, float] | None:
    """Label and probability loyalty: of samples, of tagged tokens, or of each yes or no of several labels.

    Args:
        teacher, student: first outputs, (N, C), or (N, T, C) for tags.
        labels: for tags (N, L), -100 where a token has none.

    Returns:
        None for tasks without classes, and for outputs of other shapes.
    """
    if teacher.ndim < 2 or teacher.shape[-1] != student.shape[-1] or len(teacher) != len(student):
        return None
    if task == "token-classification" and teacher.ndim == student.ndim == 3 and labels is not None:
        width = min(teacher.shape[1], student.shape[1])
        keep = aligned(teacher[:, :width], labels) != IGNORED
        return loyalty(teacher[:, :width][keep], student[:, :width][keep]) if keep.any() else None
    if teacher.ndim != 2 or student.ndim != 2:
        return None
    if task in MULTI_LABEL:
        return loyalty(*(np.stack([np.zeros(z.size), z.astype(np.float64).ravel()], 1) for z in (teacher, student)))
    return loyalty(teacher, student) if task in ONE_CLASS and teacher.shape[1] > 1 else None


def value_loyalty(task: Task, teacher: Array, student: Array) -> float | None:
    """Regression loyalty: of the similarities of embeddings, of a language model's likelihoods of texts; else None."""
    if task in EMBEDDING:
        return regression_loyalty(teacher, student)
    if task != "causal-lm" and task not in TEXT2TEXT:
        return None
    known = teacher[:, 1] > 0
    theirs, mine = (rows[known, 0] / rows[known, 1] for rows in (teacher, student))
    return scalar_loyalty(theirs, mine) if known.any() else None


def scalar_loyalty(teacher: Array, student: Array) -> float:
    """1 - mean |y_S - y_T| / (max y_T - min y_T) of scalar answers (N,), cut to 0..1.

    Our definition: the paper that named the measure (methods M1) gives no formula.

    >>> scalar_loyalty(np.array([0.0, 1.0, 2.0]), np.array([0.0, 1.0, 1.0]))
    0.8333333333333334
    """
    span, gap = float(teacher.max() - teacher.min()), float(np.mean(np.abs(student - teacher)))
    return float(gap == 0) if span <= 0 else float(np.clip(1 - gap / span, 0, 1))
