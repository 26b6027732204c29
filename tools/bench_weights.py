"""Few-bit weights of a small language model: what each method loses, how large its file is and how fast it runs.

    python -m tools.bench_weights [--work build/bench/weight-only]     (a step that is done is not done again)

One fp32 ONNX file, one calibration set (validation text), perplexity on test text, one thread. Prints the tables of
``docs/evidence/weight-only.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from compressor.models.onnx_graph import read_model, save_model
from compressor.quantize.nncf_weights import compress_weights
from compressor.quantize.weights import quantize_weights
from compressor.types import Array, write_atomic

BUILD = Path("build")
CALIBRATION = 32  # blocks of 64 tokens
TEST = 48
GROUP = 32
ROUNDS = 15
OURS = {
    "int8-rtn": (8, "rtn"), "int4-rtn": (4, "rtn"), "int4-scale-estimation": (4, "scale-estimation"),
    "int4-gptq": (4, "gptq"), "int4-awq": (4, "awq"), "int4-awq-gptq": (4, "awq-gptq"),
}  # fmt: skip
NNCF = {"int4-awq-nncf": "awq", "int4-scale-estimation-nncf": "scale-estimation"}
LIMITED = "int4-gptq"  # made once more, under a limit
LIMIT_MIB = 450  # of address space beyond an idle process's; the fp32 file has 621 MiB


def prepare(work: Path) -> None:
    """The fp32 file, its external-data twin, and token ids of both sets."""
    from compressor.export.onnx import export_onnx
    from compressor.export.optimise import optimise
    from tools.causal_lm import open_world

    world = open_world(BUILD)
    if not (work / "fp32.onnx").is_file():
        raw, model = work / "raw.onnx", world.model
        example = world.validation.batch(np.arange(2))
        export_onnx(world.teacher, example, model.inputs, model.outputs, raw, name="smollm2", metadata={})
        optimise(raw, work / "fp32.onnx")
        raw.unlink()
    parts = {}
    for name, split, count in (("calibration", world.validation, CALIBRATION), ("test", world.test, TEST)):
        rows = np.linspace(0, len(split) - 2, count).astype(int)  # from all over the text
        assert split.labels is not None
        parts[name] = np.concatenate([split.ids[rows], split.labels[rows, -1:]], axis=1).astype(np.int64)
    np.savez(work / "ids.npz", **parts)
    model = onnx.load(work / "fp32.onnx")
    onnx.save(model, work / "outside.onnx", save_as_external_data=True, location="outside.data", size_threshold=1024)


def batches(ids: Array, size: int) -> list[dict[str, Array]]:
    rows = [ids[start : start + size, :-1] for start in range(0, len(ids), size)]
    return [{"input_ids": part, "attention_mask": np.ones_like(part)} for part in rows]


def session_of(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def perplexity(session: Any, ids: Array) -> float:
    """Of the text, in float64 from the file's logits."""
    total, count = 0.0, 0
    for start, inputs in enumerate(batches(ids, 4)):
        logits = session.run(None, inputs)[0].astype(np.float64)
        wanted = ids[4 * start : 4 * start + 4, 1:, None]
        top = logits.max(axis=-1, keepdims=True)
        likelihood = np.take_along_axis(logits, wanted, -1) - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
        total, count = total - float(likelihood.sum()), count + wanted.size
    return float(np.exp(total / count))


def make(name: str, work: Path) -> None:
    """One file of few-bit weights beside the fp32 one; NNCF's from the same bytes and calibration data."""
    ids = np.load(work / "ids.npz")["calibration"]
    out = work / f"{name}.onnx"
    if name in NNCF:
        model = compress_weights(
            read_model(work / "fp32.onnx"), 4, GROUP, NNCF[name], lambda: iter(batches(ids, 8)), set()
        )
        save_model(model, out)
        return
    bits, method = OURS[name]
    facts = quantize_weights(
        work / "outside.onnx", out, bits=bits, block=GROUP, method=method, calibration=lambda: iter(batches(ids, 8))
    )  # type: ignore[arg-type]
    (work / f"{name}.facts.json").write_text(json.dumps([vars(fact) for fact in facts], indent=1))


def child(arguments: list[str], work: Path) -> dict[str, float]:
    """A step in a process of its own: seconds, and resident memory beyond what it had before."""
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    words = [sys.executable, "-m", "tools.bench_weights", "--work", str(work), *arguments]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def measured(name: str, work: Path, limit_mib: int) -> dict[str, float]:
    """What :func:`child` runs."""

    def kilobytes() -> int:
        status = Path("/proc/self/status").read_text()  # getrusage counts the parent's before the exec
        return int(status.split("VmHWM:")[1].split()[0])

    square = np.ones((512, 512), np.float32)
    np.linalg.inv(square @ square + 512 * np.eye(512))  # OpenBLAS takes its buffers here, once
    if limit_mib:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + limit_mib * 2**20,) * 2)
    before, start = kilobytes(), time.process_time()
    make(name, work)
    return {"cpu_s": time.process_time() - start, "peak_mib": (kilobytes() - before) / 1024}


def latencies(names: list[str], work: Path, tokens: int) -> dict[str, float]:
    """p50 in ms of one text of ``tokens`` tokens, all files in turn."""
    ids = np.load(work / "ids.npz")["test"][:1, : tokens + 1]
    inputs = batches(ids, 1)[0]
    sessions = {name: session_of(work / f"{name}.onnx") for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(ROUNDS + 2):
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(None, inputs)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(found[2:])) for name, found in times.items()}


def size_mib(path: Path) -> float:
    beside = path.with_name(path.name + ".data")
    return (path.stat().st_size + (beside.stat().st_size if beside.is_file() else 0)) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=BUILD / "bench" / "weight-only")
    parser.add_argument("--make", help="one file only, in this process")
    parser.add_argument("--only", help="make and judge this file only, and keep its row")
    parser.add_argument("--limit", type=int, default=0, help="MiB of address space that may be added for it")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.make:
        print(json.dumps(measured(options.make, options.work, options.limit)))
        return
    text = page(options.work, options.only)
    print(text if options.only is None else "")


class Rows:
    """Figures by file, in one file of their own, written after each step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.is_file() else {}

    def has(self, name: str, key: str) -> bool:
        return key in self.known.get(name, {})

    def keep(self, name: str, row: dict[str, float]) -> None:
        self.known[name] = {**self.known.get(name, {}), **row}
        write_atomic(self.path, json.dumps(self.known, indent=1))
        print(name, json.dumps(self.known[name]), file=sys.stderr, flush=True)


def page(work: Path, only: str | None = None) -> str:
    """All steps that are missing (of one file only), then the tables."""
    if not (work / "ids.npz").is_file():
        prepare(work)
    rows, names = Rows(work / "rows.json"), ["fp32", *OURS, *NNCF]
    for name in names if only is None else [only]:
        judge(name, work, rows)
    if only is not None:
        return ""
    if not rows.has("limited", "cpu_s"):
        rows.keep("limited", child(["--make", LIMITED, "--limit", str(LIMIT_MIB)], work))
    for tokens in (64, 1):
        if not rows.has("fp32", f"p{tokens}_ms"):
            for name, value in latencies(names, work, tokens).items():
                rows.keep(name, {f"p{tokens}_ms": value})
    return tables(rows.known, names)


def judge(name: str, work: Path, rows: Rows) -> None:
    """Make a file and its figures, where they are missing."""
    path = work / f"{name}.onnx"
    if not path.is_file():
        rows.keep(name, child(["--make", name], work))
    if not rows.has(name, "perplexity"):
        ids = np.load(work / "ids.npz")["test"]
        rows.keep(name, {"perplexity": perplexity(session_of(path), ids), "mib": size_mib(path)})


def tables(rows: dict[str, dict[str, float]], names: list[str]) -> str:
    """Markdown."""
    lines = [
        "| file | perplexity | rise | MiB | made, CPU s | peak beyond idle, MiB | 64 tokens | tokens/s | one token |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    base = rows["fp32"]["perplexity"]
    for name in names:
        row = rows[name]
        made = f"{row['cpu_s']:.0f} | {row['peak_mib']:.0f}" if "cpu_s" in row else "- | -"
        lines.append(
            f"| {name} | {row['perplexity']:.2f} | {row['perplexity'] / base - 1:+.1%} | {row['mib']:.0f} | {made} "
            f"| {row['p64_ms']:.0f} ms | {64e3 / row['p64_ms']:.0f} | {row['p1_ms']:.1f} ms |"
        )
    limited = rows["limited"]
    told = (
        f"`{LIMITED}` once more in a process that may add {LIMIT_MIB} MiB of address space to an idle one's "
        f"(RLIMIT_AS), the fp32 data in an external file of {rows['fp32']['mib']:.0f} MiB: done, "
        f"{limited['peak_mib']:.0f} MiB of resident memory at the peak. The largest layer has 108 MiB."
    )
    return "\n".join([*lines, "", told]) + "\n"


if __name__ == "__main__":
    main()
