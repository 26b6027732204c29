"""Latency of structures with random weights: what a text student must look like to be five times faster.

    python -m tools.structure_speed [--rounds 60]

Each structure is cut from a six-layer network of MiniLM's sizes by the tool's own surgery, exported, and timed in turn
with the others in one process (ONNX Runtime, 1 thread, batch 1, 28 tokens). Weights do not matter to the time.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

TOKENS, VOCABULARY = 28, 3000
# layers, share of the heads and of the neurons cut, hidden width
STRUCTURES: dict[str, tuple[int, float, float, int | None]] = {
    "teacher: 6 layers, 12 heads, 1536 neurons, width 384": (6, 0.0, 0.0, None),
    "3 whole layers": (3, 0.0, 0.0, None),
    "2 whole layers": (2, 0.0, 0.0, None),
    "1 whole layer": (1, 0.0, 0.0, None),
    "2 layers, 8 heads, 768 neurons": (2, 0.33, 0.5, None),
    "2 layers, 6 heads, 768 neurons": (2, 0.5, 0.5, None),
    "3 layers, 6 heads, 512 neurons": (3, 0.5, 0.667, None),
    "4 layers, 4 heads, 384 neurons": (4, 0.667, 0.75, None),
    "3 layers, 6 heads, 768 neurons, width 256": (3, 0.5, 0.5, 256),
    "4 layers, 6 heads, 768 neurons, width 192": (4, 0.5, 0.5, 192),
}


def network() -> Any:
    """MiniLM-L6's structure with a small vocabulary, which costs no time, and random weights."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    from compressor.models.wrappers import TextModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    return TextModel(BertForSequenceClassification(config)).eval()


def cut(module: Any, example: dict[str, Any], structure: tuple[int, float, float, int | None]) -> Any:
    """The network with this structure."""
    from compressor.prune import prune
    from compressor.recipe import PruneStage, StudentStage
    from compressor.students import make_student

    layers, heads, neurons, width = structure
    if layers < 6 or width is not None:
        stage = StudentStage(kind="student", keep_layers=layers, hidden_size=width)
        module = make_student(module, stage, example, seed=0).module
    if heads:
        asked = PruneStage(kind="prune", heads=heads, neurons=neurons, importance="magnitude")
        module = prune(module, example, asked, [], repair=False).module
    return module


def sessions(folder: Path, feed: dict[str, np.ndarray]) -> dict[str, Any]:
    """An ONNX Runtime session of every structure."""
    import onnxruntime
    import torch

    from compressor.export.onnx import export_onnx
    from compressor.export.optimise import optimise
    from compressor.types import TensorSpec

    example = {name: torch.from_numpy(array) for name, array in feed.items()}
    inputs = tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in feed)
    outputs = (TensorSpec("logits", "float32", ("batch", 2)),)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    found = {}
    for number, (name, structure) in enumerate(STRUCTURES.items()):
        path = folder / f"{number}.onnx"
        module = cut(network(), example, structure)
        export_onnx(module, feed, inputs, outputs, folder / "raw.onnx", name="structure", metadata={})
        optimise(folder / "raw.onnx", path)
        found[name] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return found


def table(rounds: int = 60) -> list[str]:
    """Lines of a Markdown table: median and least time of each structure, and both as ratios to the teacher's."""
    ids = np.random.default_rng(0).integers(5, VOCABULARY, (2, TOKENS))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    times: dict[str, list[float]] = {name: [] for name in STRUCTURES}
    with tempfile.TemporaryDirectory() as folder:
        ready = sessions(Path(folder), feed)
        one = {name: array[:1] for name, array in feed.items()}
        for _ in range(rounds):
            for name, session in ready.items():
                session.run(None, one)
                began = time.perf_counter()
                session.run(None, one)
                times[name].append(1000 * (time.perf_counter() - began))
    whole = times[next(iter(times))]
    lines = ["| structure | median | fastest | speed-up by medians | by the fastest |", "|---|---|---|---|---|"]
    for name, seen in times.items():
        median, least = float(np.median(seen)), min(seen)
        ratios = f"{np.median(whole) / median:.1f}x | {min(whole) / least:.1f}x"
        lines.append(f"| {name} | {median:.2f} ms | {least:.2f} ms | {ratios} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    print("\n".join(table(parser.parse_args().rounds)))


if __name__ == "__main__":
    main()
