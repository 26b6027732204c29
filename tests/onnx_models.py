"""Small ONNX graphs made by hand, for tests that must run without torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from compressor.models.onnx_facts import describe
from compressor.types import Array, Artifact, Format, file_digest


class Builder:
    """Collects nodes and weights; every name is given by the caller or counted."""

    def __init__(self, seed: int = 0, as_constants: bool = False) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(seed)
        self.as_constants = as_constants

    def weight(self, name: str, array: Array) -> str:
        tensor = numpy_helper.from_array(np.asarray(array), name)
        if self.as_constants:
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor, name=f"const_{name}"))
        else:
            self.weights.append(tensor)
        return name

    def normal(self, name: str, *shape: int, scale: float | None = None) -> str:
        scale = scale or (2 / max(1, int(np.prod(shape[1:])))) ** 0.5
        return self.weight(name, (self.rng.standard_normal(shape) * scale).astype(np.float32))

    def op(self, kind: str, inputs: list[str], out: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [out], name=f"{out}_{kind}", **attributes))
        return out

    def model(self, inputs: list[tuple], outputs: list[tuple], opset: int = 17) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "test",
            [helper.make_tensor_value_info(*value) for value in inputs],
            [helper.make_tensor_value_info(*value) for value in outputs],
            self.weights,
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        onnx.checker.check_model(made)
        return made


def cnn(path: Path, *, as_constants: bool = False, opset: int = 17, seed: int = 0) -> Path:
    """Conv-BN-ReLU, a residual block, pooling, a mean over pixels and a Gemm: input (batch, 3, 16, 16), 10 classes."""
    b = Builder(seed, as_constants)
    x = b.op("Conv", ["image", b.normal("w0", 16, 3, 3, 3)], "c0", pads=[1, 1, 1, 1])
    norm = [b.weight(f"bn_{n}", v.astype(np.float32)) for n, v in _batch_norm(b.rng).items()]
    x = b.op("BatchNormalization", [x, *norm], "n0")
    x = b.op("Relu", [x], "r0")
    y = b.op("Conv", [x, b.normal("w1", 16, 16, 3, 3), b.normal("b1", 16, scale=0.1)], "c1", pads=[1, 1, 1, 1])
    x = b.op("Relu", [b.op("Add", [x, y], "a1")], "r1")
    x = b.op("MaxPool", [x], "p1", kernel_shape=[2, 2], strides=[2, 2])
    x = b.op("Conv", [x, b.normal("w2", 32, 16, 3, 3), b.normal("b2", 32, scale=0.1)], "c2", pads=[1, 1, 1, 1])
    x = b.op("Relu", [b.op("Identity", [x], "i2")], "r2")
    x = b.op("ReduceMean", [x], "m", axes=[2, 3], keepdims=0)
    b.op("Gemm", [x, b.normal("w3", 10, 32), b.normal("b3", 10, scale=0.1)], "logits", transB=1)
    model = b.model(
        [("image", TensorProto.FLOAT, ["batch", 3, 16, 16])], [("logits", TensorProto.FLOAT, ["batch", 10])], opset
    )
    helper.set_model_props(model, {"author": "someone", "labels": "a,b"})
    onnx.save(model, path)
    return path


def _batch_norm(rng: np.random.Generator) -> dict[str, Array]:
    return {
        "scale": rng.uniform(0.5, 1.5, 16),
        "bias": rng.normal(0, 0.2, 16),
        "mean": rng.normal(0, 0.2, 16),
        "var": rng.uniform(0.5, 2, 16),
    }


def transformer(path: Path, *, masked: bool = True, width: int = 64, vocabulary: int = 1000) -> Path:
    """One attention block and a feed-forward one over ids (batch, sequence), with a mask of -1e9; 4 classes."""
    b = Builder(1)
    x = b.op("Gather", [b.normal("table", vocabulary, width, scale=1.0), "input_ids"], "e")
    x = b.op("LayerNormalization", [x, b.weight("g", np.ones(width, np.float32))], "ln")
    q, k, v = (b.op("MatMul", [x, b.normal(f"w{n}", width, width, scale=0.12)], n) for n in "qkv")
    scores = b.op("MatMul", [q, b.op("Transpose", [k], "kt", perm=[0, 2, 1])], "qk")
    scores = b.op("Mul", [scores, b.weight("s", np.array(width**-0.5, np.float32))], "sc")
    if masked:
        mask = b.op("Unsqueeze", ["attention_mask", b.weight("one", np.array([1], np.int64))], "mu")
        mask = b.op("Cast", [mask], "mf", to=TensorProto.FLOAT)
        inverse = b.op("Sub", [b.weight("o", np.array(1, np.float32)), mask], "mi")
        far = b.op("Mul", [inverse, b.weight("far", np.array(-1e9, np.float32))], "mm")
        scores = b.op("Add", [scores, far], "masked")
    y = b.op("MatMul", [b.op("Softmax", [scores], "p", axis=-1), v], "av")
    x = b.op("Add", [x, b.op("MatMul", [y, b.normal("wo", width, width, scale=0.12)], "o1")], "res")
    h = b.op("Relu", [b.op("MatMul", [x, b.normal("wf", width, 4 * width, scale=0.12)], "f1")], "f1r")
    x = b.op("Add", [x, b.op("MatMul", [h, b.normal("wg", 4 * width, width, scale=0.06)], "f2")], "res2")
    first = b.op("Gather", [x, b.weight("zero", np.array(0, np.int64))], "cls", axis=1)
    b.op("Gemm", [first, b.normal("wc", 4, width, scale=0.12), b.normal("bc", 4, scale=0.1)], "logits", transB=1)
    inputs = [("input_ids", TensorProto.INT64, ["batch", "sequence"])]
    inputs += [("attention_mask", TensorProto.INT64, ["batch", "sequence"])] if masked else []
    onnx.save(b.model(inputs, [("logits", TensorProto.FLOAT, ["batch", 4])]), path)
    return path


def images(count: int, seed: int = 3) -> dict[str, Array]:
    return {"image": np.random.default_rng(seed).standard_normal((count, 3, 16, 16)).astype(np.float32)}


def tokens(count: int, length: int = 24, masked: bool = True, seed: int = 4) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    made = {"input_ids": rng.integers(0, 1000, (count, length))}
    if masked:
        made["attention_mask"] = (np.arange(length) < rng.integers(4, length + 1, (count, 1))).astype(np.int64)
    return made


def artifact(path: Path) -> Artifact:
    facts = describe(path)
    digest = file_digest(path)
    return Artifact(
        "student/fp32", "student", path, Format.ONNX, "fp32", facts.inputs, facts.outputs, digest, facts.parameters
    )


def run(path: Path, inputs: dict[str, Array]) -> Array:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def run_model(model: onnx.ModelProto) -> Callable[[dict[str, Array]], Array]:
    """The first output of a model in memory."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)[0]
