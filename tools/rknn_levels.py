"""What RKNN-Toolkit2's levels of optimisation do to a quantized digits student: the simulator against ONNX Runtime.

    python -m tools.rknn_levels STUDENT.onnx [--levels 3 2 0]

The student is quantized by the rules of ``rockchip-rk3588``, per channel and per tensor; validation and test pictures.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime

from compressor.models.onnx_facts import describe_model
from compressor.models.onnx_graph import read_model
from compressor.profile import load_profile
from compressor.quantize.ptq import quantize
from compressor.quantize.variants import variants
from compressor.recipe import QuantizeStage
from compressor.types import Array, Artifact
from examples.digits import load
from targets import registry
from tools.operator_groups import as_artifact

PROFILE = load_profile("rockchip-rk3588")


def arrays(*parts: str) -> tuple[Array, Array]:
    """Pixels (N, 1, 8, 8) in 0..1, and digits."""
    data = load()
    pixels, digits = (np.concatenate([data[part][place] for part in parts]) for place in (0, 1))
    return pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255, digits


def quantized(student: Artifact, folder: Path) -> list[Artifact]:
    """The static int8 files that we make for the profile."""
    stage = QuantizeStage(kind="quantize", engines=("onnxruntime",), corrections=())
    facts = describe_model(read_model(student.path), student.path.stat().st_size)
    chosen, _ = variants(stage, PROFILE.quantization, facts)
    batch = {student.inputs[0].name: arrays("calibration")[0]}
    static = [variant for variant in chosen if variant.kind == "static"]
    return [
        quantize(student, variant, PROFILE.quantization, lambda: iter([batch]), folder / f"{variant.name}.onnx")
        for variant in static
    ]


def row(artifact: Artifact, level: int, folder: Path) -> str:
    """One line of the table."""
    profile = PROFILE.model_copy(update={"options": {**PROFILE.options, "optimisation": level}})
    pixels, digits = arrays("validation", "test")
    inputs, backend = {artifact.inputs[0].name: pixels}, registry.get("rknn")
    expected = onnxruntime.InferenceSession(str(artifact.path)).run(None, inputs)[0]
    compiled = backend.compile(artifact, profile, folder / f"level-{level}")
    with backend.open(compiled, profile) as session:
        found = session.run(inputs)[artifact.outputs[0].name]
    correct, same = np.mean(found.argmax(1) == digits), np.mean(found.argmax(1) == expected.argmax(1))
    noise = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
    worst = np.abs(found - expected).max() / np.abs(expected).max()
    cycles = next(item.value for item in compiled.estimates if item.unit == "cycles")
    reference = np.mean(expected.argmax(1) == digits)
    return (
        f"| {artifact.name} | {level} | {reference:.2%} | {correct:.2%} | {same:.2%} | {noise:.1%} | {worst:.1%} "
        f"| {cycles:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path)
    parser.add_argument("--levels", type=int, nargs="+", default=[3, 2, 0])
    options = parser.parse_args()
    student = as_artifact(options.student, read_model(options.student), "fp32")
    print("| file | level | ONNX Runtime | simulator | same digit | noise (RMS) | worst difference | cycles counted |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for artifact in quantized(student, Path(folder)):
            for level in options.levels:
                print(row(artifact, level, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
