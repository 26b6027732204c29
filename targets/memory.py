"""Peak memory of one model, measured in a fresh process that loads and runs nothing else."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compressor.errors import RunError
from compressor.machine import detect
from compressor.profile import HardwareProfile
from compressor.types import Artifact, Figure, Inputs, Measurement, Origin, Unavailable
from targets.base import Compiled

TIMEOUT_S = 300.0


def peak_memory(
    backend: str, compiled: Compiled, profile: HardwareProfile, inputs: Sequence[Inputs], device: str = ""
) -> Figure:
    """Peak resident memory in MiB (2^20 bytes) of a process that loads ``compiled`` and runs it on ``inputs``.

    The detail's ``baseline`` is the same process before it loads the model: interpreter, numpy and the runtime. A
    process that fails gives :class:`Unavailable`.
    """
    with tempfile.TemporaryDirectory(prefix="compress-memory-") as folder:
        arrays = Path(folder) / "inputs.npz"
        flat = {f"{number}/{name}": array for number, sample in enumerate(inputs) for name, array in sample.items()}
        np.savez(arrays, **flat)  # type: ignore[arg-type]
        job = {
            "backend": backend,
            "profile": profile.model_dump(mode="json"),
            "path": str(compiled.path),
            "artifact": _as_data(compiled.artifact),
            "inputs": str(arrays),
        }
        try:
            answer = _ask(json.dumps(job))
        except RunError as error:
            return Unavailable(str(error), error.hint)
    detail = {"baseline": answer["baseline_mib"], "threads": profile.runtime.threads}
    return Measurement(answer["peak_mib"], "MiB", Origin.MEASURED, device or detect().processor, detail)


def _ask(job: str) -> dict[str, float]:
    command = [sys.executable, "-m", "targets.memory_probe"]
    try:
        done = subprocess.run(command, input=job, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise RunError(f"the memory probe took longer than {TIMEOUT_S:.0f} s") from None
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise RunError(f"the memory probe failed: {last[0]}", hint="The model may not fit in memory.")
    answer: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def _as_data(artifact: Artifact) -> dict[str, Any]:
    data = dataclasses.asdict(dataclasses.replace(artifact, facts=(), scheme={}))
    return {**data, "path": str(artifact.path)}
