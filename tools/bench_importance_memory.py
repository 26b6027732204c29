"""Peak memory of data-driven importance by number of calibration samples: it must not grow.

python -m tools.bench_importance_memory [--source /usr/share/datasets/fashion-mnist]

A process of its own for each method and number of samples scores all channels of a small residual network on
Fashion-MNIST, read batch by batch as the ``prune`` stage reads its calibration split, and reports the highest resident
memory while it scores (Linux: the high-water mark is set back before). Everything else, the pictures of the whole
training part as bytes included, is in memory before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

SAMPLES = (100, 10_000)
METHODS = ("activation", "activation-weight", "taylor", "relevance")
SOURCE = "/usr/share/datasets/fashion-mnist"


def memory_kib(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (highest since the mark was set back)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def peaks_kib(source: str, method: str, samples: int) -> tuple[int, int]:
    """In this process: resident memory before scoring, and the highest while scoring ``samples`` pictures."""
    import numpy as np
    import torch

    from compressor.data.images import ImageSplit, idx_parts, picture_store
    from compressor.models.structure.scores import score
    from compressor.models.structure.units import find_groups
    from compressor.models.types import ImageInput
    from compressor.recipe import ImagePreprocess
    from compressor.stages.batches import Batches
    from compressor.types import TensorSpec
    from examples.fashion_mnist.model import ResNet9

    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = ResNet9(8, (16, 32, 64)).eval()
    part = idx_parts(Path(source))["train"]
    store = picture_store(part, ImageInput(settings=ImagePreprocess()))
    spec = TensorSpec("image", "float32", ("batch", 1, 28, 28))
    split = ImageSplit("calibration", None, np.zeros(len(part), "S16"), store, np.arange(len(part)), spec)
    groups = [group for group in find_groups(network, next(iter(Batches(split, 2)))) if not group.hard]
    score(network, groups, method, Batches(split, 64))  # type: ignore[arg-type]  # once, for what is loaded on first use
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_kib("VmRSS")
    found = score(network, groups, method, Batches(split, samples))  # type: ignore[arg-type]  # one of METHODS
    if found.samples != samples:
        raise SystemExit(f"{found.samples} samples were seen, not {samples}")
    return before, memory_kib("VmHWM")


def main() -> None:
    """A table: a row a method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default=SOURCE)
    parser.add_argument("--child", nargs=2, metavar=("METHOD", "SAMPLES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        method, samples = options.child
        print(json.dumps(peaks_kib(options.source, method, int(samples))))
        return
    print("Highest resident memory (above what was resident before scoring):\n")
    print(f"| importance | {SAMPLES[0]} samples | {SAMPLES[1]:,} samples | difference |\n|---|---|---|---|")
    for method in METHODS:
        peaks = []
        for samples in SAMPLES:
            words = [sys.executable, "-m", "tools.bench_importance_memory", "--source", options.source]
            done = subprocess.run(
                [*words, "--child", method, str(samples)], check=True, stdout=subprocess.PIPE, text=True
            )
            peaks.append([value / 1024 for value in json.loads(done.stdout)])
        shown = [f"{peak:.1f} MiB ({peak - before:+.1f})" for before, peak in peaks]
        print(f"| {method} | {' | '.join(shown)} | {peaks[1][1] - peaks[0][1]:+.1f} MiB |", flush=True)


if __name__ == "__main__":
    main()
