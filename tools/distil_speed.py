"""The evidence page on the speed and memory of distillation: what the other tools print, with what it means."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

PACKAGES = "torchdistill==1.1.5", "torchvision==0.28.0"
HEAD = """# Speed of the distillation step

`python -m tools.bench distil-speed`, one thread, processor seconds.

## Against a hand-written loop

Both loops in one process, step by step in turns (`python -m tools.bench_distil --batch 64`, then 32). Goals: with the
teacher online at most 1.05x of teacher forward and student step written by hand; with its outputs cached at most 1.10x
of a plain supervised step.
"""
MEMORY = """## Memory of the relation objectives

Forward and backward pass on embeddings of width 384, peak above the start (`python -m tools.bench_relations`). With
their caps (the first 512 samples of a batch, 64 for angles) memory stops growing with the batch; without it, that of
the angles grows with the cube.
"""


def page(command: Callable[[list[str]], str], work: Path) -> str:
    """Run everything through ``command``, which returns what was printed, and put the page together."""
    parts = [HEAD]
    for batch in ("64", "32"):
        parts.append(f"```\n{command([sys.executable, '-m', 'tools.bench_distil', '--batch', batch]).strip()}\n```\n")
    parts += ["## Against torchdistill\n", _rival(command, work / "torchdistill"), MEMORY]
    return "\n".join([*parts, command([sys.executable, "-m", "tools.bench_relations"])])


def _rival(command: Callable[[list[str]], str], folder: Path) -> str:
    if not (folder / "torchdistill").is_dir():
        words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *PACKAGES]
        if subprocess.run(words, check=False).returncode:
            return "torchdistill could not be installed here.\n"
    from tools import bench_torchdistill

    told = (bench_torchdistill.__doc__ or "").split("\n\n", 2)[2]
    return f"{told}\n{command([sys.executable, '-m', 'tools.bench_torchdistill', str(folder)])}"
