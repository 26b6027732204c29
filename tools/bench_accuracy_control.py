"""Layers put back to float until a promise holds: ours (`int8-mixed-ort`) beside NNCF's accuracy control.

    python -m tools.bench_accuracy_control [--work build/bench] [--models NAME ...]    (what is done is not done again)

Public ONNX files on which plain int8 misses the promise (``tools.public_models``), the same calibration, validation and
test samples, the same metric (agreement with float32) and limit for both, one thread. NNCF's ONNX and OpenVINO back
ends run with their defaults. Prints a table of ``docs/evidence/mixed-precision.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from compressor.evaluate import quality, score, unit_of
from compressor.models.onnx_facts import describe
from compressor.models.onnx_graph import read_model
from compressor.profile import load_profile
from compressor.quantize import quantize, variants
from compressor.quantize.coverage import layer_facts
from compressor.quantize.nncf_engine import import_nncf, silence
from compressor.quantize.prepare import prepare
from compressor.quantize.promise import restore
from compressor.recipe import QuantizeStage
from compressor.stages.mixed import settled
from compressor.types import Array, Artifact, Format, file_digest
from tools.bench_quantize import keep, kept, session

MODELS = ("mtcnn-onet", "mtcnn-rnet", "basic-pitch")
PARTS = {"calibration": 64, "validation": 48, "test": 48}  # of the 160 samples, in a fixed random order
DROP = 0.02
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
TIMED = 8
CLOSE = 1e-5  # two runtimes in float32: NNCF scores float32 first, then plain int8
Sample = dict[str, Array]
Run = Callable[[Sample], Array]


@dataclass
class Subject:
    """One float32 file and its samples. ``evaluations``: passes over the validation split."""

    name: str
    model: Path
    parts: dict[str, list[Sample]]
    evaluations: float = 0
    plain: dict[str, Array] = field(default_factory=dict)

    def calibration(self) -> Iterator[Sample]:
        return iter(self.parts["calibration"])

    def metric(self, run: Run, split: str, places: Sequence[int] | None = None) -> float:
        """Agreement of the first output with float32's, over these samples of a split (all when left out)."""
        if split not in self.plain:
            plain = in_onnxruntime(self.model)
            self.plain[split] = np.concatenate([plain(sample) for sample in self.parts[split]])
        chosen = list(range(len(self.parts[split]))) if places is None else list(places)
        self.evaluations += len(chosen) / len(self.parts[split]) if split == "validation" else 0
        outputs = np.concatenate([run(self.parts[split][place]) for place in chosen])
        return quality(score("generic", outputs, None, self.plain[split][chosen]), unit_of("generic"))


def opened(name: str, folder: Path) -> Subject:
    with np.load(folder / f"{name}.npz", allow_pickle=False) as stored:
        arrays = {key: stored[key] for key in stored.files}
    order = np.random.default_rng(0).permutation(len(next(iter(arrays.values()))))
    parts, start = {}, 0
    for part, count in PARTS.items():
        chosen = order[start : start + count]
        parts[part] = [{key: array[at : at + 1] for key, array in arrays.items()} for at in chosen]
        start += count
    return Subject(name, folder / f"{name}.onnx", parts)


def in_onnxruntime(path: Path) -> Run:
    run = session(path)
    fed = {value.name for value in run.get_inputs()}
    return lambda sample: np.asarray(run.run(None, {key: array for key, array in sample.items() if key in fed})[0])


def in_openvino(path: Path) -> Run:
    """The file in OpenVINO at one thread, float32 arithmetic where it is not quantized."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    names = [value.get_any_name() for value in compiled.inputs]
    return lambda sample: np.asarray(compiled([sample[name] for name in names])[0])


def ours(subject: Subject, out: Path) -> dict[str, Any]:
    """As in a run: every int8 variant of this machine's profile, then layers back in the best of them."""
    facts, rules = describe(subject.model), load_profile("this-machine").quantization
    source = Artifact(
        "student/fp32", "student", subject.model, Format.ONNX, "fp32", facts.inputs, facts.outputs,
        file_digest(subject.model), facts.parameters,
    )  # fmt: skip
    stage = QuantizeStage(kind="quantize", engines=("onnxruntime",))
    made, known = [], dict[str, float]()

    def judge(artifact: Artifact) -> float:
        if artifact.digest not in known:
            known[artifact.digest] = subject.metric(in_onnxruntime(artifact.path), "validation")
        return known[artifact.digest]

    with tempfile.TemporaryDirectory(prefix="control-") as folder:
        cache = Path(folder)
        for variant in variants(stage, rules, facts)[0]:
            path = cache / f"{variant.name}.onnx"
            made.append((variant, quantize(source, variant, rules, subject.calibration, path, cache=cache)))
        plain = {variant.name: judge(artifact) for variant, artifact in made}
        base = max(made, key=lambda pair: judge(pair[1]))
        if judge(base[1]) >= 1 - DROP:
            out.write_bytes(base[1].path.read_bytes())
            return {"plain": plain, "base": base[0].name, "needed": False}
        found = restore(source, settled(*base), rules, subject.calibration, judge, 1 - DROP, out, cache=cache)
    return {"plain": plain, "base": base[0].name, "needed": True, "trials": len(found.trials)}


def nncf_onnx(subject: Subject, out: Path) -> dict[str, Any]:
    nncf = import_nncf()
    model = prepare(read_model(subject.model))
    plain: list[float] = []

    def validate(given: Any, samples: Any) -> float:
        with tempfile.TemporaryDirectory(prefix="control-") as folder:
            path = Path(folder) / "m.onnx"
            onnx.save(given, path)
            plain.append(subject.metric(in_onnxruntime(path), "validation", [place for place, _ in samples]))
        return plain[-1]

    result = _controlled(nncf, model, subject, validate)
    onnx.save(result, out)
    return {"plain": {"nncf.quantize": next((value for value in plain if value < 1 - CLOSE), 1.0)}}


def nncf_openvino(subject: Subject, out: Path) -> dict[str, Any]:
    import openvino

    nncf = import_nncf()
    model = openvino.convert_model(str(subject.model))
    names = [value.get_any_name() for value in model.inputs]
    plain: list[float] = []

    def validate(compiled: Any, samples: Any) -> float:
        def run(sample: Sample) -> Array:
            return np.asarray(compiled([sample[name] for name in names])[0])

        plain.append(subject.metric(run, "validation", [place for place, _ in samples]))
        return plain[-1]

    result = _controlled(nncf, model, subject, validate)
    openvino.save_model(result, str(out), compress_to_fp16=False)
    return {"plain": {"nncf.quantize": next((value for value in plain if value < 1 - CLOSE), 1.0)}}


def _controlled(nncf: Any, model: Any, subject: Subject, validate: Callable[[Any, Any], float]) -> Any:
    """NNCF's accuracy control at its defaults, with the same 64 calibration and 48 validation samples."""
    samples = [dict(sample) for sample in subject.parts["calibration"]]
    numbered = nncf.Dataset(list(enumerate(subject.parts["validation"])), lambda item: dict(item[1]))
    with silence():
        return nncf.quantize_with_accuracy_control(
            model, nncf.Dataset(samples), numbered, validate, max_drop=DROP, subset_size=len(samples)
        )


METHODS: dict[str, tuple[Callable[[Subject, Path], dict[str, Any]], str]] = {
    "ours, int8-mixed-ort": (ours, ".onnx"),
    "NNCF 3.4, ONNX": (nncf_onnx, ".onnx"),
    "NNCF 3.4, OpenVINO": (nncf_openvino, ".xml"),
}


def floats_left(subject: Subject, path: Path) -> tuple[int, int]:
    """Weighted layers in float, of all."""
    if path.suffix != ".onnx":
        return _floats_in_openvino(path)
    source = prepare(read_model(subject.model))
    facts = layer_facts(source, read_model(path), {}, None)
    kinds = {node.name: node.op_type for node in source.graph.node}
    rows = [fact for fact in facts if kinds.get(fact.layer) in LAYERS]
    return sum(fact.action != "quantized" for fact in rows), len(rows)


def _floats_in_openvino(path: Path) -> tuple[int, int]:
    """The same of OpenVINO's format: a quantized layer reads a FakeQuantize, perhaps through what only moves it."""
    import openvino

    moved, found = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "MaxPool", "Pad"), list[bool]()
    for op in openvino.Core().read_model(str(path)).get_ops():
        if op.get_type_name() in ("Convolution", "GroupConvolution", "MatMul"):
            source = op.input_value(0).get_node()
            while source.get_type_name() in moved:
                source = source.input_value(0).get_node()
            found.append(source.get_type_name() == "FakeQuantize")
    return found.count(False), len(found)


def made(subject: Subject, work: Path) -> dict[str, Any]:
    """Every method's file, its scores and what it took; kept."""
    rows = kept(work / "rows.json")
    for name, (make, suffix) in METHODS.items():
        if name in rows:
            continue
        path = work / f"{'-'.join(name.lower().replace(',', '').split())}{suffix}"
        subject.evaluations, began, cpu = 0, time.monotonic(), time.process_time()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                row = make(subject, path)
            row |= {"file": path.name, "evaluations": subject.evaluations}
            row |= {"seconds": time.monotonic() - began, "cpu": time.process_time() - cpu}
            run = in_onnxruntime(path) if suffix == ".onnx" else in_openvino(path)
            row |= {split: subject.metric(run, split) for split in ("validation", "test")}
            row["float"] = floats_left(subject, path)
        except Exception as error:  # noqa: BLE001 - another project's fault is a row of the table
            row = {"reason": f"{type(error).__name__}: {error}"[:300]}
        rows[name] = row
        print(f"{subject.name}: {name}: {row}", file=sys.stderr, flush=True)
        keep(work / "rows.json", rows)
    return rows


def timed(subject: Subject, work: Path, rows: dict[str, Any]) -> None:
    """All files in each runtime that loads them, together at one thread."""
    from targets.measure import Settings, measure

    if "times" in rows:
        return
    samples = subject.parts["validation"][:TIMED]
    found: dict[str, Run] = {}
    paths = {"float32": subject.model} | {name: work / row["file"] for name, row in rows.items() if "file" in row}
    for name, path in paths.items():
        for runtime, load in (("ONNX Runtime", in_onnxruntime), ("OpenVINO", in_openvino)):
            with contextlib.suppress(Exception):  # OpenVINO's own files, or one that a runtime refuses
                run = load(path)
                run(samples[0])
                found[f"{name} in {runtime}"] = run

    def call(run: Run) -> Callable[[int], object]:
        return lambda place: run(samples[place])

    settings = Settings(min_s=10.0, budget_s=30.0)
    runs = {name: call(run) for name, run in found.items()}
    times = measure(runs, "float32 in ONNX Runtime", len(samples), settings)
    rows["times"] = {name: asdict(timing) for name, timing in times.timings.items()}
    rows["contention"] = times.contention.describe()
    keep(work / "rows.json", rows)


def page(subject: Subject, rows: dict[str, Any]) -> str:
    lines = [
        f"\n### {subject.name}\n",
        "| | agreement, validation | test | layers in float | evaluations | CPU, s | p50 in ONNX Runtime | OpenVINO |",
        "|---|---|---|---|---|---|---|---|",
        f"| float32 | 1 | 1 | all | | | {_time(rows, 'float32')} |",
    ]
    for name in METHODS:
        row = rows[name]
        if "reason" in row:
            lines.append(f"| {name} | no file: {row['reason'].replace('|', '/')} | | | | | | |")
            continue
        plain = ", ".join(f"{value:.4f}" for value in row["plain"].values())
        left = f"{row['float'][0]} of {row['float'][1]}"
        lines.append(
            f"| {name} | {row['validation']:.4f} (plain int8: {plain}) | {row['test']:.4f} | {left} "
            f"| {row['evaluations']:.0f} | {row['cpu']:.0f} | {_time(rows, name)} |"
        )
    return "\n".join([*lines, "", f"Timed together at one thread: {rows['contention']}.", ""])


def _time(rows: dict[str, Any], name: str) -> str:
    cells = []
    for runtime in ("ONNX Runtime", "OpenVINO"):
        timing = rows["times"].get(f"{name} in {runtime}")
        cells.append("not read" if timing is None else f"{timing['p50_ms']:.3f} ms ({timing['ratio']:.2f}x)")
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    parser.add_argument("--public", type=Path, default=Path("build/public"), help="what tools.public_models wrote")
    parser.add_argument("--models", nargs="*", default=MODELS)
    words = parser.parse_args()
    for name in words.models:
        work = (words.work / "accuracy-control" / name).resolve()
        work.mkdir(parents=True, exist_ok=True)
        subject = opened(name, words.public)
        rows = made(subject, work)
        timed(subject, work, rows)
        print(page(subject, rows), flush=True)


if __name__ == "__main__":
    main()
