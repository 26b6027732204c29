"""A run as the pipeline hands it over: five profiles in five states, with real-looking figures and hostile names."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor.types import (
    Artifact,
    Figure,
    Format,
    LayerFact,
    Measurement,
    Origin,
    Role,
    StageResult,
    TensorSpec,
    Unavailable,
)
from targets.base import Compiled, Coverage, NodeFact
from targets.outcome import DataFacts, Loyalty, ParityRow, ProfileOutcome, Promise, Row, RunSummary, State

HOST = "AMD EPYC 9654 (2 threads)"
UNTOUCHED = Unavailable("the test set is touched once, by what was chosen", "Validation is what candidates compete on.")
NO_BOARD = Unavailable("no Raspberry Pi 5 is attached", "Give `--device ssh://...` to measure on one.")
NO_GPU = Unavailable("no NVIDIA GPU is on this machine")

# name, role, _, validation, test, p50 ms, file bytes, peak MiB, speed-up, quantized of total
Line = tuple[str, Role, str, float, float | None, float, int, float, float, tuple[int, int] | None]
LINES: list[Line] = [
    ("teacher/fp32", "teacher", "fp32", 0.9388, 0.9381, 4.02, 4_421_310, 71.3, 1.0, None),
    ("null-twin/fp32", "null-twin", "fp32", 0.9241, 0.9226, 0.488, 405_120, 47.5, 8.24, None),
    ("student/fp32", "student", "fp32", 0.9372, 0.9358, 0.486, 405_120, 47.1, 8.27, None),
    ("student/int8-static-per-tensor", "student", "int8-static", 0.9301, None, 0.262, 118_734, 44.9, 15.3, (6, 7)),
    ("student/int8-static-per-channel", "student", "int8-static", 0.9368, 0.9352, 0.271, 121_902, 45.2, 14.8, (6, 7)),
    ("student/int8-static-nncf", "student", "int8-static", 0.9364, None, 0.283, 124_410, 45.4, 14.2, (6, 7)),
    ("student/int8-dynamic", "student", "int8-dynamic", 0.9371, None, 0.731, 119_001, 46.0, 5.5, (1, 7)),
]
REASONS = {
    "teacher/fp32": "the reference",
    "null-twin/fp32": "for comparison only: never a candidate",
    "student/fp32": "1.79x slower than student/int8-static-per-channel",
    "student/int8-static-per-tensor": "loses 0.87 points of validation accuracy; at most 0.50 accepted",
    "student/int8-static-per-channel": "the fastest of 5 candidates that keep the promise",
    "student/int8-static-nncf": "1.04x slower than student/int8-static-per-channel",
    "student/int8-dynamic": "slower than student/fp32: ConvInteger has no fast kernel on this processor",
}


def facts(stage: str, actions: list[tuple[str, str, str, str, str]]) -> tuple[LayerFact, ...]:
    return tuple(LayerFact(stage, *action) for action in actions)


PRUNED = facts(
    "prune",
    [(f"stage{i}.conv{j}", "pruned", f"{64 * i} channels", f"{16 * i} channels", "") for i in (1, 2, 3) for j in (1, 2)]
    + [("stem", "kept", "64 channels", "64 channels", "protected by the recipe")],
)
QUANTIZED = facts(
    "quantize",
    [(f"/stage{i}/conv{j}/Conv", "quantized", "fp32", "int8", "") for i in (1, 2, 3) for j in (1, 2)]
    + [("/head/Gemm", "left-float", "fp32", "fp32", "its output is the answer of the model <b>")],
)


@pytest.fixture
def artifacts(tmp_path: Path) -> dict[str, Artifact]:
    made = {}
    for (
        name,
        role,
        precision,
        *_,
    ) in LINES:
        path = tmp_path / "artifacts" / f"{name.replace('/', '-')}.onnx"
        made[name] = Artifact(
            name=name,
            role=role,
            path=path,
            format=Format.ONNX,
            precision=precision,
            inputs=(TensorSpec("image", "float32", ("batch", 1, 28, 28)),),
            outputs=(TensorSpec("logits", "float32", ("batch", 10)),),
            digest="sha256:" + "ab" * 32,
            parameters=1_100_000 if role == "teacher" else 98_000,
            scheme={} if precision == "fp32" else {"engine": "onnxruntime", "weight": "int8"},
            facts=QUANTIZED if precision != "fp32" else (),
        )
    return made


def build_row(line: Line, artifact: Artifact, folder: Path, shipped: bool = True) -> Row:
    name, role, _, validation, test, p50, size, peak, speedup, kernels = line
    detail = {"p90": p50 * 1.05, "p95": p50 * 1.09, "p99": p50 * 1.3, "mean": p50 * 1.01, "rounds": 40, "threads": 1}

    def here(value: float, unit: str, **more: float) -> Measurement:
        return Measurement(value, unit, Origin.MEASURED, HOST, more)

    floats = (NodeFact("/head/Gemm", "Gemm", False, "its output is the answer of the model"),) if kernels else ()
    coverage = Coverage(*kernels, left_float=floats) if kernels else None
    return Row(
        artifact=artifact,
        state=State.EXECUTED,
        validation=here(validation, "accuracy"),
        test=here(test, "accuracy") if test is not None else UNTOUCHED,
        latency=here(p50, "ms", **detail),
        speedup=here(speedup, "x"),
        file_bytes=here(size, "bytes"),
        peak_memory=here(peak, "MiB"),
        loyalty=Loyalty(0.962, 0.941) if test is not None and role == "student" else None,
        agreement=0.9951 if shipped and kernels and test is not None else None,
        compiled=Compiled(
            folder / "targets" / "this-machine" / f"{artifact.digest[7:15]}.onnx",
            artifact,
            placed=19,
            coverage=coverage,
        ),
        coverage=coverage,
        shipped=shipped and name == "student/int8-static-per-channel",
        reason=REASONS[name],
    )


def replace_figures(row: Row, state: State, origin: Origin, device: str, missing: Unavailable) -> Row:
    """The same row where nothing can be timed: accuracy of another origin, latency absent."""

    def moved(figure: Figure) -> Figure:
        return Measurement(figure.value, figure.unit, origin, device) if isinstance(figure, Measurement) else figure

    return Row(
        artifact=row.artifact,
        state=state,
        validation=moved(row.validation),
        test=moved(row.test),
        latency=missing,
        speedup=missing,
        file_bytes=row.file_bytes,
        peak_memory=missing,
        compiled=row.compiled,
        coverage=row.coverage,
        shipped=row.shipped,
        reason=row.reason,
    )


@pytest.fixture
def summary(tmp_path: Path, artifacts: dict[str, Artifact]) -> RunSummary:
    rows = tuple(build_row(line, artifacts[line[0]], tmp_path) for line in LINES)
    promise = Promise(max_drop=0.005, max_latency_ms=1.0)
    pi = tuple(
        replace_figures(row, State.PROXY, Origin.PROXY, "ONNX Runtime on this machine", NO_BOARD) for row in rows
    )
    no_run = Unavailable("an engine for compute capability 8.9 does not run without that GPU")
    gpu = tuple(
        Row(
            artifact=row.artifact,
            state=State.COMPILED if row.artifact.precision == "fp32" else State.FAILED,
            validation=no_run,
            test=no_run,
            latency=NO_GPU,
            speedup=NO_GPU,
            file_bytes=row.file_bytes,
            peak_memory=NO_GPU,
            shipped=row.artifact.name == "student/fp32",
            reason="built in 8.1 s"
            if row.artifact.precision == "fp32"
            else "int32 bias pairs are refused by the parser",
        )
        for row in rows[:5]
    )
    verdict = "Fifteen times faster for 0.29 points."
    outcomes = (
        ProfileOutcome("this-machine", "This machine", "onnxruntime-cpu", HOST, rows, promise, True, verdict,
                       versions={"onnxruntime": "1.31.1"}),
        ProfileOutcome("raspberry-pi-5", "Raspberry Pi 5", "onnxruntime-cpu", "Cortex-A76, not here", pi, promise,
                       True, "Accuracy is kept on a stand-in; nobody knows the latency.", notes=("Same runtime.",)),
        ProfileOutcome("geforce-rtx-4070", "GeForce RTX 4070", "tensorrt", "compute capability 8.9", gpu, promise,
                       False,
                       "An engine was built; its accuracy and latency were not seen."),
        ProfileOutcome("ethos-u85-512", "Ethos-U85 <script>alert(1)</script>", "ethos-u", "not here", (), promise,
                       False,
                       "The target is missing.", missing="the Vela compiler is not installed"),
    )  # fmt: skip
    stages = (
        StageResult("student", "sha256:" + "01" * 32, tmp_path / "01-student", 0.4, False, {"parameters": 98000}),
        StageResult("prune", "sha256:" + "02" * 32, tmp_path / "02-prune", 3.2, False, {"ratio": 0.75}, PRUNED),
        StageResult("distil", "sha256:" + "03" * 32, tmp_path / "03-distil", 412.7, True, {"validation": 0.9372}),
    )
    return RunSummary(
        name="Fashion-MNIST <script>alert('name')</script>",
        digest="sha256:" + "cd" * 32,
        created="2031-04-05T06:07:08Z",
        command="compress-for-device run recipes/fashion-mnist.toml --profile this-machine",
        task="image-classification",
        metric="accuracy",
        recipe={"name": "fashion-mnist", "seed": 7, "stage": [{"kind": "prune", "channels": 0.75}]},
        seed=7,
        machine={"processor": "AMD EPYC 9654", "cores": "2", "system": "Debian GNU/Linux 12"},
        versions={"compress-for-device": "0.1.0", "onnxruntime": "1.31.1", "torch": "2.13.0"},
        teacher={"source": "examples.fashion_mnist.model:build", "digest": "sha256:" + "ef" * 32, "licence": ""},
        data=DataFacts(
            "/usr/share/datasets/fashion-mnist",
            {"train": 54000, "validation": 4976, "calibration": 1024, "test": 10000},
            {"train": "sha256:11", "validation": "sha256:22", "calibration": "sha256:33", "test": "sha256:44"},
            duplicates_dropped=3,
            notes=("Three pictures of the train part stand in the test part, too.",),
        ),
        stages=stages,
        parity=(ParityRow("student/fp32", "logits", 3.1e-6, 1e-4, 256, True),),
        outcomes=outcomes,
        rejected={"student/int8-static-entropy": "calibration by entropy was not asked for"},
        warnings=("Licence of the teacher is not stated: find out before you ship.", "<img src=x onerror=alert(2)>"),
    )
