"""Ours, ONNX Runtime's defaults and NNCF's defaults on one fp32 file, with the same calibration data, in one process.

    python -m tools.bench_quantize MODEL.onnx ARRAYS.npz [--strict 0.0005] [--out FILE.md]

``ARRAYS.npz`` holds ``calibration.<input>``, ``validation.<input>``, ``test.<input>`` and ``validation_y``, ``test_y``;
``--dump RECIPE`` with the run's own ``--model`` and ``--data`` words writes it. Latencies are interleaved, one thread.
The second table makes the same promise to both accuracy controls: at most ``--strict`` lost on validation.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
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
from compressor.quantize.promise import restore
from compressor.recipe import QuantizeStage
from compressor.types import Array, Artifact, Format, file_digest

SPLITS = ("calibration", "validation", "test")
SAMPLES, BATCH = 256, 64


@dataclass(frozen=True)
class Data:
    """Arrays by split and input, and labels."""

    arrays: dict[str, dict[str, Array]]
    labels: dict[str, Array]

    def one(self, split: str, position: int) -> dict[str, Array]:
        return {name: array[position : position + 1] for name, array in self.arrays[split].items()}

    def calibration(self) -> Iterator[dict[str, Array]]:
        count = len(next(iter(self.arrays["calibration"].values())))
        return (self.one("calibration", position) for position in range(min(SAMPLES, count)))


@dataclass(frozen=True)
class Row:
    """One file of the table."""

    name: str
    path: Path
    seconds: float
    note: str = ""


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


def dump(words: argparse.Namespace) -> None:
    """Prepared inputs of a recipe's splits, so that every engine gets the very same arrays."""
    from compressor.cli.session import Request, open_session

    request = Request(words.dump, words.factory, words.loader, ("this-machine",), None, None, Path("build"))
    data = open_session(request).data
    found: dict[str, Array] = {}
    for name in SPLITS:
        split = data.splits[name]
        for key, array in split.batch(np.arange(len(split))).items():
            found[f"{name}.{key}"] = array.astype(np.int32) if array.dtype.kind == "i" else array
        if split.labels is not None:
            found[f"{name}_y"] = split.labels
    np.savez(words.arrays, **found)  # type: ignore[arg-type]


def session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def accuracy(path: Path, data: Data, split: str) -> float:
    run, arrays, labels = session(path), data.arrays[split], data.labels[split]
    hits = 0
    for start in range(0, len(labels), BATCH):
        part = {name: array[start : start + BATCH] for name, array in arrays.items()}
        hits += int((run.run(None, part)[0].argmax(1) == labels[start : start + BATCH]).sum())
    return hits / len(labels)


def ours(source: Artifact, data: Data, folder: Path) -> Iterator[Row]:
    rules = load_profile("this-machine").quantization
    wanted, _ = variants(QuantizeStage(kind="quantize"), rules, describe(source.path))
    for variant in wanted:
        began = time.monotonic()
        path = folder / f"{variant.name}.onnx"
        try:
            made = quantize(source, variant, rules, data.calibration, path, cache=folder)
        except CompressError as error:
            print(f"{variant.name}: {error}")
            continue
        yield Row(f"ours {variant.name}", path, time.monotonic() - began, made.scheme.get("corrections", ""))


class Reader:
    """ONNX Runtime's own interface to calibration data."""

    def __init__(self, data: Data) -> None:
        self.items = data.calibration()

    def get_next(self) -> dict[str, Array] | None:
        return next(self.items, None)


def onnxruntime_defaults(source: Artifact, data: Data, folder: Path) -> Iterator[Row]:
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared, path = folder / "prepared.onnx", folder / "ort-static.onnx"
    began = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()):
        quant_pre_process(str(source.path), str(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(str(prepared), str(path), Reader(data))
    yield Row("ONNX Runtime quantize_static, defaults", path, time.monotonic() - began)
    path = folder / "ort-dynamic.onnx"
    began = time.monotonic()
    quantization.quantize_dynamic(str(prepared), str(path))
    yield Row("ONNX Runtime quantize_dynamic, defaults", path, time.monotonic() - began)


def nncf_defaults(source: Artifact, data: Data, folder: Path) -> Iterator[Row]:
    import nncf
    import onnx

    began = time.monotonic()
    attention = describe(source.path).has_attention
    kind = nncf.ModelType.TRANSFORMER if attention else None
    with contextlib.redirect_stdout(io.StringIO()):
        made = nncf.quantize(onnx.load(source.path), nncf.Dataset(list(data.calibration())), model_type=kind)
    onnx.save(made, folder / "nncf.onnx")
    yield Row("NNCF quantize, defaults", folder / "nncf.onnx", time.monotonic() - began)


def nncf_control(source: Artifact, data: Data, folder: Path, drop: float) -> Row:
    """NNCF's accuracy control with the same promise, on the same splits."""
    import nncf
    import onnx

    labels = data.labels["validation"]
    items = [(data.one("validation", place), int(labels[place])) for place in range(len(labels))]

    def score(model: Any, samples: Any) -> tuple[float, None]:
        path = folder / "nncf-candidate.onnx"
        onnx.save(getattr(model, "model", model), path) if hasattr(model, "graph") else None
        run = session(path) if hasattr(model, "graph") else model
        hits = [run.run(None, inputs)[0].argmax(1)[0] == label for inputs, label in samples]
        return float(np.mean(hits)), None

    began = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()):
        made = nncf.quantize_with_accuracy_control(
            onnx.load(source.path),
            nncf.Dataset(list(data.calibration())),
            nncf.Dataset(items),
            score,
            max_drop=drop,
            drop_type=nncf.DropType.ABSOLUTE,
        )
    onnx.save(made, folder / "nncf-control.onnx")
    return Row("NNCF quantize_with_accuracy_control", folder / "nncf-control.onnx", time.monotonic() - began)


def our_control(source: Artifact, data: Data, folder: Path, drop: float) -> Row:
    rules = load_profile("this-machine").quantization
    wanted, _ = variants(QuantizeStage(kind="quantize", engines=("onnxruntime",)), rules, describe(source.path))
    baseline = accuracy(source.path, data, "validation")
    began = time.monotonic()
    made: dict[str, float] = {}
    for variant in wanted:
        path = folder / f"control-{variant.name}.onnx"
        quantize(source, variant, rules, data.calibration, path, cache=folder)
        made[variant.name] = accuracy(path, data, "validation")
    best = max(wanted, key=lambda variant: made[variant.name])
    if made[best.name] >= baseline - drop:
        path = folder / f"control-{best.name}.onnx"
        return Row("ours, layers put back", path, time.monotonic() - began, f"{best.name} holds as it is")
    found = restore(
        source, best, rules, data.calibration, lambda item: accuracy(item.path, data, "validation"), baseline - drop,
        folder / "mixed.onnx", cache=folder,
    )  # fmt: skip
    note = f"{len(found.kept_float)} of {len(found.ranking)} layers in float, {len(found.trials)} files made"
    held = "" if found.holds else ", the promise does not hold"
    return Row("ours, layers put back", found.artifact.path, time.monotonic() - began, note + held)


def table(rows: list[Row], source: Artifact, data: Data) -> list[str]:
    """Accuracy, size and interleaved latency of every file beside fp32."""
    from targets.measure import measure

    rows = [Row("fp32", source.path, 0.0), *rows]
    samples = [data.one("validation", place) for place in range(16)]
    sessions = {row.name: session(row.path) for row in rows}

    def call(run: Any) -> Callable[[int], object]:
        return lambda place: run.run(None, samples[place])

    timings = measure({name: call(run) for name, run in sessions.items()}, "fp32", len(samples)).timings
    lines = [
        "| file | validation | test | p50, ms | speed-up over fp32 | size | quantized in | note |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        timing, size = timings[row.name], row.path.stat().st_size
        lines.append(
            f"| {row.name} | {accuracy(row.path, data, 'validation'):.4f} | {accuracy(row.path, data, 'test'):.4f} "
            f"| {timing.p50_ms:.3f} | {timing.ratio:.2f}x | {source.file_bytes / size:.2f}x smaller "
            f"| {row.seconds:.0f} s | {row.note} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("arrays", type=Path)
    parser.add_argument("--strict", type=float, default=0.0005, help="promise of the second table")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dump", type=Path, metavar="RECIPE", help="write ARRAYS from a recipe first")
    parser.add_argument("--factory", help="the run's --model")
    parser.add_argument("--loader", help="the run's --data")
    words = parser.parse_args()
    if words.dump:
        dump(words)
    facts, data = describe(words.model), read(words.arrays)
    digest = file_digest(words.model)
    source = Artifact(
        "student/fp32", "student", words.model, Format.ONNX, "fp32", facts.inputs, facts.outputs, digest,
        facts.parameters,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [*ours(source, data, folder), *onnxruntime_defaults(source, data, folder)]
        rows += nncf_defaults(source, data, folder)
        lines = [*table(rows, source, data), "", f"Promise: at most {100 * words.strict:g} points on validation.", ""]
        control = [our_control(source, data, folder, words.strict), nncf_control(source, data, folder, words.strict)]
        lines += table(control, source, data)
    text = "\n".join(lines) + "\n"
    print(text)
    if words.out:
        words.out.write_text(text)


if __name__ == "__main__":
    main()
