"""Does the package of a search encoder find what it should? Its own ``infer.py`` against ONNX Runtime and the data.

    python -m tools.search_check RUN [--data build/debian-search/test.csv] [--queries 8]

The package embeds a few queries and their passages with `infer.py` alone. They are compared with the file run directly
(tokenised by the `tokenizers` library), number by number, and each query is answered among the passages. From the
outputs that the run stored, the share of the teacher's nDCG@10 with its 95 % interval over resampled queries.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

from compressor.data.pairs import arranged
from compressor.data.raw import RawPart
from compressor.evaluate.embeddings import ranking_gains


def packaged(folder: Path, texts: list[str]) -> np.ndarray:
    """Embeddings by the package's script."""
    command = [sys.executable, "infer.py", "-", "--json"]
    done = subprocess.run(command, cwd=folder, input="\n".join(texts), capture_output=True, text=True, check=True)
    return np.array([item["embedding"] for item in json.loads(done.stdout)], np.float32)


def direct(folder: Path, texts: list[str]) -> np.ndarray:
    """Embeddings by ONNX Runtime, one text at a time."""
    manifest = json.loads((folder / "manifest.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / manifest["preprocess"]["tokenizer_file"]))
    tokenizer.no_padding()
    tokenizer.enable_truncation(int(manifest["preprocess"]["max_length"]))
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    found = []
    for text in texts:
        encoded = tokenizer.encode(text)
        made = {"input_ids": encoded.ids, "attention_mask": encoded.attention_mask, "token_type_ids": encoded.type_ids}
        inputs = {item.name: np.array([made[item.name]], np.int64) for item in session.get_inputs()}
        found.append(session.run(None, inputs)[0][0])
    return np.stack(found)


def shares(run: Path, data: Path, resamples: int = 2000) -> list[str]:
    """Lines of the share of the teacher's nDCG@10 that each scored file keeps."""
    with data.open(newline="", encoding="utf-8") as stream:
        pairs = [(row["query"], row["passage"]) for row in csv.DictReader(stream)]
    judged = arranged(RawPart("texts", pairs), np.arange(len(pairs)), "retrieval", "test").judgements
    assert judged is not None
    report = json.loads((run / "report.json").read_text())
    wanted = {row["artifact"]: row["test"].get("value") for row in report["outcomes"][0]["rows"]}
    own = {}
    for path in sorted((run.parents[1] / "cache" / "predictions").glob("*.npy")):
        outputs = np.load(path, allow_pickle=False)
        if outputs.ndim == 2 and len(outputs) == len(judged):
            values = ranking_gains(outputs, judged)
            same = [name for name, known in wanted.items() if known is not None and abs(known - values.mean()) < 1e-9]
            own |= dict.fromkeys(same, values)
    random = np.random.default_rng(0)
    draws = random.integers(0, len(own["teacher/fp32"]), (resamples, len(own["teacher/fp32"])))
    lines = []
    for name, values in own.items():
        ratios = values[draws].mean(1) / own["teacher/fp32"][draws].mean(1)
        low, high = np.quantile(ratios, (0.025, 0.975))
        kept = values.mean() / own["teacher/fp32"].mean()
        lines.append(f"| {name} | {values.mean():.4f} | {100 * kept:.2f} % | {100 * low:.1f} to {100 * high:.1f} % |")
    return ["| file | nDCG@10, test | of the teacher's | 95 % of resamples |", "|---|---|---|---|", *sorted(lines)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--profile", default="this-machine")
    parser.add_argument("--data", type=Path, default=Path("build/debian-search/test.csv"))
    parser.add_argument("--queries", type=int, default=8)
    options = parser.parse_args()
    folder = options.run / "packages" / options.profile
    with options.data.open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["query"]][: options.queries]
    texts = [row["query"] for row in rows] + [row["passage"] for row in rows]
    ours, theirs = packaged(folder, texts), direct(folder, texts)
    print(f"{len(texts)} texts, {ours.shape[1]} dimensions, largest difference {np.abs(ours - theirs).max():.2g}\n")
    print("\n".join(shares(options.run, options.data)) + "\n")
    unit = ours / np.linalg.norm(ours, axis=1, keepdims=True)
    scores = unit[: len(rows)] @ unit[len(rows) :].T
    for row, line in zip(rows, scores, strict=True):
        best = rows[int(line.argmax())]
        print(f"- {row['query']} -> `{best['package']}` ({line.max():.2f}{'' if best is row else ', wrong'})")


if __name__ == "__main__":
    main()
