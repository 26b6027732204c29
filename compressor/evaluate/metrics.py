"""The metric of each task: its name, its value, which way is better, and what else is worth telling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from compressor.evaluate import embeddings, multilabel, tokens, written
from compressor.evaluate.agreement import agreement, closeness, is_distribution, predicted_class
from compressor.types import MULTI_LABEL, TEXT2TEXT, Array, Task

PERPLEXITY = "perplexity"  # also the unit of its figures: smaller is better, and differences are ratios

NAMES: Mapping[Task, str] = {
    "image-classification": "accuracy",
    "text-classification": "accuracy",
    "multi-label-text-classification": "micro F1",
    "multi-label-image-classification": "micro F1",
    "sentence-embedding": "Spearman against teacher",
    "sentence-similarity": "Spearman against human scores",
    "retrieval": "nDCG@10",
    "causal-lm": PERPLEXITY,
    "text2text-generation": "word accuracy (1 - WER)",
    "translation": "BLEU",
    "summarization": "ROUGE-L",
    "generic": "agreement with the original",
}


def metric_name(task: Task, names: Sequence[str] = ()) -> str:
    """What :func:`score` measures, in words for a report. ``names`` are the class names."""
    if task == "token-classification":
        return "entity F1" if tokens.has_entities(names) else "token accuracy"
    return NAMES[task]


def unit_of(task: Task) -> str:
    """Unit of a figure of this task: ``1`` for shares and correlations, ``perplexity`` for language models."""
    return PERPLEXITY if task == "causal-lm" else "1"


def quality(value: float, unit: str) -> float:
    """The value as a number that grows with quality and whose differences a limit can be set on.

    Itself, but -log(perplexity), the mean log-likelihood of a token: a drop of 0.05 is a perplexity 5.1 % higher.
    """
    return -math.log(value) if unit == PERPLEXITY else value


def score(
    task: Task, outputs: Array, labels: Array | None, reference: Array | None = None, names: Sequence[str] = ()
) -> float:
    """The task's metric in 0..1 (Spearman: -1..1; perplexity: 1 and more, smaller is better).

    - Classification: share of argmax equal to the label; without labels, equal to the argmax of ``reference``.
    - Several labels: micro F1 at probability one half; ``labels`` 0 or 1 (N, C).
    - ``token-classification``: share of right tokens, or F1 of whole entities when ``names`` are BIO tags;
      ``outputs`` (N, T, C), ``labels`` (N, L) with -100 where nothing counts.
    - ``sentence-embedding``: Spearman's rank correlation between the pairwise cosine similarities of ``outputs`` and of
      ``reference`` over the set. ``sentence-similarity``: between cosines and human scores. ``retrieval``: nDCG@10.
    - ``causal-lm``: perplexity; ``outputs`` as :func:`predict` reduced them (N, 3).
    - ``text2text-generation``: 1 - word error rate of what was written, ``translation``: BLEU, ``summarization``: mean
      F1 of ROUGE-L; ``outputs`` as :func:`predict` made them (:mod:`compressor.evaluate.written`).
    - ``generic``: with integer labels, accuracy. Without, agreement with ``reference``: the share of equal argmax when
      the reference's rows are probability distributions (rank 2, non-negative, sum 1), otherwise 1 - relative error
      (:func:`closeness`), because the argmax of a picture or a code means nothing.

    ValueError when neither labels nor reference allow a score.
    """
    if task == "sentence-embedding":
        return embeddings.similarity_correlation(outputs, _needed(reference, task))
    if task == "causal-lm":
        return tokens.perplexity(outputs)
    if task in TEXT2TEXT:
        return written.value(task, outputs)
    if labels is not None:
        return _labelled(task, outputs, labels, names)
    if task not in ("image-classification", "text-classification", "generic"):
        raise ValueError(f"a score for {task} needs labels")
    reference = _needed(reference, task)
    if task == "generic" and not is_distribution(reference):
        return closeness(outputs, reference)
    return agreement(reference, outputs)


def _labelled(task: Task, outputs: Array, labels: Array, names: Sequence[str]) -> float:
    if task in MULTI_LABEL:
        return multilabel.micro_f1(outputs, labels)
    if task == "token-classification":
        if tokens.has_entities(names):
            return tokens.entity_f1(outputs, labels, names)
        return tokens.token_accuracy(outputs, labels)
    if task == "sentence-similarity":
        return embeddings.pair_correlation(outputs, labels)
    if task == "retrieval":
        return embeddings.ranking_gain(outputs, labels)
    return float(np.mean(predicted_class(outputs) == labels))


def _needed(reference: Array | None, task: Task) -> Array:
    if reference is None:
        raise ValueError(f"a score for {task} needs labels or the teacher's outputs")
    return reference


def further(task: Task, outputs: Array, labels: Array | None, reference: Array | None = None) -> Mapping[str, float]:
    """Other metrics of the same predictions, for the detail of a figure. ``reference``: the teacher's outputs."""
    if task in ("retrieval", "sentence-similarity"):
        more = {} if reference is None else {"spearman": embeddings.similarity_correlation(outputs, reference)}
        return {"dimensions": float(outputs.shape[1]), **more}
    if task == "causal-lm":
        count = float(outputs[:, 1].sum())
        return {"tokens": count, "next_token_accuracy": float(outputs[:, 2].sum()) / max(count, 1.0)}
    if task in TEXT2TEXT:
        return written.figures(task, outputs)
    if labels is None:
        return {}
    if task in MULTI_LABEL:
        return {
            "macro_f1": multilabel.macro_f1(outputs, labels),
            "mean_average_precision": multilabel.mean_average_precision(outputs, labels),
        }
    if task == "token-classification":
        return {
            "token_accuracy": tokens.token_accuracy(outputs, labels),
            "token_macro_f1": tokens.token_f1(outputs, labels),
        }
    return {}
