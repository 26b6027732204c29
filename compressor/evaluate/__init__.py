"""One function scores any callable: a torch module, an ONNX session, a device. numpy only.

A *run* takes model inputs by name and returns outputs by name. :func:`predict` feeds it an :class:`EvalSet`;
:func:`score` turns the predictions into the task's metric; :func:`loyalty` compares a student with its teacher.
"""

from compressor.evaluate.agreement import agreement, closeness, is_distribution, loyalty, paired_error
from compressor.evaluate.embeddings import pair_correlation, ranking_gain, regression_loyalty, similarity_correlation
from compressor.evaluate.loyal import class_loyalty, scalar_loyalty, value_loyalty
from compressor.evaluate.metrics import PERPLEXITY, further, metric_name, quality, score, unit_of
from compressor.evaluate.predict import Run, batch_size, predict
from compressor.evaluate.sets import (
    ArrayEvalSet,
    BatchSource,
    EvalSet,
    FirstSamples,
    SplitEvalSet,
    content_digest,
    fill_batch,
    fit_inputs,
    fixed_batch,
)

__all__ = [
    "PERPLEXITY",
    "ArrayEvalSet",
    "BatchSource",
    "EvalSet",
    "Run",
    "FirstSamples",
    "SplitEvalSet",
    "agreement",
    "batch_size",
    "class_loyalty",
    "closeness",
    "content_digest",
    "fill_batch",
    "fit_inputs",
    "fixed_batch",
    "further",
    "is_distribution",
    "loyalty",
    "metric_name",
    "pair_correlation",
    "paired_error",
    "predict",
    "quality",
    "ranking_gain",
    "regression_loyalty",
    "scalar_loyalty",
    "score",
    "similarity_correlation",
    "unit_of",
    "value_loyalty",
]
