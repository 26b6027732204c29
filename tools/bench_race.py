"""The winner of a race beside every runtime configured by hand: its own exporter, its own quantizer, its own interface.

    python -m tools.bench_race RUN [--factory M] [--litert PYTHON] [--work build/bench/race] [--rounds 60]

RUN is a finished run with a profile of target `auto` that was measured here. All files run at one thread, each in a
process of its own that waits while others are timed; turns go round in rotating order. ``--litert``: the interpreter of
an environment with litert-torch 0.10 and ai-edge-quantizer 0.10 (they need an older typing_extensions than we do);
ExecuTorch's tool chain comes from ``compress-for-device toolchain install executorch``. Prints a section of
``docs/evidence/race.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from compressor.recipe import parse_drop
from compressor.types import Array
from targets import toolchain

HERE = Path(__file__).parent
TURN_NS = 2e7
HEAD = """# The race on this machine, beside runtimes configured by hand

`python -m tools.bench race`: what target `auto` ships for `this-machine-auto` in the runs of
[fashion-mnist-everywhere](fashion-mnist-everywhere/report.md) and
[movie-reviews-everywhere](movie-reviews-everywhere/report.md) (their reports show the whole race), beside the same
student put through each runtime's own exporter and quantizer and run through its own Python interface, as its guide
says: ONNX Runtime (static uint8 x int8 per channel, or dynamic int8 per channel for text), OpenVINO with NNCF,
litert-torch with ai-edge-quantizer, ExecuTorch with XNNPACK's quantizer. One thread, one process per file, turns of
about 20 ms in rotating order; every file is scored on the whole test set.
"""
CALIBRATED = 256
ORT, OPENVINO = "onnxruntime", "openvino"
RUNTIMES = {"onnxruntime-cpu": ORT, "openvino": OPENVINO, "litert": "litert", "executorch": "executorch"}


@dataclass
class Entry:
    """One file in one runtime."""

    title: str
    runtime: str
    file: Path
    names: list[str]
    samples: Path
    mask: str = ""  # the input whose ones say how long a text is, where the file takes texts at their own length
    python: str = sys.executable
    accuracy: float = 0.0
    turns: list[float] = field(default_factory=list)  # median of each turn, ms


class Worker:
    """A file in a process; :meth:`ask` is one order and its answer."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.read()

    def read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with code {self._process.wait()}")
        return dict(json.loads(line))

    def ask(self, order: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{order}\n")
        self._process.stdin.flush()
        return self.read()


@contextmanager
def opened(entry: Entry) -> Iterator[Worker]:
    words = [entry.python, str(HERE / "race_worker.py"), entry.runtime, str(entry.file), str(entry.samples)]
    words += ["--names", *entry.names] if entry.names else []
    words += ["--own-length", entry.mask] if entry.mask else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield Worker(process)
    finally:
        process.kill()
        process.wait()


# ---------------------------------------------------------------- what the run left


@dataclass(frozen=True)
class Left:
    """Of a finished run: its report, its student as a module, its samples and labels."""

    report: Mapping[str, Any]
    folder: Path
    student: Any
    arrays: Mapping[str, Mapping[str, Array]]
    labels: Array

    @property
    def mask(self) -> str:
        return next((name for name in self.arrays["test"] if "mask" in name), "")

    def path(self, name: str) -> Path:
        return (self.folder / self.report["artifacts"][name]["path"]).resolve()


def read_run(folder: Path, factory: str | None) -> Left:
    from compressor.cli.session import Request, open_session
    from compressor.models.rebuild import load_student

    report = json.loads((folder / "report.json").read_text())
    session = open_session(Request(folder / "recipe.toml", factory, None, ("this-machine",), None, None, Path("build")))
    trained = [stage for stage in report["stages"] if stage["stage"] in ("student", "prune", "distil")][-1]
    assert session.model.module is not None
    student = load_student((folder / trained["folder"]).resolve(), session.model.module)
    splits = session.data.splits
    arrays = same_length({name: splits[name].batch(np.arange(len(splits[name]))) for name in ("calibration", "test")})
    labels = splits["test"].labels
    assert labels is not None
    return Left(report, folder, student, arrays, labels)


def same_length(arrays: Mapping[str, Mapping[str, Array]]) -> dict[str, dict[str, Array]]:
    """Texts of all splits padded to the longest (zeros: the mask's too), for files with fixed shapes."""
    longest: dict[str, int] = {}
    for inputs in arrays.values():
        for name, array in inputs.items():
            longest[name] = max(longest.get(name, 0), array.shape[1])

    def padded(name: str, array: Array) -> Array:
        missing = longest[name] - array.shape[1]
        return np.pad(array, [(0, 0), (0, missing), *[(0, 0)] * (array.ndim - 2)]) if missing else array

    return {split: {name: padded(name, array) for name, array in inputs.items()} for split, inputs in arrays.items()}


def winner(left: Left, folder: Path) -> Entry:
    """The file that ships from the race, as it lies in the run."""
    outcome = next(item for item in left.report["outcomes"] if item["target"] == "auto" and shipped(item))
    row = shipped(outcome)
    assert row is not None
    runtime = RUNTIMES[row["artifact"].rpartition("@")[2]]
    inputs = [item["name"] for item in left.report["artifacts"][row["artifact"].rpartition("@")[0]]["inputs"]]
    own = left.mask if runtime in (ORT, OPENVINO) else ""
    file = (left.folder / row["compiled"]["path"]).resolve()
    return _entry(f"ours: {row['artifact']}", runtime, file, inputs, folder / "samples.npz", own)


def shipped(outcome: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The row of a measured race that ships."""
    rows = [row for row in outcome["rows"] if row["shipped"] and row["latency"] and "value" in row["latency"]]
    return rows[0] if rows else None


def _entry(title: str, runtime: str, file: Path, names: list[str], samples: Path, mask: str = "") -> Entry:
    python = str(toolchain.interpreter("executorch")) if runtime == "executorch" else sys.executable
    return Entry(title, runtime, file, names, samples, mask, python)


# ---------------------------------------------------------------- peers by hand


def in_onnxruntime(left: Left, folder: Path) -> Iterator[Entry]:
    """ONNX Runtime's own quantizer: static U8S8 per channel for pictures, dynamic S8 per channel for texts."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    names, plain, made = list(left.arrays["test"]), left.path("student/fp32"), folder / "ort-int8.onnx"
    if not made.is_file() and left.mask:
        model = onnx.load(plain)
        del model.graph.value_info[:]  # recorded shapes make the dynamic quantizer refuse a transposed Gemm
        onnx.save(model, folder / "plain.onnx")
        quantize_dynamic(folder / "plain.onnx", made, ["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QInt8)
    elif not made.is_file():

        class Reader(CalibrationDataReader):
            rows = iter(range(min(CALIBRATED, len(left.arrays["calibration"][names[0]]))))

            def get_next(self) -> dict[str, Array] | None:
                place = next(self.rows, None)
                if place is None:
                    return None
                return {name: array[place : place + 1] for name, array in left.arrays["calibration"].items()}

        quant_pre_process(str(plain), str(folder / "prepared.onnx"))
        quantize_static(
            folder / "prepared.onnx", made, Reader(), per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
    for title, file in (("fp32", plain), ("int8, its own quantizer", made)):
        yield _entry(f"ONNX Runtime {title}", ORT, file, names, folder / "samples.npz", left.mask)


def in_openvino(left: Left, folder: Path) -> Iterator[Entry]:
    """OpenVINO's converter and NNCF's post-training quantization with its defaults (``transformer`` for texts)."""
    import nncf
    import openvino as ov

    names, made = list(left.arrays["test"]), folder / "nncf-int8.xml"
    if not made.is_file():
        arrays = left.arrays["calibration"]
        count = min(CALIBRATED, len(arrays[names[0]]))
        rows = [{name: array[place : place + 1] for name, array in arrays.items()} for place in range(count)]
        kind = nncf.ModelType.TRANSFORMER if left.mask else None
        model = ov.convert_model(left.path("student/fp32"))
        ov.save_model(
            nncf.quantize(model, nncf.Dataset(rows), subset_size=count, model_type=kind), made, compress_to_fp16=False
        )
    for title, file in (("fp32", left.path("student/fp32")), ("int8, NNCF", made)):
        yield _entry(f"OpenVINO {title}", OPENVINO, file, names, folder / "samples.npz", left.mask)


def from_torch(left: Left, folder: Path, runtime: str, python: str) -> Iterator[Entry]:
    """LiteRT and ExecuTorch from the module, in their own environments (tools/race_peers.py)."""
    out, suffix = folder / runtime, {"litert": "tflite", "executorch": "pte"}[runtime]
    if not (out / f"int8.{suffix}").is_file():
        words = [python, str(HERE / "race_peers.py"), runtime, folder / "student.pt2", folder / "calibration.npz", out]
        subprocess.run([*map(str, words), *(["--text"] if left.mask else [])], check=True, stdout=subprocess.DEVNULL)
    with np.load(folder / "fixed.npz", allow_pickle=False) as stored:
        names = list(stored.files)
    for title in ("fp32", "int8"):
        told = title if title == "fp32" else "int8, its own quantizer"
        label = f"{'LiteRT' if runtime == 'litert' else 'ExecuTorch'} {told}"
        yield _entry(label, runtime, out / f"{title}.{suffix}", names, folder / "fixed.npz")


def write_inputs(left: Left, folder: Path) -> None:
    """Samples by input, the same with an additive mask for exporters that want none computed, and the module."""
    import torch

    np.savez(folder / "samples.npz", **left.arrays["test"])  # type: ignore[arg-type]
    fixed = {name: additive(left, arrays) for name, arrays in left.arrays.items()}
    np.savez(folder / "fixed.npz", **fixed["test"])  # type: ignore[arg-type]
    np.savez(folder / "calibration.npz", **fixed["calibration"])  # type: ignore[arg-type]

    class Plain(torch.nn.Module):
        def __init__(self, student: Any) -> None:
            super().__init__()
            self.student = student

        def forward(self, first: Any, mask: Any = None) -> Any:
            made = self.student(first) if mask is None else self.student(input_ids=first, attention_mask=mask)
            made = getattr(made, "logits", made)
            return made[0] if isinstance(made, tuple) else made

    sample = tuple(torch.from_numpy(array[:1]) for array in fixed["calibration"].values())
    with torch.no_grad():
        torch.export.save(torch.export.export(Plain(left.student).eval(), sample), folder / "student.pt2")


def additive(left: Left, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Inputs of the module by hand: a text's mask as numbers to add to the scores, which keeps it out of quantizers."""
    if not left.mask:
        return dict(arrays)
    ids = next(name for name in arrays if name.endswith("ids"))
    mask = (1.0 - arrays[left.mask][:, None, None, :].astype(np.float32)) * np.float32(-1e4)
    return {ids: arrays[ids].astype(np.int64), "mask": mask}


# ---------------------------------------------------------------- the race


def score(entries: list[Entry], workers: list[Worker], labels: Array, folder: Path) -> None:
    for entry, worker in zip(entries, workers, strict=True):
        worker.ask(f"score {folder / 'answers.npy'}")
        answers = np.load(folder / "answers.npy", allow_pickle=False)
        entry.accuracy = float((answers.reshape(len(labels), -1).argmax(-1) == labels).mean())
        print(f"{entry.title}: {entry.accuracy:.4f}", file=sys.stderr, flush=True)


def time_in_turn(entries: list[Entry], workers: list[Worker], rounds: int) -> None:
    counts = []
    for worker in workers:
        taken = float(np.median(worker.ask("time 20")["ns"]))
        counts.append(max(3, round(TURN_NS / taken)))
    for turn in range(rounds):
        for step in range(len(entries)):
            place = (turn + step) % len(entries)
            taken = workers[place].ask(f"time {counts[place]}")["ns"]
            entries[place].turns.append(float(np.median(taken)) / 1e6)


def lines(entries: list[Entry], left: Left) -> Iterator[str]:
    """A table: every peer as a ratio to ours, median over rounds with its 95 % interval (bootstrap)."""
    limit, first = _limit(left), np.array(entries[0].turns)
    random = np.random.default_rng(0)
    yield "| file | test | p50 ms | time relative to ours (95 %) | MiB |"
    yield "|---|---|---|---|---|"
    for entry in entries:
        ratio = np.array(entry.turns) / first
        drawn = np.median(random.choice(ratio, (2000, len(ratio))), axis=1)
        low, high = np.percentile(drawn, (2.5, 97.5))
        told = "1" if entry is entries[0] else f"{np.median(ratio):.2f} ({low:.2f} to {high:.2f})"
        kept = "" if entry.accuracy >= limit else " (breaks the promise)"
        beside = entry.file.with_suffix(".bin")  # OpenVINO's weights
        size = entry.file.stat().st_size + (beside.stat().st_size if entry.file.suffix == ".xml" else 0)
        p50 = np.median(entry.turns)
        yield f"| {entry.title} | {entry.accuracy:.2%}{kept} | {p50:.3f} | {told} | {size / 2**20:.2f} |"
    peers = [entry for entry in entries[1:] if entry.accuracy >= limit]
    best = min(peers, key=lambda entry: float(np.median(np.array(entry.turns) / first)))
    ratio = float(np.median(np.array(best.turns) / first))
    yield ""
    yield f"The best peer that keeps the promise ({limit:.2%} on test) is {best.title}: {ratio:.2f} times our time."


def _limit(left: Left) -> float:
    """Lowest test accuracy that the recipe's promise allows."""
    row = next(
        row for item in left.report["outcomes"] for row in item["rows"] if row["artifact"].startswith("teacher/fp32")
    )
    return float(row["test"]["value"]) - parse_drop(left.report["recipe"]["accept"]["max_drop"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--factory", help="the run's --model")
    parser.add_argument("--litert", metavar="PYTHON", help="interpreter of an environment with litert-torch")
    parser.add_argument("--work", type=Path, default=Path("build/bench/race"))
    parser.add_argument("--rounds", type=int, default=60)
    words = parser.parse_args()
    folder = (words.work / words.run.name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    left = read_run(words.run.resolve(), words.factory)
    write_inputs(left, folder)
    entries = [winner(left, folder), *in_onnxruntime(left, folder), *in_openvino(left, folder)]
    if words.litert:
        entries += from_torch(left, folder, "litert", words.litert)
    if toolchain.is_ready("executorch"):
        entries += from_torch(left, folder, "executorch", str(toolchain.interpreter("executorch")))
    with ExitStack() as stack:
        workers = [stack.enter_context(opened(entry)) for entry in entries]
        score(entries, workers, left.labels, folder)
        time_in_turn(entries, workers, words.rounds)
    print("\n".join(lines(entries, left)))


if __name__ == "__main__":
    main()
