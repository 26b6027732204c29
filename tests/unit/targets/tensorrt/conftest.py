"""A small residual CNN and the ways it can be quantized; profiles; one engine per model for the whole session."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compressor.errors import TargetUnavailable
from compressor.profile import Compute, HardwareProfile
from compressor.types import Artifact, Format, TensorSpec, file_digest
from targets.backends.tensorrt import TensorRt
from targets.backends.tensorrt.backend import sdk_version
from targets.base import Compiled

SYMMETRIC = {
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    "QuantizeBias": False,
    "AddQDQPairToWeight": True,
    "DedicatedQDQPair": True,
}


def write_cnn(path: Path) -> Path:
    """Three convolutions with a residual sum, pooling and a Gemm; input (batch, 3, 32, 32)."""
    rng = np.random.default_rng(0)
    sizes = {"w0": (16, 3, 3, 3), "b0": (16,), "w1": (32, 16, 3, 3), "b1": (32,), "w2": (32, 32, 3, 3), "b2": (32,)}
    sizes |= {"w3": (32, 10), "b3": (10,)}
    weights = [
        numpy_helper.from_array((rng.standard_normal(shape) * 0.1).astype(np.float32), name)
        for name, shape in sizes.items()
    ]
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w0", "b0"], ["c0"], "conv0", pads=[1] * 4),
        node("Relu", ["c0"], ["r0"], "relu0"),
        node("Conv", ["r0", "w1", "b1"], ["c1"], "conv1", pads=[1] * 4, strides=[2, 2]),
        node("Relu", ["c1"], ["r1"], "relu1"),
        node("Conv", ["r1", "w2", "b2"], ["c2"], "conv2", pads=[1] * 4),
        node("Add", ["c2", "r1"], ["a2"], "add2"),
        node("Relu", ["a2"], ["r2"], "relu2"),
        node("GlobalAveragePool", ["r2"], ["g"], "pool"),
        node("Flatten", ["g"], ["f"], "flat"),
        node("Gemm", ["f", "w3", "b3"], ["logits"], "fc"),
    ]
    graph = helper.make_graph(
        nodes,
        "cnn",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def _quantize_all(cnn: Path, folder: Path) -> dict[str, Path]:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    class Samples(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            rng = np.random.default_rng(1)
            self.left = [{"x": rng.standard_normal((4, 3, 32, 32)).astype(np.float32)} for _ in range(4)]

        def get_next(self) -> Any:
            return self.left.pop() if self.left else None

    int8 = {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8, "per_channel": True}
    weighted = ["Conv", "Gemm", "MatMul"]
    ways: dict[str, dict[str, Any]] = {
        "all-operators": {**int8, "extra_options": SYMMETRIC},
        "weighted-only": {
            **int8,
            "op_types_to_quantize": weighted,
            "extra_options": SYMMETRIC | {"OpTypesToExcludeOutputQuantization": weighted},
        },
        "default": {},
        "uint8": {"activation_type": QuantType.QUInt8, "extra_options": SYMMETRIC},
        "int16": {"activation_type": QuantType.QInt16, "weight_type": QuantType.QInt8, "extra_options": SYMMETRIC},
        "qoperator": {"quant_format": QuantFormat.QOperator},
    }
    made = {}
    for name, settings in ways.items():
        made[name] = folder / f"{name}.onnx"
        quantize_static(str(cnn), str(made[name]), Samples(), **settings)
    made["dynamic"] = folder / "dynamic.onnx"
    quantize_dynamic(str(cnn), str(made["dynamic"]))
    return made


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """``fp32`` and the quantized files by the name of the way they were made."""
    folder = tmp_path_factory.mktemp("tensorrt-models")
    cnn = write_cnn(folder / "fp32.onnx")
    return {"fp32": cnn, **_quantize_all(cnn, folder)}


@pytest.fixture(scope="session")
def make_artifact() -> Callable[..., Artifact]:
    def make(path: Path, shape: tuple[int | str, ...] = ("batch", 3, 32, 32)) -> Artifact:
        return Artifact(
            name=f"student/{path.stem}",
            role="student",
            path=path,
            format=Format.ONNX,
            precision="fp32" if path.stem == "fp32" else "int8-static",
            inputs=(TensorSpec("x", "float32", shape),),
            outputs=(TensorSpec("logits", "float32", ("batch", 10)),),
            digest=file_digest(path) if path.exists() else "sha256:none",
            parameters=14_634,
        )

    return make


@pytest.fixture(scope="session")
def make_profile() -> Callable[..., HardwareProfile]:
    def make(capability: str | None = "8.9", **options: Any) -> HardwareProfile:
        compute = Compute(processor="test GPU", architecture="cuda", capability=capability)
        return HardwareProfile(name="test-gpu", title="Test GPU", target="tensorrt", compute=compute, options=options)

    return make


@pytest.fixture(scope="session")
def rtx() -> str:
    """Version of the TensorRT-RTX builder; skips with the reason where it is not installed."""
    try:
        return sdk_version("rtx")
    except TargetUnavailable as error:
        pytest.skip(f"{error}: {error.hint}")


@pytest.fixture(scope="session")
def engines(
    rtx: str,
    models: Mapping[str, Path],
    make_artifact: Callable[..., Artifact],
    make_profile: Callable[..., HardwareProfile],
    tmp_path_factory: pytest.TempPathFactory,
) -> Mapping[str, Compiled]:
    """Real engines for SM89 of the fp32 file and of both accepted int8 files."""
    out = tmp_path_factory.mktemp("tensorrt-engines")
    profile = make_profile(max_batch=8)
    return {
        name: TensorRt().compile(make_artifact(models[name]), profile, out)
        for name in ("fp32", "all-operators", "weighted-only")
    }
