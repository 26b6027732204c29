"""An ONNX file as a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressor.errors import StageError
from compressor.types import Array, Inputs


class OnnxTap:
    """An ONNX file as a teacher: its first output is ``logits``. Static batch sizes are filled up and cut again."""

    def __init__(self, path: Path, inputs: Sequence[Any]) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises a dozen unrelated types
            raise StageError(f"the teacher `{path}` cannot be run: {error}", hint="Check the file.") from error
        self._specs = {spec.name: spec for spec in inputs}
        first = next(iter(inputs)).shape[0]
        self._static = first if isinstance(first, int) else None

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        arrays = {name: inputs[name].cpu().numpy().astype(spec.dtype) for name, spec in self._specs.items()}
        count = len(next(iter(arrays.values())))
        size = self._static or count
        rows = [self._run({n: a[at : at + size] for n, a in arrays.items()}, size) for at in range(0, count, size)]
        logits = np.concatenate(rows)[:count].astype(np.float32)
        return {"logits": torch.from_numpy(logits).to(next(iter(inputs.values())).device)}

    def _run(self, arrays: Inputs, size: int) -> Array:
        missing = size - len(next(iter(arrays.values())))
        full = {name: np.concatenate([array, array[-1:].repeat(missing, 0)]) for name, array in arrays.items()}
        found: Array = self._session.run(None, full)[0]
        return found
