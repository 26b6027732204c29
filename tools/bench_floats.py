"""Narrower floats on real files: what the overflow lint keeps, and how far each form is from float32 on other samples.

    python -m tools.bench_floats [--work build/bench]      prints the table of docs/evidence/floats.md

Every form is run as a float32 file that rounds where the real one does (docs/quantize.md). ``no lint`` is float16 of
every node that has such a form.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from onnx import ModelProto

from compressor.errors import StageError
from compressor.models.onnx_graph import read_model
from compressor.quantize.floats.convert import convert
from compressor.quantize.floats.emulate import emulated
from compressor.quantize.floats.formats import FORMATS
from compressor.quantize.floats.make import FloatFile, make_float
from compressor.quantize.prepare import prepare
from compressor.quantize.watch import Calibration, output_sqnr_db
from compressor.types import Inputs

BUILD = Path("build")
SAMPLES = 8  # for the lint, and as many others for the comparison


def models(work: Path) -> Iterator[tuple[str, Path, Inputs]]:
    """Name, float32 file and 16 real samples."""
    for path in sorted((BUILD / "public").glob("*.onnx")):
        with np.load(path.with_suffix(".npz")) as stored:
            yield path.stem, path, {name: stored[name][: 2 * SAMPLES] for name in stored.files}
    for path in sorted((BUILD / "text-3" / "store").glob("export-teacher-*/model.onnx"))[:1]:
        yield "movie-reviews teacher", path, texts()
    path = work / "weight-only" / "fp32.onnx"
    if path.is_file():
        ids = np.load(path.with_name("ids.npz"))["test"][:4, :-1]
        yield "SmolLM2-135M", path, {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def texts() -> Inputs:
    """Reviews as token ids of one length."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(BUILD / "movie-teacher" / "tokenizer.json"))
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(64)
    with (BUILD / "movie-reviews" / "test.csv").open(newline="") as file:
        rows = [row["text"] for row, _ in zip(csv.DictReader(file), range(2 * SAMPLES), strict=False)]
    found = tokenizer.encode_batch(rows)
    ids = np.array([item.ids for item in found], np.int64)
    mask = np.array([item.attention_mask for item in found], np.int64)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def batches(inputs: Inputs, first: bool) -> Calibration:
    half = len(next(iter(inputs.values()))) // 2
    rows = slice(0, half) if first else slice(half, 2 * half)

    def call() -> Iterator[Inputs]:
        for start in range(half)[::2]:
            yield {name: array[rows][start : start + 2] for name, array in inputs.items()}

    return call


def row(name: str, path: Path, inputs: Inputs) -> str:
    """One line: the distance of each form, and what the lint said of float16."""
    model = prepare(read_model(path))
    seen, other = batches(inputs, first=True), batches(inputs, first=False)
    plain = convert(model, FORMATS["fp16"], {})
    cells = [decibels(model, emulated(plain.model, plain.half, FORMATS["fp16"]), other)]
    made: dict[str, FloatFile] = {}
    for kind in ("fp16", "bf16", "fp8"):
        try:
            made[kind] = make_float(model, kind, seen, {})
            cells.append(decibels(model, made[kind].stand_in, other))
        except StageError as error:
            cells.append(str(error))
    return f"| {name} | {' | '.join(cells)} | {told(made['fp16'])} |"


def decibels(model: ModelProto, form: ModelProto, data: Calibration) -> str:
    found = output_sqnr_db(model, form, data)
    return f"{found:.1f} dB" if found > -100 else "not finite"


def told(made: FloatFile) -> str:
    kept = [fact for fact in made.facts if fact.action == "kept-fp32"]
    changed = [fact for fact in made.facts if fact.action == "changed"]
    parts = [f"{len(kept)} nodes stay float32"] * bool(kept) + [f"{len(changed)} mask constants changed"] * bool(
        changed
    )
    first = [f"`{fact.layer}`: {fact.reason}" for fact in (*changed[:1], *kept[:1])]
    return "; ".join([*parts, *first]) or "nothing"


def page(work: Path) -> str:
    lines = [
        "| file | fp16, no lint | fp16 | bf16 | fp8 | the lint on fp16 |",
        "|---|---|---|---|---|---|",
    ]
    for name, path, inputs in models(work):
        lines.append(row(name, path, inputs))
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=BUILD / "bench")
    page(parser.parse_args().work)


if __name__ == "__main__":
    main()
