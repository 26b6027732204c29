"""Memory of the objectives that compare samples, by batch size: forward and backward pass, peak above the start.

    python -m tools.bench_relations [--width 384] [--batches 64 128 256 512 1024]

Peaks are the process's own (VmHWM of Linux), reset before each pass. The last rows lift the cap of `rkd-angle`, to
show what it is for.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from compressor.distil.objectives.base import Batch, Context, Step
from compressor.distil.objectives.registry import get
from compressor.recipe import Match

HIDDEN = Match(student="hidden[-1]", teacher="hidden[-1]", proj="none")
UNCAPPED = 10**6
LIMIT = 256  # batch above which the uncapped angles are not run: 4 arrays of 512^3 floats are 2 GiB


def peak_mib(work: Callable[[], Any]) -> float:
    """How far the resident memory rises above its start while ``work`` runs, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise RuntimeError(f"no {name} in /proc/self/status")


def passes(use: str, options: dict[str, Any], batch: int, width: int) -> Callable[[], None]:
    """A forward and backward pass of an objective on embeddings (batch, width)."""
    torch.manual_seed(0)
    student = torch.randn(batch, width, requires_grad=True)
    teacher = torch.randn(batch, width)
    kind = get(use)
    objective = kind(kind.Options(**options), HIDDEN)
    objective.bind({"hidden": 1}, {"hidden": 1})
    signals = {"hidden[0]": student, "hidden[-1]": student}, {"hidden[0]": teacher, "hidden[-1]": teacher}
    objective.prepare(Context(*signals, torch.Generator(), torch.device("cpu"), 2))

    def run() -> None:
        term = objective(*signals, Batch(None, None), Step(0, 1, 0))
        term.sum.backward()

    return run


ROWS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("rkd-distance", "rkd-distance", {}),
    ("rkd-distance, no cap", "rkd-distance", {"samples": UNCAPPED}),
    ("rkd-angle", "rkd-angle", {}),
    ("rkd-angle, no cap", "rkd-angle", {"samples": UNCAPPED}),
)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    passes("rkd-distance", {}, 8, arguments.width)()  # what torch loads once
    print("| peak memory in MiB, batch | " + " | ".join(map(str, arguments.batches)) + " |")
    print("|---|" + "---|" * len(arguments.batches))
    for title, use, options in ROWS:
        cells = []
        for batch in arguments.batches:
            skip = use == "rkd-angle" and options and batch > LIMIT
            cells.append("not run" if skip else f"{peak_mib(passes(use, options, batch, arguments.width)):.1f}")
        print(f"| {title} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
