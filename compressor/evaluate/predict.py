"""Feed a set to any callable and keep what its task needs of the outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from compressor.errors import RunError
from compressor.evaluate import written
from compressor.evaluate.sets import EvalSet, fill_batch, fit_inputs, fixed_batch
from compressor.evaluate.tokens import likelihoods
from compressor.types import TEXT2TEXT, Array, Inputs, Task, TensorSpec

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
    longest batch. Of encoder-decoder tasks the set's targets are scored, then written anew: one row of
    :mod:`compressor.evaluate.written` a sample.
    """
    if task in TEXT2TEXT:
        return _written(run, evalset, batch, output_name, specs)
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


def _written(run: Run, evalset: EvalSet, batch: int, output_name: str | None, specs: Sequence[TensorSpec]) -> Array:
    """Both passes over every batch: teacher-forced, and greedy through the same ``run``."""
    targets: written.Targets | None = getattr(evalset, "targets", None)
    if targets is None:
        raise RunError("an encoder-decoder model is judged by target texts, and the set has none")
    forced = predict(run, evalset, batch, output_name, specs, "causal-lm")
    static = fixed_batch(specs)

    def logits(inputs: Inputs) -> Array:
        outputs = run(fill_batch(fit_inputs(inputs, specs), static))
        name = output_name if output_name is not None else next(iter(outputs))
        count = len(next(iter(inputs.values())))
        return _per_sample(outputs[name], static or count, name)[:count]

    texts: list[str] = []
    for inputs, _ in evalset.batches(static or batch):
        sources = {name: array for name, array in inputs.items() if name not in written.DECODER}
        texts += [targets.decode(ids) for ids in written.write(logits, sources, targets)]
    return np.concatenate([forced, written.judge(texts, targets.references)], axis=1)


LANGUAGE_VALUES = 8 * 128 * 49152  # logits at a time: 192 MiB of float32


def batch_size(task: Task, classes: int | str, most: int) -> int:
    """Samples at a time: ``most``, but fewer of models whose outputs are as wide as a vocabulary of ``classes``."""
    if task != "causal-lm" and task not in TEXT2TEXT:
        return most
    width = classes if isinstance(classes, int) else 49152
    return max(8, min(most, LANGUAGE_VALUES // (128 * width)))


def _per_sample(output: Array, count: int, name: str) -> Array:
    output = np.asarray(output, dtype=np.float32)
    if output.ndim == 0 or output.shape[0] != count:
        raise RunError(f"output `{name}` is {output.shape} for {count} samples: its first dimension is not the batch")
    return output


def _one_length(rows: list[Array]) -> list[Array]:
    longest = max(part.shape[1] for part in rows)
    return [np.pad(part, [(0, 0), (0, longest - part.shape[1]), (0, 0)]) for part in rows]
