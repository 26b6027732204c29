"""Measure the latency ratio of two ONNX files again and again and say how often it repeats.

    python -m tools.repeatability TEACHER.onnx STUDENT.onnx --repeats 10 --threads 1

Each repeat opens new sessions and measures anew with the loop the product uses. The last line says in how many repeats
the ratio lay within 5 % of the median of all repeats.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from statistics import median

import numpy as np

from compressor.profile import Compute, HardwareProfile, Runtime
from compressor.types import Array
from targets.clock import pinned
from targets.measure import Measured, Settings, measure


def random_inputs(session: object, sequence: int, count: int) -> list[dict[str, Array]]:
    """Inputs of the declared types: ones for masks, small integers for token ids, noise for pictures."""
    random = np.random.default_rng(0)
    made = []
    for _ in range(count):
        sample: dict[str, Array] = {}
        for spec in session.get_inputs():  # type: ignore[attr-defined]
            shape = [
                size if isinstance(size, int) else (1 if axis == 0 else sequence)
                for axis, size in enumerate(spec.shape)
            ]
            if "int" in spec.type:
                value = (
                    np.ones(shape)
                    if "mask" in spec.name
                    else random.integers(0, 2 if "type" in spec.name else 100, shape)
                )
                sample[spec.name] = value.astype(np.int64 if "64" in spec.type else np.int32)
            else:
                sample[spec.name] = random.random(shape, dtype=np.float32)
        made.append(sample)
    return made


def measure_once(teacher: Path, student: Path, threads: int, sequence: int, settings: Settings) -> Measured:
    """One measurement with fresh sessions."""
    from targets.backends.onnxruntime_cpu import open_session

    profile = HardwareProfile(
        name="repeatability",
        title="repeatability",
        target="onnxruntime-cpu",
        here="this-machine",
        compute=Compute(processor="this machine", architecture="none"),
        runtime=Runtime(threads=threads),
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(pinned(threads))
        runs = {}
        for name, path in (("teacher", teacher), ("student", student)):
            session = open_session(path, profile)
            inputs = random_inputs(session, sequence, 4)
            session.run(None, inputs[0])
            runs[name] = lambda i, session=session, inputs=inputs: session.run(None, inputs[i])
        return measure(runs, "teacher", inputs=4, settings=settings, kinds=[0] * 4)


def agreement(name: str, ratios: list[float]) -> str:
    """How many repeats lie within 5 % of the median of all."""
    middle = median(ratios)
    near = sum(abs(ratio / middle - 1) <= 0.05 for ratio in ratios)
    spread = max(ratios) / min(ratios) - 1
    return f"{name} {middle:.3f}: {near} of {len(ratios)} repeats within 5 % of the median (spread {spread:.1%})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("student", type=Path)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=32, help="length of dynamic token axes")
    parser.add_argument("--priority", choices=["real-time", "normal"], help="default: the best that is permitted")
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    settings = Settings(priority=options.priority)
    found = []
    for number in range(options.repeats):
        measured = measure_once(options.teacher, options.student, options.threads, options.sequence, settings)
        teacher, student = measured.timings["teacher"], measured.timings["student"]
        found.append(measured)
        print(
            f"{number + 1:3d}  teacher {teacher.p50_ms:8.3f} ms  student {student.p50_ms:8.3f} ms  "
            f"ratio {student.ratio:6.3f} [{student.ratio_low:.3f}, {student.ratio_high:.3f}]  "
            f"all rounds {student.ratio_all:6.3f}  fastest {student.fastest_ratio:6.3f}  "
            f"{student.rounds} rounds, {student.quiet_share:.0%} quiet; {measured.contention.describe()}",
            flush=True,
        )
    for name in ("ratio", "ratio_all", "fastest_ratio"):
        print(agreement(name, [getattr(measured.timings["student"], name) for measured in found]))
    if options.json:
        options.json.write_text(json.dumps([measured.to_json() for measured in found], indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
