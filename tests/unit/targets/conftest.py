"""A small residual CNN, its quantized variants, and artifacts of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

from compressor.types import Artifact, Format, TensorSpec, file_digest

SIDE = 12
CLASSES = 5


def write_cnn(path: Path, width: int = 8, batch: int | str = "batch", seed: int = 0) -> Path:
    """Conv-Relu, Conv, Add, Relu, Conv-Relu, pool, Gemm; opset 17."""
    random = np.random.default_rng(seed)
    nodes, stored = [], []

    def conv(name: str, source: str, inputs: int, outputs: int, stride: int = 1) -> str:
        stored.append(
            numpy_helper.from_array((random.normal(size=(outputs, inputs, 3, 3)) * 0.3).astype("f"), f"{name}.w")
        )
        stored.append(numpy_helper.from_array((random.normal(size=outputs) * 0.1).astype("f"), f"{name}.b"))
        nodes.append(
            helper.make_node(
                "Conv",
                [source, f"{name}.w", f"{name}.b"],
                [name],
                name,
                pads=[1] * 4,
                strides=[stride] * 2,
                kernel_shape=[3, 3],
            )
        )
        return name

    def relu(source: str) -> str:
        nodes.append(helper.make_node("Relu", [source], [f"{source}.relu"], f"{source}.relu"))
        return f"{source}.relu"

    first = relu(conv("conv1", "image", 3, width))
    nodes.append(helper.make_node("Add", [first, conv("conv2", first, width, width)], ["sum"], "sum"))
    third = relu(conv("conv3", relu("sum"), width, 2 * width, 2))
    nodes.append(helper.make_node("GlobalAveragePool", [third], ["pooled"], "pool"))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"], "flatten"))
    stored.append(numpy_helper.from_array(random.normal(size=(CLASSES, 2 * width)).astype("f"), "head.w"))
    stored.append(numpy_helper.from_array(np.zeros(CLASSES, "f"), "head.b"))
    nodes.append(helper.make_node("Gemm", ["flat", "head.w", "head.b"], ["logits"], "head", transB=1))
    graph = helper.make_graph(
        nodes,
        "cnn",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [batch, 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [batch, CLASSES])],
        stored,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


class Noise(CalibrationDataReader):
    def __init__(self) -> None:
        self.batches = iter([{"image": images(8, seed)} for seed in range(3)])

    def get_next(self):
        return next(self.batches, None)


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, SIDE, SIDE)).astype("f")


def artifact(
    path: Path, name: str, role: str = "student", precision: str = "fp32", batch: int | str = "batch"
) -> Artifact:
    return Artifact(
        name=name,
        role=role,
        path=path,
        format=Format.ONNX,
        precision=precision,
        inputs=(TensorSpec("image", "float32", (batch, 3, SIDE, SIDE)),),
        outputs=(TensorSpec("logits", "float32", (batch, CLASSES)),),
        digest=file_digest(path),
        parameters=0,
    )


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """``wide`` and ``fp32``; of the latter ``static`` (QDQ), ``dynamic`` and ``weights`` (activations stay float)."""
    folder = tmp_path_factory.mktemp("models")
    made = {"fp32": write_cnn(folder / "fp32.onnx"), "wide": write_cnn(folder / "wide.onnx", width=48)}
    made["static"] = folder / "static.onnx"
    quantize_static(
        made["fp32"],
        made["static"],
        Noise(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )
    made["dynamic"] = folder / "dynamic.onnx"
    quantize_dynamic(made["fp32"], made["dynamic"], weight_type=QuantType.QUInt8)
    made["weights"] = weights_only(made["fp32"], folder / "weights.onnx")
    return made


def weights_only(source: Path, path: Path) -> Path:
    """int8 weights of every Conv behind a DequantizeLinear; nothing quantizes the activations."""
    model = onnx.load(source)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in [node for node in model.graph.node if node.op_type == "Conv"]:
        name = node.input[1]
        weight = numpy_helper.to_array(stored[name])
        scale = np.float32(abs(weight).max() / 127)
        model.graph.initializer.remove(stored[name])
        model.graph.initializer.append(numpy_helper.from_array(np.rint(weight / scale).astype(np.int8), f"{name}.q"))
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(scale), f"{name}.scale"))
        model.graph.node.insert(
            0, helper.make_node("DequantizeLinear", [f"{name}.q", f"{name}.scale"], [name], f"{name}.dq")
        )
    onnx.save(model, path)
    return path
