"""Small ONNX graphs by topology, written with onnx.helper; weights are drawn from a fixed seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

Shape = tuple[int | str, ...]


class Builder:
    """Adds nodes one after the other; every method returns the name of its output."""

    def __init__(self, opset: int = 17, *, constant_nodes: bool = False) -> None:
        self.opset = opset
        self._constant_nodes = constant_nodes
        self._random = np.random.default_rng(7)
        self._nodes: list[Any] = []
        self._tensors: list[Any] = []

    def weight(self, name: str, *shape: int, positive: bool = False) -> str:
        array = (self._random.normal(size=shape) * 0.5).astype(np.float32)
        return self.constant(name, np.abs(array) + 0.5 if positive else array)

    def constant(self, name: str, array: Any) -> str:
        tensor = numpy_helper.from_array(np.asarray(array), name)
        if self._constant_nodes:
            self._nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        else:
            self._tensors.append(tensor)
        return name

    def add(self, operator: str, name: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [name] if outputs == 1 else [f"{name}_{i}" for i in range(outputs)]
        self._nodes.append(helper.make_node(operator, list(inputs), names, name=name, **attributes))
        return name if outputs == 1 else names

    def conv(
        self, name: str, data: str, out: int, into: int, kernel: int = 3, *, bias: bool = True, group: int = 1
    ) -> str:
        inputs = [data, self.weight(f"{name}.weight", out, into // group, kernel, kernel)]
        inputs += [self.weight(f"{name}.bias", out)] if bias else []
        return str(self.add("Conv", name, *inputs, pads=[kernel // 2] * 4, group=group))

    def norm(self, name: str, data: str, size: int) -> str:
        parts = [self.weight(f"{name}.{part}", size) for part in ("scale", "offset", "mean")]
        return str(self.add("BatchNormalization", name, data, *parts, self.weight(f"{name}.var", size, positive=True)))

    def linear(self, name: str, data: str, out: int, into: int) -> str:
        weight, bias = self.weight(f"{name}.weight", out, into), self.weight(f"{name}.bias", out)
        return str(self.add("Gemm", name, data, weight, bias, transB=1))

    def head(self, data: str, channels: int) -> str:
        """Global average pool, flatten, three logits."""
        flat = self.add("Flatten", "flatten", self.add("GlobalAveragePool", "pool", data))
        return self.linear("head", flat, 3, channels)

    def model(self, output: str, shape: Shape = ("n", 3, 8, 8), out_shape: Shape = ("n", 3)) -> ModelProto:
        graph = helper.make_graph(
            self._nodes,
            "graph",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, out_shape)],
            self._tensors,
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        onnx.checker.check_model(made, full_check=True)
        return made


def chain(**options: Any) -> ModelProto:
    b = Builder(**options)
    x = b.add("Relu", "r1", b.norm("bn1", b.conv("c1", "x", 8, 3, bias=False), 8))
    x = b.add("Relu", "r2", b.norm("bn2", b.conv("c2", x, 12, 8, bias=False), 12))
    return b.model(b.head(x, 12))


def constant_nodes() -> ModelProto:
    return chain(constant_nodes=True)


def residual() -> ModelProto:
    b = Builder()
    x = b.add("Relu", "r1", b.conv("c1", "x", 8, 3))
    y = b.conv("c3", b.add("Clip", "r2", b.conv("c2", x, 12, 8)), 8, 12)
    return b.model(b.head(b.add("Add", "sum", x, y), 8))


def concat() -> ModelProto:
    b = Builder()
    parts = [b.conv("c1", "x", 4, 3), b.conv("c2", "x", 8, 3), "x"]
    joined = b.add("Sigmoid", "s", b.add("Concat", "join", *parts, axis=1))
    return b.model(b.head(b.conv("c3", joined, 8, 15), 8))


def split() -> ModelProto:
    b = Builder()
    wide = b.conv("c1", "x", 16, 3)
    sizes = b.constant("sizes", np.array([6, 10]))
    first, second = b.add("Split", "parts", wide, sizes, outputs=2, axis=1)
    one, two = b.conv("c2", b.add("Tanh", "t", first), 8, 6), b.conv("c3", second, 8, 10)
    return b.model(b.head(b.add("Mul", "gate", one, two), 8))


def sliced() -> ModelProto:
    b = Builder()
    wide = b.conv("c1", "x", 16, 3)
    numbers = {name: b.constant(name, np.array([value])) for name, value in (("zero", 0), ("six", 6), ("end", 99))}
    axis = b.constant("axis", np.array([1]))
    first = b.add("Slice", "left", wide, numbers["zero"], numbers["six"], axis)
    second = b.add("Slice", "right", wide, numbers["six"], numbers["end"], axis)
    return b.model(b.head(b.add("Sub", "minus", b.conv("c2", first, 8, 6), b.conv("c3", second, 8, 10)), 8))


def depthwise() -> ModelProto:
    b = Builder()
    x = b.add("HardSwish", "h", b.norm("bn", b.conv("c1", "x", 8, 3, 1, bias=False), 8))
    x = b.add("Relu", "r", b.conv("dw", x, 8, 8, group=8))
    return b.model(b.head(b.conv("c2", x, 12, 8, 1), 12))


def grouped() -> ModelProto:
    b = Builder()
    x = b.add("Relu", "r1", b.conv("c1", "x", 16, 3))
    x = b.add("LeakyRelu", "r2", b.conv("g", x, 24, 16, group=4))
    return b.model(b.head(b.conv("c2", x, 8, 24), 8))


def transposed() -> ModelProto:
    b = Builder()
    x = b.add("Relu", "r1", b.conv("c1", "x", 8, 3))
    up = b.add("ConvTranspose", "up", x, b.weight("up.w", 8, 12, 2, 2), b.weight("up.b", 12), strides=[2, 2])
    scales = b.constant("scales", np.array([1, 1, 2, 2], dtype=np.float32))
    x = b.add("Resize", "resize", b.add("PRelu", "p", up, b.weight("slope", 12, 1, 1)), "", scales)
    normed = b.add("InstanceNormalization", "in", x, b.weight("in.scale", 12), b.weight("in.offset", 12))
    return b.model(b.head(b.conv("c2", normed, 8, 12), 8))


def flattened() -> ModelProto:
    b = Builder()
    x = b.add("MaxPool", "mp", b.conv("c1", "x", 8, 3), kernel_shape=[2, 2], strides=[2, 2])
    flat = b.add("Reshape", "flat", x, b.constant("shape", np.array([-1, 128])))
    return b.model(b.linear("fc2", b.add("Relu", "r", b.linear("fc1", flat, 16, 128)), 3, 16))


def computed_reshape() -> ModelProto:
    """The target shape is (batch, 8), of which the 8 is a constant behind a Concat."""
    b = Builder()
    x = b.add("GlobalAveragePool", "pool", b.conv("c1", "x", 8, 3))
    batch = b.add(
        "Slice", "batch", b.add("Shape", "sh", x), b.constant("a", np.array([0])), b.constant("e", np.array([1]))
    )
    target = b.add("Concat", "target", batch, b.constant("eight", np.array([8])), axis=0)
    return b.model(b.linear("head", b.add("Reshape", "flat", x, target), 3, 8))


def channels_last() -> ModelProto:
    """NHWC in, transposed to NCHW, flattened in NHWC order."""
    b = Builder()
    x = b.conv("c1", b.add("Transpose", "in", "x", perm=[0, 3, 1, 2]), 8, 3)
    flat = b.add("Flatten", "flat", b.add("Transpose", "back", x, perm=[0, 2, 3, 1]))
    return b.model(b.linear("fc", flat, 3, 512), shape=("n", 8, 8, 3))


def squeeze_excite() -> ModelProto:
    b = Builder()
    x = b.norm("bn", b.conv("c1", "x", 16, 3, bias=False), 16)
    s = b.add("Relu", "r", b.conv("squeeze", b.add("GlobalAveragePool", "gap", x), 8, 16, 1, bias=False))
    # a bias that is reshaped from a vector, as Paddle writes it
    offset = b.add("Reshape", "wide", b.weight("vector", 16), b.constant("to", np.array([1, 16, 1, 1])))
    s = b.add("HardSigmoid", "hs", b.add("Add", "biased", b.conv("excite", s, 16, 8, 1, bias=False), offset))
    return b.model(b.head(b.conv("c2", b.add("Mul", "scale", x, s), 8, 16), 8))


def feed_forward() -> ModelProto:
    """MatMul, Add, Gelu (written out), MatMul, Add around a residual and a layer norm, as in a transformer."""
    b = Builder()
    normed = b.add("LayerNormalization", "ln", "x", b.weight("ln.scale", 12), b.weight("ln.offset", 12), axis=-1)
    x = b.add("Add", "b1", b.weight("b1.bias", 32), b.add("MatMul", "up", normed, b.weight("up.w", 12, 32)))
    root, one = b.constant("root", np.float32(2**0.5)), b.constant("one", np.float32(1))
    gate = b.add("Add", "plus", b.add("Erf", "erf", b.add("Div", "div", x, root)), one)
    x = b.add("Mul", "half", b.add("Mul", "gelu", x, gate), b.constant("h", np.float32(0.5)))
    down = b.add("Add", "b2", b.add("MatMul", "down", x, b.weight("down.w", 32, 12)), b.weight("b2.bias", 12))
    shape: Shape = ("n", 5, 12)
    return b.model(b.add("Add", "sum", "x", down), shape, shape)


def shared() -> ModelProto:
    """Two convolutions read one weight: only what neither makes nor reads may go."""
    b = Builder()
    x = b.conv("c1", "x", 8, 3)
    weight = b.weight("twice", 8, 8, 3, 3)
    y = b.add("Conv", "one", x, weight, pads=[1] * 4)
    z = b.add("Conv", "two", b.add("Relu", "r", y), weight, pads=[1] * 4)
    return b.model(b.head(b.conv("c2", z, 12, 8), 12))


TOPOLOGIES = {
    "chain": chain, "constant nodes": constant_nodes, "residual": residual, "concat": concat, "split": split,
    "slice": sliced, "depthwise": depthwise, "grouped": grouped, "transposed": transposed, "flatten": flattened,
    "computed reshape": computed_reshape, "channels last": channels_last, "squeeze-excite": squeeze_excite,
    "feed-forward": feed_forward, "shared": shared,
}  # fmt: skip
