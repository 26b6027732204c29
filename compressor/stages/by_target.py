"""The candidate that the target's own compiler quantizes: the float student with calibration samples beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from compressor.ledger import StageOutput, code_digest
from compressor.recipe import QuantizeStage
from compressor.stages.mixed import calibration_of
from compressor.stages.run import MODEL_FILE, Run
from compressor.types import Array, Artifact, Format, file_digest

NAME = "int8-by-target"
SAMPLES_FILE = "calibration.npz"


def by_target(run: Run, student: Artifact, stage: QuantizeStage) -> Artifact:
    """The same weights as ``student``; the file says in its metadata what it is for, so that its digest is its own.

    ``scheme``: ``engine`` is "target", ``calibration file`` names the ``.npz`` beside the model (an array for each
    input, samples first, shorter sequences filled up with zeros).
    """
    key = {
        "source": student.digest,
        "calibration": run.data.digests["calibration"],
        "samples": stage.samples,
        "code": code_digest("stages/by_target"),
    }
    result = run.ledger.stage(f"quantize-{NAME}", key, lambda folder: _write(run, student, stage, folder))
    path = result.folder / MODEL_FILE
    record = str(result.metrics["calibrated on"])
    scheme = {"engine": "target", "calibration": "the target's own", "calibration file": SAMPLES_FILE}
    return Artifact(
        f"student/{NAME}", "student", path, Format.ONNX, "int8-static", student.inputs, student.outputs,
        file_digest(path), student.parameters, {**scheme, "calibrated on": record}, result.facts,
    )  # fmt: skip


def _write(run: Run, student: Artifact, stage: QuantizeStage, folder: Path) -> StageOutput:
    import onnx

    model = onnx.load(str(student.path))
    entry = model.metadata_props.add()
    entry.key, entry.value = "quantize", f"by the target's compiler, calibrated on {run.data.digests['calibration']}"
    onnx.save(model, str(folder / MODEL_FILE))
    calibration, record = calibration_of(run, stage.samples)
    samples = list(calibration())
    arrays: dict[str, Any] = {spec.name: _stacked([sample[spec.name] for sample in samples]) for spec in student.inputs}
    np.savez(folder / SAMPLES_FILE, **arrays)
    return StageOutput({"calibrated on": record, "bytes": (folder / MODEL_FILE).stat().st_size})


def _stacked(arrays: list[Array]) -> Array:
    """One after the other, each filled up with zeros to the largest."""
    most = np.max([array.shape[1:] for array in arrays], axis=0)
    edges = [
        [(0, 0), *((0, int(size - own)) for size, own in zip(most, array.shape[1:], strict=True))] for array in arrays
    ]
    return np.concatenate([np.pad(array, edge) for array, edge in zip(arrays, edges, strict=True)])
