"""What dropping tokens buys and costs before any training: latency, work and accuracy of the movie teacher.

Each line is an export of the same fine-tuned MiniLM-L6 with other ``drop_tokens``, on reviews joined to whole texts of
up to 128 tokens (single sentences have 27), in ONNX Runtime at one thread. Needs ``build/movie-teacher``.
"""

from __future__ import annotations

import csv
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

TEACHER, TEST = Path("build/movie-teacher"), Path("build/movie-reviews/test.csv")
LENGTH, TEXTS, ROUNDS = 128, 256, 40
ARMS: dict[str, tuple[tuple[int, int], ...]] = {
    "every token": (),
    "96 after block 1": ((1, 96),),
    "64 after block 1": ((1, 64),),
    "64 after block 1, 32 after block 3": ((1, 64), (3, 32)),
    "32 after block 0": ((0, 32),),
}


def page() -> str:
    """The whole page."""
    from compressor.models.load import load_model
    from compressor.recipe import DataConfig, TeacherConfig

    model = load_model(
        TeacherConfig(model=str(TEACHER), task="text-classification"), data=DataConfig(max_length=LENGTH)
    )
    inputs, labels = _texts(model)
    lines = [
        "# Fewer tokens, before any training\n",
        f"`python -m tools.bench token-drop`: the fine-tuned MiniLM-L6, {len(labels)} texts of {LENGTH} tokens (test",
        "sentences of one class, joined), ONNX Runtime fp32, batch 1, 1 thread; p50 of interleaved runs.",
        "No weight is changed.\n",
        "| tokens that go on | multiply-accumulates | p50 | speed-up | accuracy | same class as with all tokens |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        made = {
            name: _export(model, inputs, drops, Path(folder) / f"{n}.onnx")
            for n, (name, drops) in enumerate(ARMS.items())
        }
        sessions = {name: session for name, (session, _) in made.items()}
        classes = {name: _classes(session, inputs) for name, session in sessions.items()}
        p50 = _latency(sessions, inputs)
    first = next(iter(ARMS))
    for name, (_, macs) in made.items():
        right, same = np.mean(classes[name] == labels), np.mean(classes[name] == classes[first])
        fewer = made[first][1] / macs
        lines.append(
            f"| {name} | {macs / 1e6:.0f} M ({fewer:.2f}x fewer) | {p50[name]:.2f} ms | "
            f"{p50[first] / p50[name]:.2f}x | {right:.2%} | {same:.2%} |"
        )
    return "\n".join(lines) + "\n"


def _texts(model: Any) -> tuple[dict[str, Any], Any]:
    """Sentences of one class joined until they fill the length; the ids of each, all of one size, and their classes."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(model.files["tokenizer.json"].decode())
    tokenizer.no_padding()
    tokenizer.enable_truncation(LENGTH)
    with TEST.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [str(label) for label in model.labels]
    texts, labels = [], []
    for label in sorted({row["label"] for row in rows}):
        pending: list[str] = []
        for row in (row for row in rows if row["label"] == label):
            pending.append(row["text"])
            if len(tokenizer.encode(" ".join(pending)).ids) == LENGTH:
                texts.append(tokenizer.encode(" ".join(pending)).ids)
                labels.append(names.index(label) if label in names else int(label))
                pending = []
    chosen = np.random.default_rng(0).permutation(len(texts))[:TEXTS]
    ids = np.array(texts, np.int64)[chosen]
    every = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return {spec.name: every[spec.name] for spec in model.inputs}, np.array(labels)[chosen]


def _export(model: Any, inputs: dict[str, Any], drops: Sequence[tuple[int, int]], path: Path) -> tuple[Any, int]:
    import onnxruntime
    import torch

    from compressor.export.onnx import export_onnx
    from compressor.models.cost import count_macs
    from compressor.recipe import StudentStage
    from compressor.students import make_student

    example = {name: torch.from_numpy(array[:2]) for name, array in inputs.items()}
    module = model.module
    if drops:
        stage = StudentStage(kind="student", drop_tokens=[{"after": a, "keep": k} for a, k in drops])  # type: ignore[arg-type]
        module = make_student(module, stage, example, seed=0).module
    arrays = {name: array[:2] for name, array in inputs.items()}
    export_onnx(module, arrays, model.inputs, model.outputs, path, name="tokens", metadata={})
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session, count_macs(module, example)


def _classes(session: Any, inputs: dict[str, Any]) -> Any:
    size = len(next(iter(inputs.values())))
    parts = [session.run(None, {k: v[i : i + 16] for k, v in inputs.items()})[0] for i in range(0, size, 16)]
    return np.concatenate(parts).argmax(-1)


def _latency(sessions: dict[str, Any], inputs: dict[str, Any]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(ROUNDS + 3):
        sample = {name: array[turn : turn + 1] for name, array in inputs.items()}
        for name, session in sessions.items():
            started = time.perf_counter()
            session.run(None, sample)
            if turn >= 3:
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: float(np.median(found)) for name, found in times.items()}


if __name__ == "__main__":
    print(page())
