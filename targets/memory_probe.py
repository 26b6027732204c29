"""The child of :mod:`targets.memory`: loads one model, runs it, says how much memory that took, ends.

``python -m targets.memory_probe < job.json``. The job names the back end, the profile (as data), the compiled file and
an ``.npz`` of inputs. The answer, JSON on stdout: ``peak_mib``, the highest resident set of the process while it loads
and runs the model, and ``baseline_mib``, the same process with the runtime imported and probed, before the model is
loaded. A session whose model lives in a process of its own answers for that process.

Linux's VmHWM is read rather than getrusage's ru_maxrss: the latter is carried over from the parent when a process is
started, so that a child of a training process would report the training's memory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from compressor.config import validate
from compressor.profile import HardwareProfile
from compressor.types import Artifact, Format, TensorSpec
from targets import registry
from targets.base import Compiled, SelfWeighed

RUNS = 3  # passes over the inputs


def _artifact(data: dict[str, Any]) -> Artifact:
    specs = {
        key: tuple(TensorSpec(item["name"], item["dtype"], tuple(item["shape"])) for item in data[key])
        for key in ("inputs", "outputs")
    }
    return Artifact(**{**data, **specs, "path": Path(data["path"]), "format": Format(data["format"]), "facts": ()})


def peak_resident_mib() -> float:
    """Highest resident set of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    import resource

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _samples(path: str) -> list[dict[str, Any]]:
    samples: dict[int, dict[str, Any]] = {}
    with np.load(path, allow_pickle=False) as arrays:
        for key in arrays.files:
            number, _, name = key.partition("/")
            samples.setdefault(int(number), {})[name] = arrays[key]
    return [samples[number] for number in sorted(samples)]


def main() -> int:
    job = json.loads(sys.stdin.read())
    backend = registry.get(job["backend"])
    backend.probe()  # imports the runtime: part of the baseline
    profile = validate(HardwareProfile, job["profile"], "the profile of the memory probe")
    samples = _samples(job["inputs"])
    baseline = peak_resident_mib()
    with backend.open(Compiled(Path(job["path"]), _artifact(job["artifact"]), placed=0), profile) as session:
        for _ in range(RUNS):
            for sample in samples:
                session.run(sample)
        peak = peak_resident_mib()
        if isinstance(session, SelfWeighed):
            baseline, peak = session.resident_mib()
        answer = {"peak_mib": peak, "baseline_mib": baseline}
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
