"""A fine-tuned update as a delta (Q4) on a real pair: MiniLM-L6 as it is, and fine-tuned on movie reviews.

    python -m tools.bench_delta --work FOLDER [--share 2 5 10 20]

BASE is the fine-tuned classifier with the encoder of ``build/minilm-l6`` in place of its own (the head stays: it has
nothing to be compared with); NEW is ``build/movie-teacher``. Both are exported in the same way; ``delta make`` and
``delta apply`` are the user's own commands. Prints a table: size, error of the change, accuracy on the test sentences.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
CLI = [sys.executable, "-m", "compressor.cli"]
TEACHER, ENCODER = ROOT / "build/movie-teacher", ROOT / "build/minilm-l6"
BATCH, LONGEST = 32, 128
LABELS = ["negative", "positive"]


def base_checkpoint(folder: Path) -> Path:
    """The fine-tuned classifier with the encoder it was tuned from."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(TEACHER, folder, dirs_exist_ok=True)
    tuned, encoder = load_file(TEACHER / "model.safetensors"), load_file(ENCODER / "model.safetensors")
    parts = ("bert.embeddings.", "bert.encoder.")  # pooler and classifier are the task's head
    replaced = {name: encoder[name.removeprefix("bert.")] for name in tuned if name.startswith(parts)}
    print(f"{len(replaced)} of {len(tuned)} tensors come from the encoder", file=sys.stderr)
    save_file({**tuned, **replaced}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def export(checkpoint: Path, out: Path) -> Path:
    """As a run exports it."""
    from compressor.export.onnx import export_onnx
    from compressor.export.optimise import optimise
    from compressor.models import load_model
    from compressor.recipe import TeacherConfig

    model = load_model(TeacherConfig(model=str(checkpoint), task="text-classification"))
    assert model.module is not None
    sample = {spec.name: np.ones((2, 16), np.int64) for spec in model.inputs}
    raw = out.with_suffix(".raw.onnx")
    export_onnx(model.module.eval(), sample, model.inputs, model.outputs, raw, name="delta", metadata={})
    optimise(raw, out)
    raw.unlink()
    return out


def batches(tokenizer: Any, limit: int | None) -> Iterator[tuple[dict[str, np.ndarray[Any, Any]], list[int]]]:
    """Test sentences, short ones together."""
    with (ROOT / "build/movie-reviews/test.csv").open(encoding="utf-8") as stream:
        rows = sorted(csv.DictReader(stream), key=lambda row: len(row["text"]))[:limit]
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        found = tokenizer([row["text"] for row in part], padding=True, truncation=True, max_length=LONGEST)
        labels = [LABELS.index(row["label"]) for row in part]
        yield {name: np.array(value, np.int64) for name, value in found.items()}, labels


def accuracy(path: Path, tokenizer: Any, limit: int | None) -> float:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}
    hits = total = 0
    for inputs, labels in batches(tokenizer, limit):
        logits = session.run(None, {name: value for name, value in inputs.items() if name in names})[0]
        hits += int((logits.argmax(1) == labels).sum())
        total += len(labels)
    return hits / total


def command(*words: object) -> dict[str, Any]:
    done = subprocess.run([*CLI, *map(str, words), "--json"], check=True, capture_output=True, text=True, cwd=ROOT)
    return dict(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--share", type=float, nargs="*", default=[2, 5, 10, 20])
    parser.add_argument("--limit", type=int, help="only so many test sentences")
    words = parser.parse_args()
    words.work.mkdir(parents=True, exist_ok=True)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    base, new = words.work / "base.onnx", words.work / "new.onnx"
    if not base.is_file():
        export(base_checkpoint(words.work / "checkpoint"), base)
    if not new.is_file():
        export(TEACHER, new)
    print("| on the device | shipped | error of the change | accuracy, test | made in | applied in |")
    print("|---|---|---|---|---|---|")
    print(f"| base, not tuned | nothing | 100 % | {accuracy(base, tokenizer, words.limit):.4f} | | |", flush=True)
    for share in [*words.share, None]:
        aim = ["--exact"] if share is None else ["--size", f"{share:g}%"]
        began = time.monotonic()
        made = command("delta", "make", base, new, *aim, "--out", words.work / "update.delta")
        middle = time.monotonic()
        command("delta", "apply", base, words.work / "update.delta", "--out", words.work / "updated.onnx")
        applied = time.monotonic() - middle
        score = accuracy(words.work / "updated.onnx", tokenizer, words.limit)
        print(
            f"| base + delta, `{' '.join(aim)}` | {made['file_bytes'] / 2**20:.2f} MiB ({100 * made['share']:.1f} %) "
            f"| {100 * made['error']:.1f} % | {score:.4f} | {middle - began:.0f} s | {applied:.0f} s |",
            flush=True,
        )
    score, size = accuracy(new, tokenizer, words.limit), new.stat().st_size / 2**20
    print(f"| the fine-tuned model | {size:.2f} MiB (100 %) | 0 | {score:.4f} | | |")


if __name__ == "__main__":
    main()
