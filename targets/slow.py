"""Answers of a simulator batch by batch: a killed run goes on where it was, and a long one says how far it is."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, MutableMapping

import numpy as np

from compressor.evaluate import Run
from compressor.types import Array, Inputs

STEPS = 8  # how often a whole set is told of


class KeptBatches:
    """A ``run`` that keeps its answer to every batch in ``cache`` until the whole set is known.

    Args:
        run: inputs by name to outputs by name.
        cache: outputs by key, which outlives the process.
        key: of the whole set's predictions; the batches must come in the same order and size under the same key.
        output: the one output that is kept and given back.
        samples: of the whole set.
        told: called about :data:`STEPS` times with the number of samples that are done.
    """

    def __init__(
        self,
        run: Run,
        cache: MutableMapping[str, Array],
        key: str,
        output: str,
        samples: int,
        told: Callable[[int], None],
    ) -> None:
        self._run, self._cache, self._key, self._output = run, cache, key, output
        self._samples, self._told = samples, told
        self._batches = self._done = 0

    def __call__(self, inputs: Inputs) -> Mapping[str, Array]:
        part = self._part(self._batches)
        found = self._cache.get(part)
        if found is None:
            outputs = self._run(inputs)
            if self._output not in outputs:
                return outputs  # the caller says what is missing
            found = self._cache[part] = np.asarray(outputs[self._output], dtype=np.float32)
        self._batches += 1
        before, self._done = self._done, min(self._done + len(next(iter(inputs.values()))), self._samples)
        if self._done < self._samples and before * STEPS // self._samples != self._done * STEPS // self._samples:
            self._told(self._done)
        return {self._output: found}

    def forget(self) -> None:
        """The set is known as a whole: remove its parts."""
        for number in range(self._batches):
            with contextlib.suppress(KeyError, OSError):
                del self._cache[self._part(number)]

    def _part(self, number: int) -> str:
        return json.dumps([self._key, "batch", number])
