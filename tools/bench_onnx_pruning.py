"""Public ONNX files with a quarter of their channels gone: what each way of mending gives back, on inputs it never saw.

    python -m tools.public_models build/public && python -m tools.bench_onnx_pruning build/public [NAME ...]

112 of the 160 inputs calibrate, 32 others judge. Nothing is labelled; the original's outputs are the measure.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from compressor.prune.onnx import PrunedOnnx, prune
from compressor.prune.onnx.refit import WAY
from compressor.prune.onnx.runtime import Watcher
from compressor.recipe import PruneStage

CALIBRATION, JUDGED, BATCH = 112, 144, 16
REQUESTS = {"mtcnn-rnet": 0.25, "mtcnn-onet": 0.25, "pp-ocr-angle": 0.2, "basic-pitch": 0.25, "open-nsfw": 0.2}
Data = dict[str, np.ndarray[Any, Any]]


def cut(model: onnx.ModelProto, data: Data, ratio: float) -> PrunedOnnx:
    batches = [
        {name: array[start : start + BATCH] for name, array in data.items()} for start in range(0, CALIBRATION, BATCH)
    ]
    config = PruneStage(kind="prune", channels=ratio, importance="activation")
    return prune(model, {name: array[:2] for name, array in data.items()}, config, batches, round_to=8)


def compared(model: onnx.ModelProto, small: onnx.ModelProto, data: Data) -> list[str]:
    """Each output: mean squared difference relative to its variance, and equal argmax where it is a probability."""
    held = {name: array[CALIBRATION:JUDGED] for name, array in data.items()}
    wanted, found = Watcher(model).run(held), Watcher(small).run(held)
    lines = []
    for name, array in wanted.items():
        error = float(np.square(array - found[name]).mean() / max(float(array.var()), 1e-30))
        chances = array.ndim == 2 and np.allclose(array.sum(axis=-1), 1, atol=1e-3)
        same = f", argmax equal {np.mean(array.argmax(-1) == found[name].argmax(-1)):.1%}" if chances else ""
        lines.append(f"`{name}` {error:.2%}{same}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", default=list(REQUESTS))
    args = parser.parse_args()
    print("| model | request | parameters | MACs | squared distance: nothing, biases, fitted | outputs (error) | CPU |")
    print("|---|---|---|---|---|---|---|")
    for name in args.names:
        model = onnx.load(args.folder / f"{name}.onnx")
        stored = np.load(args.folder / f"{name}.npz")
        data = {each: stored[each] for each in stored.files}
        start = time.process_time()
        done = cut(model, data, REQUESTS[name])
        seconds = time.process_time() - start
        ways = [done.distances.get(way, float("nan")) for way in ("nothing", "bias compensation", WAY)]
        macs = [f"{value / 1e6:.2f} M" if value else "?" for value in (done.macs_before, done.macs_after)]
        print(
            f"| {name} | `channels = {REQUESTS[name]}` | {done.parameters_before:,} -> {done.parameters_after:,} | "
            f"{macs[0]} -> {macs[1]} | {', '.join(f'{value:.3g}' for value in ways)} | "
            f"{'; '.join(compared(model, done.model, data))} | {seconds:.0f} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()
