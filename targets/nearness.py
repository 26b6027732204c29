"""A compiled file beside ONNX Runtime on the ONNX file it came from: what the compiler changed, not the quantizer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from compressor.errors import CompressError
from compressor.evaluate import EvalSet, agreement
from compressor.types import Array, Format
from targets.outcome import Nearness
from targets.site import STAND_IN, stand_in
from targets.trial import Deployment, Trial, predictions, site_of


def nearness(run: Deployment, trial: Trial, evalset: EvalSet, outputs: Array, *, classes: bool) -> Nearness | None:
    """``outputs`` are the compiled file's on ``evalset``. None where ONNX Runtime on this machine made them itself, and
    where it cannot run the file (fp8, a format of the target's own); its predictions are those of the shared cache.
    """
    site, other = site_of(run, trial), stand_in()
    if site is None or other is None or site.stand_in or trial.artifact.format is not Format.ONNX:
        return None
    runtime, _ = run.backend.resolve(trial.artifact, run.profile)
    if site.key == other.key or (runtime == STAND_IN and run.backend.name != STAND_IN):
        return None
    try:
        reference = predictions(replace(run, site=other), trial, evalset)
    except CompressError:
        return None
    if reference.shape != outputs.shape or reference.dtype.kind != "f" or not reference.size:
        return None
    worst = float(np.abs(outputs.astype(np.float64) - reference).max())
    same = agreement(reference, outputs) if classes else None
    return Nearness(worst, float(np.abs(reference).max()), len(evalset), same)
