"""Check and time the package on a Mac. Needs Python with coremltools and numpy there; nothing of what made the model.

python on_mac.py --self-check     # repeat the stored answers, say how far Core ML is from them
python on_mac.py --benchmark      # time one prediction, arrays in and arrays out
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
FACTS = json.loads((HERE / "mac.json").read_text(encoding="utf-8"))
UNITS = {"all": "ALL", "cpu": "CPU_ONLY", "cpu-and-gpu": "CPU_AND_GPU", "cpu-and-neural-engine": "CPU_AND_NE"}


def load() -> Any:
    """The model on the compute units of the profile; the zip is unpacked beside it once."""
    import coremltools

    package = HERE / "model.mlpackage"
    if not package.exists():
        with zipfile.ZipFile(HERE / "model.mlpackage.zip") as archive:
            archive.extractall(HERE)
    return coremltools.models.MLModel(
        str(package), compute_units=coremltools.ComputeUnit[UNITS[FACTS["compute_units"]]]
    )


def fitted(inputs: dict[str, Any]) -> dict[str, Any]:
    """Arrays in the shapes that the model has; shorter token inputs are filled up with zeros."""
    found = {}
    for item in FACTS["inputs"]:
        array, shape = inputs[item["name"]], item["shape"]
        edges = [(0, most - array.shape[axis]) for axis, most in enumerate(shape)]
        kind = np.float32 if item["dtype"].startswith("float") else np.int32
        found[item["name"]] = np.pad(array, edges).astype(kind)
    return found


def samples(path: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The package's stored inputs with the portable model's answers."""
    found: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
    with np.load(path, allow_pickle=False) as stored:
        for key in stored.files:
            number, part, name = key.split(".", 2)
            if part in ("input", "output"):
                found.setdefault(int(number), ({}, {}))[part == "output"][name] = stored[key]
    return [found[number] for number in sorted(found)]


def self_check(model: Any, pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> int:
    """Largest difference relative to the largest value, and how often the largest entry is at the same place."""
    name, worst, equal = FACTS["outputs"][0], 0.0, 0
    for inputs, expected in pairs:
        wanted = expected[name]
        got = model.predict(fitted(inputs))[name][tuple(slice(size) for size in wanted.shape)]
        worst = max(worst, float(np.abs(got - wanted).max() / max(np.abs(wanted).max(), 1e-9)))
        equal += int(np.array_equal(got.argmax(-1), wanted.argmax(-1)))
    say(f"{equal} of {len(pairs)} stored answers agree; worst difference {worst:.3g} of the largest value")
    return 0 if equal == len(pairs) else 1


def benchmark(model: Any, inputs: dict[str, Any], count: int = 100) -> None:
    times, given = [], fitted(inputs)
    for number in range(count + 10):
        before = time.perf_counter()
        model.predict(given)
        if number >= 10:
            times.append((time.perf_counter() - before) * 1e3)
    times.sort()
    say(f"p50 {statistics.median(times):.3f} ms, p95 {times[int(count * 0.95)]:.3f} ms over {count} predictions")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--self-check", action="store_true")
    parser.add_argument("--benchmark", action="store_true")
    parser.add_argument("--samples", type=Path, default=HERE.parent / "samples.npz")
    options = parser.parse_args()
    model, pairs = load(), samples(options.samples)
    if options.benchmark:
        benchmark(model, pairs[0][0])
    return self_check(model, pairs) if options.self_check or not options.benchmark else 0


if __name__ == "__main__":
    sys.exit(main())
