"""A precision for each layer under a size budget, beside null twins of equal size; and what 4-bit forms cost per call.

    python -m tools.bench_size_budget [--work build/bench]      (what is done is not done again)

Two fp32 students (those of ``tools.bench quantize``), budgets as shares of their files. Null twins: the same file form
with layers drawn at random instead of by noise (``TWINS`` draws), and 4 bits in every layer. Prints the tables of
``docs/evidence/mixed-precision.md``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from compressor.models.onnx_facts import describe
from compressor.models.onnx_graph import save_model
from compressor.profile import load_profile
from compressor.quantize import Variant, quantize
from compressor.quantize.containers import integers
from compressor.quantize.promise import FloatBase, IntegerBase, Prospect, TooSmall, fit_size
from compressor.quantize.promise.packing import pack, written
from compressor.quantize.promise.size import compose
from compressor.quantize.watch import sqnr_db
from compressor.types import Array, Artifact, Format, file_digest
from tools.bench_quantize import Data, keep, kept, read, session

PRECISIONS = ("int4", "int8", "fp16", "fp32")
SHARES = (0.23, 0.20, 0.17, 0.14, 0.10)  # of the fp32 file
TWINS = 3
PARTS = ("vision", "text", "forms")
DROP = 0.005  # allowed on validation
TIMED = 16
STATIC = Variant("int8-static-per-channel-ort", "onnxruntime", "static", True)
DYNAMIC = Variant("int8-dynamic-ort", "onnxruntime", "dynamic", True, ("Gather", "Gemm", "MatMul"))


class Subject:
    """One student with its data, its int8 file, and what was found so far."""

    def __init__(self, title: str, model: Path, work: Path, variant: Variant, data: Data, trials: int) -> None:
        facts = describe(model)
        self.title, self.work, self.variant, self.data, self.trials = title, work, variant, data, trials
        self.source = Artifact(
            "student/fp32", "student", model, Format.ONNX, "fp32", facts.inputs, facts.outputs, file_digest(model),
            facts.parameters,
        )  # fmt: skip
        self.rows: dict[str, Any] = kept(work / "rows.json")
        self._answers: dict[str, dict[str, Array]] = {}

    def int8(self) -> Artifact:
        path, rules = self.work / "int8.onnx", load_profile("this-machine").quantization
        return quantize(self.source, self.variant, rules, self.data.calibration, path, cache=self.work / "ranges")

    def answers(self, path: Path) -> dict[str, Array]:
        """First outputs on validation and test, sample by sample."""
        found, run = {}, session(path)
        for split, labels in self.data.labels.items():
            found[split] = np.concatenate([run.run(None, self.data.one(split, at))[0] for at in range(len(labels))])
        return found

    def judged(self, name: str, path: Path, **more: Any) -> dict[str, Any]:
        """Accuracies, answers changed and noise on test of a file; kept under its name."""
        if name not in self.rows or self.rows[name]["digest"] != file_digest(path):
            if "fp32" not in self._answers:
                self._answers["fp32"] = self.answers(self.source.path)
            plain, got = self._answers["fp32"], self.answers(path)
            row: dict[str, Any] = {"digest": file_digest(path), "file": path.name, "bytes": path.stat().st_size}
            for split, labels in self.data.labels.items():
                row[split] = float((got[split].argmax(1) == labels).mean())
            row["changed"] = int((got["test"].argmax(1) != plain["test"].argmax(1)).sum())
            row["db"] = sqnr_db(plain["test"], got["test"]) if name != "fp32" else None
            self.rows[name] = row
        self.rows[name] |= more
        keep(self.work / "rows.json", self.rows)
        print(f"{self.title}: {name}: {self.rows[name]}", file=sys.stderr, flush=True)
        return dict(self.rows[name])

    def run(self) -> None:
        """All files of this student."""
        plain = self.judged("fp32", self.source.path)
        made = self.int8()
        self.judged("int8", made.path)
        rules = load_profile("this-machine").quantization
        base = IntegerBase(self.source, self.variant, made, rules, self.data.calibration, self.work / "ranges")
        prospects = [Prospect(item, PRECISIONS, self.data.calibration) for item in (base, FloatBase(self.source))]
        for share in SHARES:
            self.under(share, plain["validation"] - DROP, prospects)
        self.uniform(prospects[0])

    def under(self, share: float, floor: float, prospects: list[Prospect]) -> None:
        """Ours under a budget, and null twins of the same size."""
        name, budget, began = f"ours {100 * share:.0f} %", int(share * self.source.file_bytes), time.monotonic()
        path = self.work / f"ours-{100 * share:.0f}.onnx"
        if name in self.rows:
            return

        def score(artifact: Artifact) -> float:
            return float(self.judged(f"trial {artifact.digest[:12]}", artifact.path)["validation"])

        try:
            found = fit_size(prospects, score, floor, budget, path, trials=self.trials)
        except TooSmall as error:
            self.rows[name] = {"reason": str(error).partition("\n")[0], "smallest": error.smallest}
            keep(self.work / "rows.json", self.rows)
            return
        told = {"budget": budget, "stored": found.artifact.scheme["stored"], "base": found.artifact.scheme["base"]}
        self.judged(name, path, seconds=time.monotonic() - began, trials=len(found.trials), **told)
        for seed in range(TWINS):
            choice = drawn(found.prospect, budget, seed)
            twin = self.work / f"twin-{100 * share:.0f}-{seed}.onnx"
            save_model(compose(found.prospect, choice)[0], twin)
            assert twin.stat().st_size <= budget
            self.judged(f"twin {100 * share:.0f} % #{seed}", twin)

    def uniform(self, prospect: Prospect) -> None:
        if "int4" not in self.rows:
            path = self.work / "int4.onnx"
            save_model(compose(prospect, prospect.smallest())[0], path)
            self.judged("int4", path)

    def timed(self) -> None:
        """fp32, int8, 4 bits everywhere and ours, together at one thread."""
        from targets.measure import Settings, measure

        names = {name: row["file"] for name, row in self.rows.items() if "file" in row and " #" not in name}
        names = {name: file for name, file in names.items() if not name.startswith("trial")}
        if all("time" in self.rows[name] for name in names):
            return
        paths = {name: self.source.path if name == "fp32" else self.work / file for name, file in names.items()}
        samples = [self.data.one("validation", place) for place in range(TIMED)]

        def call(run: Any) -> Callable[[int], object]:
            return lambda place: run.run(None, samples[place])

        runs = {name: call(session(path)) for name, path in paths.items()}
        found = measure(runs, "fp32", len(samples), Settings(min_s=10.0, budget_s=40.0))
        for name, timing in found.timings.items():
            self.rows[name]["time"] = asdict(timing)
        self.rows["fp32"]["contention"] = found.contention.describe()
        keep(self.work / "rows.json", self.rows)

    def page(self) -> str:
        size = self.source.file_bytes
        lines = [
            f"\n## {self.title}\n",
            "| file | bytes | of fp32 | validation | test | answers changed | noise on test | p50, ms | speed-up |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        order = [name for name in self.rows if not name.startswith("trial")]
        order.sort(key=lambda name: (-self.rows[name].get("budget", self.rows[name].get("bytes", 0)), "twin" in name))
        groups: dict[str, list[dict[str, Any]]] = {}
        for name in order:
            groups.setdefault(name.partition(" #")[0], []).append(self.rows[name])
        reasons = []
        for name, rows in groups.items():
            if "reason" in rows[0]:
                reasons.append(f"{name.removeprefix('ours ')}: {rows[0]['reason']}.")
                continue
            lines.append(_row(name, rows, size))
        told = [
            f"{name}: {rows[0]['stored']} (on {rows[0]['base']}, {rows[0]['trials']} files scored)"
            for name, rows in groups.items()
            if "stored" in rows[0]
        ]
        return "\n".join([*lines, "", *(f"- {line}" for line in told + reasons), "",
                          f"Timed together at one thread: {self.rows['fp32'].get('contention', '')}.", ""])  # fmt: skip


def _row(name: str, rows: list[dict[str, Any]], size: int) -> str:
    """A line; of several draws the mean, and the worst and best test accuracy."""
    mean = {key: float(np.mean([row[key] for row in rows])) for key in ("bytes", "validation", "test", "changed")}
    test = f"{100 * mean['test']:.2f} %"
    if len(rows) > 1:
        test += f" ({100 * min(row['test'] for row in rows):.2f} to {100 * max(row['test'] for row in rows):.2f})"
        name = f"{name.replace('twin', 'null twin')}, mean of {len(rows)}"
    noise = "" if rows[0]["db"] is None else f"{np.mean([row['db'] for row in rows]):.1f} dB"
    timing = rows[0].get("time")
    times = ("", "") if timing is None else (f"{timing['p50_ms']:.3f}", f"{timing['ratio']:.2f}x")
    cells = [f"{mean['bytes']:,.0f}", f"{100 * mean['bytes'] / size:.1f} %", f"{100 * mean['validation']:.2f} %", test,
             f"{mean['changed']:.0f}", noise, *times]  # fmt: skip
    return f"| {name} | {' | '.join(cells)} |"


def drawn(prospect: Prospect, budget: int, seed: int) -> Mapping[str, str]:
    """4 bits everywhere, then layers to int8 in a random order, each that the real file still has room for."""
    choice = dict(prospect.smallest())
    model, pieces = compose(prospect, choice)
    left = budget - len(model.SerializeToString())
    for place in np.random.default_rng(seed).permutation(len(prospect.items)):
        item = prospect.items[place]
        more = item.option("int8").cost - pieces[item.layer]
        if more <= left:
            choice[item.layer], left = "int8", left - more
    return choice


def table_forms(work: Path) -> str:
    """Milliseconds a call of an embedding table and of a convolution in each 4-bit form that ONNX Runtime takes."""
    rng = np.random.default_rng(0)
    table = (0.05 * rng.standard_normal((30522, 384))).astype(np.float32)
    kernel = (0.05 * rng.standard_normal((128, 128, 3, 3))).astype(np.float32)
    ids = {"x": rng.integers(0, 30522, (1, 32))}
    picture = {"x": rng.standard_normal((1, 128, 14, 14)).astype(np.float32)}
    lines = ["| form | operator | bytes | p50 of a call, ms |", "|---|---|---|---|"]
    for name, model, inputs in (*_tables(table, ids), *_kernels(kernel, picture)):
        path = work / "form.onnx"
        save_model(model, path)
        run, times = session(path), []
        for _ in range(60):
            began = time.perf_counter()
            run.run(None, inputs)
            times.append(1e3 * (time.perf_counter() - began))
        kind = "Gather" if inputs is ids else "Conv"
        lines.append(f"| {name} | {kind} | {path.stat().st_size:,} | {np.median(times[10:]):.4f} |")
    return "\n".join(lines) + "\n"


def _made(nodes: list[Any], tensors: list[Any], kind: int, *, contrib: bool = False) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes, "form", [helper.make_tensor_value_info("x", kind, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], tensors,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21)] + ([helper.make_opsetid("com.microsoft", 1)] if contrib else [])
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _eight(array: Array) -> tuple[Array, Array]:
    scale = np.float32(np.abs(array).max() / 127)
    return np.round(array / scale).astype(np.int8), np.asarray(scale)


def _blocks(array: Array) -> tuple[Array, Array]:
    """INT4 codes of rows in blocks of 32 and their float scales."""
    rows = array.reshape(len(array), -1, 32)
    scale = np.abs(rows).max(axis=2) / 7
    codes = np.clip(np.round(rows / scale[..., None]), -8, 7)
    return codes.reshape(len(array), -1).astype(np.int32), scale.astype(np.float32)


def _tables(table: Array, ids: Mapping[str, Array]) -> list[tuple[str, onnx.ModelProto, Mapping[str, Array]]]:
    kind = TensorProto.INT64
    eight, scale = _eight(table)
    codes, scales = _blocks(table)
    whole = numpy_helper.from_array(scale, "s")
    after = [
        helper.make_node("Gather", ["t", "x"], ["r"]),
        helper.make_node("DequantizeLinear", ["r", "s"], ["y"]),
    ]
    part = written(pack(eight, 0), "t", "p.")
    four, four_scales = integers("c", TensorProto.INT4, codes), numpy_helper.from_array(scales, "s")
    pair = helper.make_node("DequantizeLinear", ["c", "s"], ["t"], axis=1, block_size=32)
    block = helper.make_node("GatherBlockQuantized", ["c", "x", "s"], ["y"], domain="com.microsoft", block_size=32,
                             gather_axis=0, quantize_axis=1)  # fmt: skip
    return [
        ("float32", _made([helper.make_node("Gather", ["t", "x"], ["y"])],
                          [numpy_helper.from_array(table, "t")], kind), ids),
        ("int8, rows dequantized", _made(after, [numpy_helper.from_array(eight, "t"), whole], kind), ids),
        ("4 bits, unpacked at loading (ours)", _made([*part.node, *after], [*part.initializer, whole], kind), ids),
        ("INT4, DequantizeLinear in blocks", _made([pair, helper.make_node("Gather", ["t", "x"], ["y"])],
                                                   [four, four_scales], kind), ids),
        ("INT4, GatherBlockQuantized", _made([block], [four, four_scales], kind, contrib=True), ids),
    ]  # fmt: skip


def _kernels(kernel: Array, picture: Mapping[str, Array]) -> list[tuple[str, onnx.ModelProto, Mapping[str, Array]]]:
    """A convolution by weights alone (its activations are float32)."""
    kind = TensorProto.FLOAT
    eight, scale = _eight(kernel)
    part = written(pack(eight, 0), "e", "p.")
    conv = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1], kernel_shape=[3, 3])
    whole = numpy_helper.from_array(scale, "s")
    four = integers("c", TensorProto.INT4, np.clip(np.round(kernel / (16 * scale)), -8, 7).astype(np.int32))
    folded = [helper.make_node("Cast", ["e"], ["f"], to=kind), helper.make_node("Mul", ["f", "s"], ["w"])]
    half = helper.make_node("Cast", ["h"], ["w"], to=kind)
    pair = helper.make_node("DequantizeLinear", ["c", "s"], ["w"])
    return [
        ("float32", _made([conv], [numpy_helper.from_array(kernel, "w")], kind), picture),
        ("float16, Cast", _made([half, conv],
                                [numpy_helper.from_array(kernel.astype(np.float16), "h")], kind), picture),
        ("4 bits, unpacked at loading (ours)",
         _made([*part.node, *folded, conv], [*part.initializer, whole], kind), picture),
        ("INT4, DequantizeLinear", _made([pair, conv], [four, whole], kind), picture),
    ]  # fmt: skip


def subjects(work: Path, trials: int) -> list[Subject]:
    """The students of ``tools.bench quantize``; what is missing is made by its commands."""
    from tools.evidence import command
    from tools.quantize_section import picture_student, text_student

    folder, found = work / "quantize", []
    folder.mkdir(parents=True, exist_ok=True)
    for (title, model, words), variant in (
        (picture_student(command, folder), STATIC),
        (text_student(command, work), DYNAMIC),
    ):
        place = folder / title.split(":")[0].lower()
        if not (place / "arrays.npz").is_file():
            call = [sys.executable, "-m", "tools.bench_quantize", model, "--work", place, *words, "--steps", "arrays"]
            command([str(word) for word in call])
        own = work / "size-budget" / place.name
        own.mkdir(parents=True, exist_ok=True)
        found.append(Subject(title, model, own, variant, read(place / "arrays.npz"), trials))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--trials", type=int, default=16, help="files that may be scored for one budget")
    words = parser.parse_args()
    work = words.work.resolve()
    for subject in subjects(work, words.trials):
        if subject.work.name in words.parts:
            subject.run()
            subject.timed()
            print(subject.page(), flush=True)
    if "forms" in words.parts:
        print("\n## What a 4-bit form costs ONNX Runtime per call\n")
        print(table_forms(work / "size-budget"))


if __name__ == "__main__":
    main()
