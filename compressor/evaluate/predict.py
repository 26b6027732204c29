"""Feed a set to any callable and keep what its task needs of the outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from compressor.errors import RunError
from compressor.evaluate.sets import EvalSet, fill_batch, fit_inputs, fixed_batch
from compressor.evaluate.tokens import likelihoods
from compressor.types import Array, Inputs, Task, TensorSpec

Run = Callable[[Inputs], Mapping[str, Array]]


def predict(
    run: Run,
    evalset: EvalSet,
    batch: int,
    output_name: str | None = None,
    specs: Sequence[TensorSpec] = (),
    task: Task | None = None,
) -> Array:
    """The model's output for every sample, float32 (N, ...): (N, C) logits or (N, D) embeddings.

    ``specs`` are the model's declared inputs: with a static batch dimension the last batch is filled by repeating its
    last sample, and the surplus rows are cut off again. ``output_name`` defaults to the first output. By ``task``:
    outputs of ``causal-lm`` (N, T, V) are reduced batch by batch to the rows of
    :func:`compressor.evaluate.tokens.likelihoods`; those of ``token-classification`` are padded with zeros to the
    longest batch.
    """
    static = fixed_batch(specs)
    rows: list[Array] = []
    for inputs, labels in evalset.batches(static or batch):
        count = len(next(iter(inputs.values())))
        outputs = run(fill_batch(fit_inputs(inputs, specs), static))
        name = output_name if output_name is not None else next(iter(outputs))
        if name not in outputs:
            raise RunError(f"the model has no output `{name}`, only {', '.join(outputs)}")
        made = _per_sample(outputs[name], static or count, name)[:count]
        rows.append(likelihoods(made, labels) if task == "causal-lm" else made)
    if not rows:
        raise RunError("there is nothing to evaluate: the set is empty")
    return np.concatenate(_one_length(rows) if task == "token-classification" else rows)


def _per_sample(output: Array, count: int, name: str) -> Array:
    output = np.asarray(output, dtype=np.float32)
    if output.ndim == 0 or output.shape[0] != count:
        raise RunError(f"output `{name}` is {output.shape} for {count} samples: its first dimension is not the batch")
    return output


def _one_length(rows: list[Array]) -> list[Array]:
    longest = max(part.shape[1] for part in rows)
    return [np.pad(part, [(0, 0), (0, longest - part.shape[1]), (0, 0)]) for part in rows]
