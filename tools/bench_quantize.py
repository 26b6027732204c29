"""Ours beside Olive, NNCF, ModelOpt and ONNX Runtime's quantizers: one fp32 file, one calibration set, one machine.

    python -m tools.bench_quantize MODEL.onnx --work FOLDER --dump RECIPE [--factory M] [--olive VENV] [--modelopt VENV]
           [--steps arrays files scores times page] [--drop 0.003]

Files, scores and times are kept in FOLDER, so that each step can be run alone and a stopped run goes on. Every file is
scored on all validation and test samples one by one (as on a device; a text at its own length), and all are timed
together, interleaved, in one process at one thread. "Ships" is what the tool would ship: of our files that lose at
most ``--drop`` on validation the fastest one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compressor.errors import CompressError
from compressor.models.onnx_facts import describe
from compressor.profile import load_profile
from compressor.quantize import quantize, variants
from compressor.recipe import QuantizeStage
from compressor.types import Array, Artifact, Format, file_digest
from tools.quantize_rivals import Sample, rivals

SPLITS = ("calibration", "validation", "test")
SAMPLES, TIMED = 256, 16
STEPS = ("arrays", "files", "scores", "times", "page")


@dataclass(frozen=True)
class Data:
    """Arrays by split and input, and labels."""

    arrays: dict[str, dict[str, Array]]
    labels: dict[str, Array]

    def one(self, split: str, position: int) -> Sample:
        """One sample; a text without its padding."""
        found = {name: array[position : position + 1] for name, array in self.arrays[split].items()}
        if "attention_mask" in found:
            length = int(found["attention_mask"].sum())
            found = {name: np.ascontiguousarray(array[:, :length]) for name, array in found.items()}
        return found

    def calibration(self) -> Iterator[Sample]:
        count = len(next(iter(self.arrays["calibration"].values())))
        return (self.one("calibration", position) for position in range(min(SAMPLES, count)))


def read(path: Path) -> Data:
    with np.load(path, allow_pickle=False) as stored:
        arrays: dict[str, dict[str, Array]] = {split: {} for split in SPLITS}
        for name in stored.files:
            split, dot, key = name.partition(".")
            if dot:
                array = stored[name]
                arrays[split][key] = array.astype(np.int64) if array.dtype.kind == "i" else array
        labels = {split: stored[f"{split}_y"] for split in SPLITS[1:]}
    return Data(arrays, labels)


def dump(recipe: Path, factory: str | None, out: Path) -> None:
    """Prepared inputs of a recipe's splits, so that every engine gets the very same arrays."""
    from compressor.cli.session import Request, open_session

    request = Request(recipe, factory, None, ("this-machine",), None, None, Path("build"))
    data = open_session(request).data
    found: dict[str, Array] = {}
    for name in SPLITS:
        split = data.splits[name]
        for key, array in split.batch(np.arange(len(split))).items():
            found[f"{name}.{key}"] = array.astype(np.int32) if array.dtype.kind == "i" else array
        if split.labels is not None:
            found[f"{name}_y"] = split.labels
    np.savez(out, **found)  # type: ignore[arg-type]


def kept(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def keep(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1))


def make_files(model: Path, data: Data, words: argparse.Namespace) -> None:
    """Every quantizer's file; what fails is recorded with its message, and is not tried again."""
    record, folder = kept(words.work / "files.json"), words.work / "files"
    folder.mkdir(exist_ok=True)
    jobs: list[tuple[str, Callable[[Path], None], str]] = [*our_jobs(model, data, words.work)]
    samples = list(data.calibration())
    for item in rivals(model, samples, words.work, words.olive, words.modelopt):
        jobs.append((item.name, item.make, item.reason))
    for name, make, reason in jobs:
        if name in record and not (reason == "" and record[name].get("reason", "").startswith("its environment")):
            continue
        path, began = folder / f"{'-'.join(name.lower().replace(',', '').split())}.onnx", time.monotonic()
        try:
            if reason:
                raise RuntimeError(reason)
            with contextlib.redirect_stdout(io.StringIO()):
                make(path)
            record[name] = {"file": path.name, "seconds": time.monotonic() - began, "bytes": path.stat().st_size}
        except (CompressError, Exception) as error:  # noqa: BLE001 - another project's fault is a row of the table
            record[name] = {"reason": f"{type(error).__name__}: {error}"[:300]}
        print(f"{name}: {record[name]}", file=sys.stderr, flush=True)
        keep(words.work / "files.json", record)


def our_jobs(model: Path, data: Data, work: Path) -> Iterator[tuple[str, Callable[[Path], None], str]]:
    facts, rules = describe(model), load_profile("this-machine").quantization
    source = Artifact(
        "student/fp32", "student", model, Format.ONNX, "fp32", facts.inputs, facts.outputs, file_digest(model),
        facts.parameters,
    )  # fmt: skip
    for variant in variants(QuantizeStage(kind="quantize"), rules, facts)[0]:

        def make(out: Path, variant: Any = variant) -> None:
            quantize(source, variant, rules, data.calibration, out, cache=work / "ranges")

        yield f"ours {variant.name}", make, ""


def session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def paths(model: Path, work: Path) -> dict[str, Path]:
    found = {name: work / "files" / item["file"] for name, item in kept(work / "files.json").items() if "file" in item}
    return {"fp32": model, **found}


def score(model: Path, data: Data, work: Path) -> None:
    """Answers of every file, one sample at a time; kept as accuracies and as the number of answers unlike fp32's."""
    record = kept(work / "scores.json")
    reference: dict[str, Array] = {}
    if set(paths(model, work)) <= set(record):
        return
    for name, path in paths(model, work).items():
        if name in record and name != "fp32":
            continue
        row: dict[str, Any] = {}
        try:
            run = session(path)
            for split in SPLITS[1:]:
                labels = data.labels[split]
                answers = np.array([run.run(None, data.one(split, at))[0][0].argmax() for at in range(len(labels))])
                reference.setdefault(split, answers)  # fp32 comes first
                row[split] = float((answers == labels).mean())
                row[f"{split}_changed"] = int((answers != reference[split]).sum())
        except Exception as error:  # noqa: BLE001 - a file that stock ONNX Runtime refuses is a row of the table
            row = {"reason": f"{type(error).__name__}: {error}"[:300]}
        record[name] = row
        print(f"{name}: {row}", file=sys.stderr, flush=True)
        keep(work / "scores.json", record)


def timed(model: Path, data: Data, work: Path) -> None:
    """All files that can be scored, together."""
    from dataclasses import asdict

    from targets.measure import Settings, measure

    scores = kept(work / "scores.json")
    samples = [data.one("validation", place) for place in range(TIMED)]
    sessions = {name: session(path) for name, path in paths(model, work).items() if "test" in scores[name]}

    def call(run: Any) -> Callable[[int], object]:
        return lambda place: run.run(None, samples[place])

    runs = {name: call(run) for name, run in sessions.items()}
    found = measure(runs, "fp32", len(samples), Settings(min_s=30.0, budget_s=90.0))
    record = {name: asdict(timing) for name, timing in found.timings.items()}
    keep(work / "times.json", {"contention": found.contention.describe(), "files": record})


def shipped(names: list[str], scores: dict[str, Any], times: dict[str, Any], drop: float) -> str | None:
    """Of our files that lose at most ``drop`` on validation the fastest."""
    floor = scores["fp32"]["validation"] - drop
    held = [name for name in names if name.startswith("ours") and scores[name]["validation"] >= floor]
    return max(held, key=lambda name: times[name]["ratio"], default=None)


def page(model: Path, work: Path, drop: float) -> str:
    files, scores, whole = kept(work / "files.json"), kept(work / "scores.json"), kept(work / "times.json")
    times, size = whole["files"], model.stat().st_size
    ships = shipped(list(times), scores, times, drop)
    lines = [
        "| file | validation | test | answers changed | p50, ms | speed-up (95 % interval) | size | made in |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, item in {"fp32": {"seconds": 0.0, "bytes": size}, **files}.items():
        failure = item.get("reason") or scores.get(name, {}).get("reason")
        if failure:
            lines.append(f"| {name} | no file that runs: {failure.replace('|', '/')} | | | | | | |")
            continue
        row, timing = scores[name], times[name]
        interval = f"{timing['ratio_low']:.2f} to {timing['ratio_high']:.2f}"
        mark = f"**{name}** (ships)" if name == ships else name
        lines.append(
            f"| {mark} | {100 * row['validation']:.2f} % | {100 * row['test']:.2f} % | {row['test_changed']} "
            f"| {timing['p50_ms']:.3f} | {timing['ratio']:.2f}x ({interval}) "
            f"| {size / item['bytes']:.2f}x smaller | {item['seconds']:.0f} s |"
        )
    verdict = beside(ships, files, scores, times, len(read(work / "arrays.npz").labels["test"])) if ships else []
    return "\n".join([*lines, "", f"Timed together at one thread: {whole['contention']}.", "", *verdict, ""])


def beside(ships: str, files: dict[str, Any], scores: dict[str, Any], times: dict[str, Any], count: int) -> list[str]:
    """What ships against each other file that runs. Two files can differ only in samples where one of them differs from
    fp32, so that chance alone moves the difference by about the root of the sum of those."""
    ours, lines = (
        scores[ships],
        ["| what ships against | test accuracy | chance (95 %) | latency |", "|---|---|---|---|"],
    )
    for name in files:
        if name.startswith("ours") or name not in times:
            continue
        other = scores[name]
        chance = 1.96 * (ours["test_changed"] + other["test_changed"]) ** 0.5 / count
        gained = ours["test"] - other["test"]
        lines.append(
            f"| {name} | {100 * gained:+.2f} points ({round(gained * count):+d} of {count} samples) "
            f"| within {100 * chance:.2f} points | {times[ships]['ratio'] / times[name]['ratio']:.2f}x as fast |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--dump", type=Path, metavar="RECIPE", required=True, help="whose data and preprocessing count")
    parser.add_argument("--factory", help="the run's --model")
    parser.add_argument("--olive", type=Path, help="virtual environment with olive-ai 0.13")
    parser.add_argument("--modelopt", type=Path, help="virtual environment with nvidia-modelopt 0.47")
    parser.add_argument("--drop", type=float, default=0.003, help="accepted loss on validation")
    parser.add_argument("--steps", nargs="*", default=STEPS, choices=STEPS)
    words = parser.parse_args()
    words.work = words.work.resolve()
    words.work.mkdir(parents=True, exist_ok=True)
    arrays = words.work / "arrays.npz"
    if "arrays" in words.steps and not arrays.is_file():
        dump(words.dump, words.factory, arrays)
    data = read(arrays)
    if "files" in words.steps:
        make_files(words.model.resolve(), data, words)
    if "scores" in words.steps:
        score(words.model.resolve(), data, words.work)
    if "times" in words.steps:
        timed(words.model.resolve(), data, words.work)
    if "page" in words.steps:
        print(page(words.model, words.work, words.drop))


if __name__ == "__main__":
    main()
