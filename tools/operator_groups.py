"""Tiny ONNX models, one for each group of operators that edge networks are made of; the batch is free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from compressor.types import Array, Artifact, Format, TensorSpec, file_digest

OPSET = 17
BATCH = "batch"


@dataclass
class Sketch:
    """A graph in the making."""

    shape: tuple[int, ...]  # of the one input, without the batch
    dtype: str = "float32"
    opset: int = OPSET
    nodes: list[Any] = field(default_factory=list)
    stored: dict[str, Array] = field(default_factory=dict)
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(5))

    def weight(self, *shape: int) -> str:
        """A stored normal tensor of about unit gain."""
        gain = 1 / np.sqrt(max(1, int(np.prod(shape[1:]))))
        return self.constant((self.random.normal(size=shape) * gain).astype(np.float32))

    def constant(self, value: Array) -> str:
        name = f"w{len(self.stored)}"
        self.stored[name] = np.asarray(value)
        return name

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name, **attributes))
        return name


def _convolution(s: Sketch) -> str:
    return s.node("Relu", s.node("Conv", "x", s.weight(8, 4, 3, 3), s.weight(8), pads=[1] * 4))


def _depthwise(s: Sketch) -> str:
    wide = s.node("Conv", "x", s.weight(4, 1, 3, 3), s.weight(4), pads=[1] * 4, group=4)
    return s.node("Conv", s.node("Clip", wide, *_clip(s)), s.weight(8, 4, 1, 1), s.weight(8))


def _clip(s: Sketch) -> tuple[str, str]:
    return s.constant(np.float32(0)), s.constant(np.float32(6))


def _transposed(s: Sketch) -> str:
    return s.node("ConvTranspose", "x", s.weight(4, 6, 2, 2), strides=[2, 2])


def _pooling(s: Sketch) -> str:
    pooled = s.node("MaxPool", _before(s), kernel_shape=[2, 2], strides=[2, 2])
    return s.node("GlobalAveragePool", s.node("AveragePool", pooled, kernel_shape=[2, 2], strides=[1, 1]))


def _before(s: Sketch) -> str:
    """What has no weights is quantized, or not, by what comes before it."""
    return s.node("Relu", s.node("Conv", "x", s.weight(4, 4, 1, 1), s.weight(4)))


def _batch_norm(s: Sketch) -> str:
    one = s.constant(np.linspace(0.5, 2, 4, dtype=np.float32))
    return s.node("BatchNormalization", _before(s), one, s.weight(4), s.weight(4), one)


def _branches(s: Sketch) -> str:
    first = s.node("Conv", "x", s.weight(4, 4, 1, 1), s.weight(4))
    return s.node("Concat", s.node("Add", "x", first), s.node("Mul", "x", first), axis=1)


def _product(s: Sketch) -> str:
    return s.node("Gemm", s.node("Flatten", "x"), s.weight(5, 256), s.weight(5), transB=1)


def _squeeze(s: Sketch) -> str:
    gate = s.node("Conv", s.node("GlobalAveragePool", "x"), s.weight(4, 4, 1, 1), s.weight(4))
    return s.node("Mul", "x", s.node("Sigmoid", gate))


def _hard_swish(s: Sketch) -> str:
    return s.node("HardSwish", s.node("Conv", "x", s.weight(4, 4, 1, 1), s.weight(4)))


def _resize(s: Sketch) -> str:
    scales = s.constant(np.float32([1, 1, 2, 2]))
    return s.node("Resize", _before(s), "", scales, mode="nearest", coordinate_transformation_mode="asymmetric")


def _layer_norm(s: Sketch) -> str:
    normal = s.node("LayerNormalization", "x", s.constant(np.ones(16, np.float32)), s.weight(16), axis=-1)
    return s.node("MatMul", normal, s.weight(16, 16))


def _gelu(s: Sketch) -> str:
    return _gelu_of(s, s.node("MatMul", "x", s.weight(16, 16)))


def _gelu_of(s: Sketch, x: str) -> str:
    """Below opset 20 the chain that exporters write; an operator from there on."""
    if s.opset >= 20:
        return s.node("Gelu", x)
    half, two, one = (s.constant(np.float32(value)) for value in (0.5, np.sqrt(2), 1))
    erf = s.node("Add", s.node("Erf", s.node("Div", x, two)), one)
    return s.node("Mul", s.node("Mul", x, erf), half)


def _attention(s: Sketch) -> str:
    return _attention_of(s, "x")


def _attention_of(s: Sketch, x: str) -> str:
    query, key, value = (s.node("MatMul", x, s.weight(16, 16)) for _ in range(3))
    scores = s.node("MatMul", query, s.node("Transpose", key, perm=[0, 2, 1]))
    share = s.node("Softmax", s.node("Mul", scores, s.constant(np.float32(0.25))), axis=-1)
    return s.node("MatMul", share, value)


def _embedding(s: Sketch) -> str:
    return s.node("MatMul", s.node("Gather", s.weight(50, 16), "x"), s.weight(16, 8))


def _cnn(s: Sketch) -> str:
    """Stem, depthwise convolution, squeeze and excite, a shortcut, three kinds of activation, a head."""
    stem = s.node("Relu", s.node("Conv", "x", s.weight(8, 4, 3, 3), s.weight(8), pads=[1] * 4))
    wide = s.node("Conv", stem, s.weight(8, 1, 3, 3), s.weight(8), pads=[1] * 4, group=8)
    wide = s.node("HardSwish", wide)
    gate = s.node("Conv", s.node("GlobalAveragePool", wide), s.weight(8, 8, 1, 1), s.weight(8))
    gated = s.node("Mul", wide, s.node("Sigmoid", gate))
    narrow = s.node("Add", stem, s.node("Conv", gated, s.weight(8, 8, 1, 1), s.weight(8)))
    pooled = s.node("MaxPool", narrow, kernel_shape=[2, 2], strides=[2, 2])
    smooth = _gelu_of(s, s.node("Conv", pooled, s.weight(8, 8, 1, 1), s.weight(8)))
    flat = s.node("Flatten", s.node("GlobalAveragePool", smooth))
    return s.node("Gemm", flat, s.weight(4, 8), s.weight(4), transB=1)


def _transformer(s: Sketch) -> str:
    """Embedding, one layer (attention, GELU, layer norms, shortcuts), the mean over positions, a head."""
    x = _norm(s, s.node("Gather", s.weight(50, 16), "x"))
    mixed = s.node("Add", x, s.node("MatMul", _attention_of(s, x), s.weight(16, 16)))
    x = _norm(s, mixed)
    hidden = _gelu_of(s, s.node("Add", s.node("MatMul", x, s.weight(16, 32)), s.weight(32)))
    out = s.node("Add", s.node("MatMul", hidden, s.weight(32, 16)), s.weight(16))
    mean = _mean_of_positions(s, _norm(s, s.node("Add", x, out)))
    return s.node("Gemm", mean, s.weight(4, 16), s.weight(4), transB=1)


def _mean_of_positions(s: Sketch, x: str) -> str:
    """The axes are an input from opset 18 on."""
    if s.opset >= 18:
        return s.node("ReduceMean", x, s.constant(np.asarray([1], np.int64)), keepdims=0)
    return s.node("ReduceMean", x, axes=[1], keepdims=0)


def _norm(s: Sketch, x: str) -> str:
    return s.node("LayerNormalization", x, s.constant(np.ones(16, np.float32)), s.weight(16), axis=-1)


GROUPS: Mapping[str, tuple[Callable[[Sketch], str], tuple[int, ...], str]] = {
    "convolution": (_convolution, (4, 8, 8), "float32"),
    "depthwise convolution": (_depthwise, (4, 8, 8), "float32"),
    "transposed convolution": (_transposed, (4, 8, 8), "float32"),
    "pooling": (_pooling, (4, 8, 8), "float32"),
    "batch norm, not fused": (_batch_norm, (4, 8, 8), "float32"),
    "branches: add, multiply, concatenate": (_branches, (4, 8, 8), "float32"),
    "squeeze and excite": (_squeeze, (4, 8, 8), "float32"),
    "hard swish": (_hard_swish, (4, 8, 8), "float32"),
    "resize": (_resize, (4, 8, 8), "float32"),
    "matrix product": (_product, (4, 8, 8), "float32"),
    "attention": (_attention, (6, 16), "float32"),
    "layer norm": (_layer_norm, (6, 16), "float32"),
    "GELU": (_gelu, (6, 16), "float32"),
    "embedding": (_embedding, (6,), "int64"),
}
NETS: Mapping[str, tuple[Callable[[Sketch], str], tuple[int, ...], str]] = {
    "cnn": (_cnn, (4, 8, 8), "float32"),
    "transformer": (_transformer, (6,), "int64"),
}


def write_group(name: str, path: Path, opset: int = OPSET) -> Artifact:
    """The model of a group (or whole small net) as an artifact at ``path``."""
    build, shape, dtype = {**GROUPS, **NETS}[name]
    sketch = Sketch(shape, dtype, opset)
    last = build(sketch)
    kind = TensorProto.FLOAT if dtype == "float32" else TensorProto.INT64
    graph = helper.make_graph(
        sketch.nodes,
        "group",
        [helper.make_tensor_value_info("x", kind, [BATCH, *shape])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, key) for key, value in sketch.stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return as_artifact(path, model, "fp32")


def as_artifact(path: Path, model: Any, precision: str) -> Artifact:
    """A written model as an artifact."""
    specs = [tuple(_spec(value) for value in values) for values in (model.graph.input, model.graph.output)]
    name = f"student/{precision}"
    return Artifact(name, "student", path, Format.ONNX, precision, *specs, file_digest(path), 0)


def _spec(value: Any) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(size.dim_value or BATCH for size in tensor.shape.dim)
    return TensorSpec(value.name, "int64" if tensor.elem_type == TensorProto.INT64 else "float32", shape)


def samples(name: str, count: int, seed: int = 0) -> dict[str, Array]:
    """Inputs for a group."""
    _, shape, dtype = {**GROUPS, **NETS}[name]
    random = np.random.default_rng(seed)
    if dtype == "int64":
        return {"x": random.integers(0, 50, (count, *shape))}
    return {"x": random.normal(size=(count, *shape)).astype(np.float32)}
