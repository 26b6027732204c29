"""The ONNX operators that have a form in Core ML's MIL, by MIL's builder. Runs in the tool chain's environment.

Source of the forms: Core ML Tools 9, ``coremltools.converters.mil.mil.ops.defs`` (iOS 15 to 17).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from coremltools.converters.mil import Builder as mb  # noqa: N813  the name that Apple's documentation uses

from compressor.errors import CompileError
from targets.static_graph import Node

if TYPE_CHECKING:
    from targets.backends.coreml.program import Maker

Operator = Callable[["Maker", Node], Any]


def refuse(node: Node, why: str) -> CompileError:
    """A refusal that names the node."""
    return CompileError(f"node `{node.name}`: {why}", hint="Export the model without it, or use another target.")


def _one(build: Callable[..., Any], **fixed: Any) -> Operator:
    return lambda maker, node: build(x=maker.value(node, 0), **fixed)


def _two(build: Callable[..., Any]) -> Operator:
    return lambda maker, node: build(x=maker.value(node, 0), y=maker.value(node, 1))


def _fold(build: Callable[..., Any]) -> Operator:
    """An operator of any number of operands as a chain of MIL's operator of two."""

    def make(maker: Maker, node: Node) -> Any:
        result = maker.value(node, 0)
        for place in range(1, len(node.inputs)):
            result = build(x=result, y=maker.value(node, place))
        return result

    return make


def _edges(maker: Maker, node: Node, kernel: Any) -> list[int]:
    """Pads as MIL wants them, begin and end for each axis, with what auto_pad or ceil_mode add."""
    axes = range(len(kernel))
    strides = node.attributes.get("strides", [1] * len(kernel))
    dilations = node.attributes.get("dilations", [1] * len(kernel))
    pads = list(node.attributes.get("pads", [0] * 2 * len(kernel)))
    shape, result = maker.shape(node.input(0))[2:], maker.shape(node.outputs[0])[2:]
    reach = [(kernel[axis] - 1) * dilations[axis] + 1 for axis in axes]
    needed = [(result[axis] - 1) * strides[axis] + reach[axis] - shape[axis] for axis in axes]
    mode = node.attributes.get("auto_pad", "NOTSET")
    if mode == "SAME_UPPER":
        pads[: len(kernel)] = [max(total, 0) // 2 for total in needed]
    elif mode not in ("NOTSET", "VALID"):
        raise refuse(node, f"auto_pad {mode} has no form here")
    after = [max(pads[len(kernel) + axis], needed[axis] - pads[axis]) for axis in axes]
    return [int(edge) for axis in axes for edge in (pads[axis], after[axis])]


def conv(maker: Maker, node: Node) -> Any:
    kernel = maker.shape(node.input(1))[2:]
    rank = len(kernel)
    if rank not in (1, 2):
        raise refuse(node, f"Conv over {rank} dimensions has no form here")
    more = {"bias": maker.vector(node, 2)} if node.input(2) else {}
    return mb.conv(
        x=maker.value(node, 0),
        weight=maker.value(node, 1),
        pad_type="custom",
        pad=_edges(maker, node, kernel),
        strides=list(node.attributes.get("strides", [1] * rank)),
        dilations=list(node.attributes.get("dilations", [1] * rank)),
        groups=int(node.attributes.get("group", 1)),
        **more,
    )


def conv_transpose(maker: Maker, node: Node) -> Any:
    rank = len(maker.shape(node.input(1))) - 2
    pads = list(node.attributes.get("pads", [0] * 2 * rank))
    if node.attributes.get("auto_pad", "NOTSET") != "NOTSET":
        raise refuse(node, "ConvTranspose with auto_pad has no form here")
    more = {"bias": maker.vector(node, 2)} if node.input(2) else {}
    return mb.conv_transpose(
        x=maker.value(node, 0),
        weight=maker.value(node, 1),
        pad_type="custom",
        pad=[int(pads[axis + side * rank]) for axis in range(rank) for side in (0, 1)],
        output_shape=list(maker.shape(node.outputs[0])),
        strides=list(node.attributes.get("strides", [1] * rank)),
        dilations=list(node.attributes.get("dilations", [1] * rank)),
        groups=int(node.attributes.get("group", 1)),
        **more,
    )


def _pool(build: Callable[..., Any], average: bool) -> Operator:
    def make(maker: Maker, node: Node) -> Any:
        kernel = list(node.attributes["kernel_shape"])
        if any(size != 1 for size in node.attributes.get("dilations", ())):
            raise refuse(node, f"{node.operator} with dilations has no form here")
        excluded = {"exclude_padding_from_average": not node.attributes.get("count_include_pad", 0)} if average else {}
        return build(
            x=maker.value(node, 0),
            kernel_sizes=kernel,
            strides=list(node.attributes.get("strides", [1] * len(kernel))),
            pad_type="custom",
            pad=_edges(maker, node, kernel),
            **excluded,
        )

    return make


def global_average(maker: Maker, node: Node) -> Any:
    axes = list(range(2, len(maker.shape(node.input(0)))))
    return mb.reduce_mean(x=maker.value(node, 0), axes=axes, keep_dims=True)


def gemm(maker: Maker, node: Node) -> Any:
    attributes = node.attributes
    if attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0:
        raise refuse(node, "only Gemm with alpha = beta = 1 has a form here")
    turned = {f"transpose_{side}": bool(attributes.get(key, 0)) for side, key in (("x", "transA"), ("y", "transB"))}
    product = mb.matmul(x=maker.value(node, 0), y=maker.value(node, 1), **turned)
    return mb.add(x=product, y=maker.value(node, 2)) if node.input(2) else product


def batch_norm(maker: Maker, node: Node) -> Any:
    gamma, beta, mean, variance = (maker.vector(node, place) for place in range(1, 5))
    epsilon = np.float32(node.attributes.get("epsilon", 1e-5))
    x = maker.value(node, 0)
    return mb.batch_norm(x=x, mean=mean, variance=variance, gamma=gamma, beta=beta, epsilon=epsilon)


def layer_norm(maker: Maker, node: Node) -> Any:
    rank = len(maker.shape(node.input(0)))
    axes = list(range(int(node.attributes.get("axis", -1)) % rank, rank))
    more = {"beta": maker.vector(node, 2)} if node.input(2) else {}
    epsilon = np.float32(node.attributes.get("epsilon", 1e-5))
    return mb.layer_norm(x=maker.value(node, 0), axes=axes, gamma=maker.vector(node, 1), epsilon=epsilon, **more)


def clip(maker: Maker, node: Node) -> Any:
    low, high = (maker.stored(node, place) if node.input(place) else None for place in (1, 2))
    x = maker.value(node, 0)
    if low is not None:
        x = mb.maximum(x=x, y=np.float32(np.squeeze(low)))
    return mb.minimum(x=x, y=np.float32(np.squeeze(high))) if high is not None else x


def gelu(maker: Maker, node: Node) -> Any:
    tanh = node.attributes.get("approximate", "none") == "tanh"
    return mb.gelu(x=maker.value(node, 0), mode="TANH_APPROXIMATION" if tanh else "EXACT")


def hard_sigmoid(maker: Maker, node: Node) -> Any:
    alpha, beta = node.attributes.get("alpha", 0.2), node.attributes.get("beta", 0.5)
    return mb.sigmoid_hard(x=maker.value(node, 0), alpha=np.float32(alpha), beta=np.float32(beta))


def hard_swish(maker: Maker, node: Node) -> Any:
    x = maker.value(node, 0)
    return mb.mul(x=x, y=mb.sigmoid_hard(x=x, alpha=np.float32(1 / 6), beta=np.float32(0.5)))


def softmax(maker: Maker, node: Node) -> Any:
    return mb.softmax(x=maker.value(node, 0), axis=int(node.attributes.get("axis", -1)))


def reshape(maker: Maker, node: Node) -> Any:
    return mb.reshape(x=maker.value(node, 0), shape=list(maker.shape(node.outputs[0])))


def transpose(maker: Maker, node: Node) -> Any:
    rank = len(maker.shape(node.input(0)))
    return mb.transpose(x=maker.value(node, 0), perm=list(node.attributes.get("perm", range(rank)[::-1])))


def expand(maker: Maker, node: Node) -> Any:
    shape, wanted = maker.shape(node.input(0)), maker.shape(node.outputs[0])
    full = (1,) * (len(wanted) - len(shape)) + tuple(shape)
    wide = mb.reshape(x=maker.value(node, 0), shape=list(full))
    return mb.tile(x=wide, reps=[most // size for size, most in zip(full, wanted, strict=True)])


def gather(maker: Maker, node: Node) -> Any:
    axis = int(node.attributes.get("axis", 0))
    return mb.gather(x=maker.value(node, 0), indices=maker.value(node, 1), axis=axis)


def gather_nd(maker: Maker, node: Node) -> Any:
    if node.attributes.get("batch_dims", 0):
        raise refuse(node, "GatherND with batch dimensions has no form here")
    return mb.gather_nd(x=maker.value(node, 0), indices=maker.value(node, 1))


def concat(maker: Maker, node: Node) -> Any:
    values = [maker.value(node, place) for place in range(len(node.inputs))]
    return mb.concat(values=values, axis=int(node.attributes["axis"]))


def split(maker: Maker, node: Node) -> Any:
    axis = int(node.attributes.get("axis", 0))
    sizes = [maker.shape(name)[axis] for name in node.outputs]
    return tuple(mb.split(x=maker.value(node, 0), split_sizes=sizes, axis=axis))


def slice_(maker: Maker, node: Node) -> Any:
    shape = maker.shape(node.input(0))
    starts, ends = maker.stored(node, 1), maker.stored(node, 2)
    axes = maker.stored(node, 3) if node.input(3) else range(len(starts))
    steps = maker.stored(node, 4) if node.input(4) else [1] * len(starts)
    begin, end, stride = [0] * len(shape), list(shape), [1] * len(shape)
    for start, stop, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 1:
            raise refuse(node, "Slice with a negative step has no form here")
        begin[axis], end[axis], stride[axis] = slice(int(start), int(stop), int(step)).indices(shape[axis])
    return mb.slice_by_index(x=maker.value(node, 0), begin=begin, end=end, stride=stride)


def pad(maker: Maker, node: Node) -> Any:
    if node.attributes.get("mode", "constant") != "constant" or node.input(3):
        raise refuse(node, "only constant Pad over all axes has a form here")
    edges = np.asarray(maker.stored(node, 1)).reshape(2, -1).T.reshape(-1)
    value = maker.stored(node, 2) if node.input(2) else 0.0
    return mb.pad(x=maker.value(node, 0), pad=[int(edge) for edge in edges], constant_val=np.float32(np.squeeze(value)))


def resize(maker: Maker, node: Node) -> Any:
    before, after = maker.shape(node.input(0)), maker.shape(node.outputs[0])
    whole = all(big % small == 0 for small, big in zip(before, after, strict=True))
    if len(before) != 4 or before[:2] != after[:2] or not whole:
        raise refuse(node, f"Resize from {before} to {after} has no form here")
    scale = {"scale_factor_height": after[2] // before[2], "scale_factor_width": after[3] // before[3]}
    mode, place = node.attributes.get("mode", "nearest"), node.attributes.get("coordinate_transformation_mode")
    if mode == "nearest":  # by whole factors: each value is repeated
        return mb.upsample_nearest_neighbor(x=maker.value(node, 0), **scale)
    if mode == "linear" and place in ("half_pixel", None, "align_corners"):
        return mb.upsample_bilinear(x=maker.value(node, 0), align_corners=place == "align_corners", **scale)
    raise refuse(node, f"Resize {mode} with {place} has no form here")


def where(maker: Maker, node: Node) -> Any:
    shape = maker.shape(node.outputs[0])
    condition, first, second = (maker.spread(node, place, shape) for place in range(3))
    return mb.select(cond=condition, a=first, b=second)


def cast(maker: Maker, node: Node) -> Any:
    return mb.cast(x=maker.value(node, 0), dtype=maker.kind(node.outputs[0]))


def _reduction(build: Callable[..., Any]) -> Operator:
    def make(maker: Maker, node: Node) -> Any:
        axes = maker.stored(node, 1) if node.input(1) else node.attributes.get("axes")
        every = range(len(maker.shape(node.input(0))))
        places = list(every) if axes is None else [int(axis) for axis in np.atleast_1d(axes)]
        return build(x=maker.value(node, 0), axes=places, keep_dims=bool(node.attributes.get("keepdims", 1)))

    return make


def reciprocal(maker: Maker, node: Node) -> Any:
    return mb.real_div(x=np.float32(1), y=maker.value(node, 0))


def negative(maker: Maker, node: Node) -> Any:
    return mb.mul(x=maker.value(node, 0), y=np.float32(-1))


def leaky_relu(maker: Maker, node: Node) -> Any:
    return mb.leaky_relu(x=maker.value(node, 0), alpha=np.float32(node.attributes.get("alpha", 0.01)))


def elu(maker: Maker, node: Node) -> Any:
    return mb.elu(x=maker.value(node, 0), alpha=np.float32(node.attributes.get("alpha", 1.0)))


OPERATORS: Mapping[str, Operator] = {
    **{name: _one(getattr(mb, name.lower())) for name in ("Abs", "Erf", "Exp", "Relu", "Sigmoid", "Sqrt", "Tanh")},
    **{name: reshape for name in ("Flatten", "Reshape", "Squeeze", "Unsqueeze")},
    **{name: _two(getattr(mb, name.lower())) for name in ("Add", "Equal", "Greater", "Less", "Mul", "Pow", "Sub")},
    "And": _two(mb.logical_and),
    "AveragePool": _pool(mb.avg_pool, average=True),
    "BatchNormalization": batch_norm,
    "Cast": cast,
    "Clip": clip,
    "Concat": concat,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Div": _two(mb.real_div),
    "Elu": elu,
    "Expand": expand,
    "Gather": gather,
    "GatherND": gather_nd,
    "Gelu": gelu,
    "Gemm": gemm,
    "GlobalAveragePool": global_average,
    "GreaterOrEqual": _two(mb.greater_equal),
    "HardSigmoid": hard_sigmoid,
    "HardSwish": hard_swish,
    "Identity": _one(mb.identity),
    "LayerNormalization": layer_norm,
    "LeakyRelu": leaky_relu,
    "LessOrEqual": _two(mb.less_equal),
    "Log": _one(mb.log, epsilon=np.float32(0)),
    "MatMul": _two(mb.matmul),
    "Max": _fold(mb.maximum),
    "MaxPool": _pool(mb.max_pool, average=False),
    "Min": _fold(mb.minimum),
    "Neg": negative,
    "Not": _one(mb.logical_not),
    "Or": _two(mb.logical_or),
    "Pad": pad,
    "Reciprocal": reciprocal,
    "ReduceL2": _reduction(mb.reduce_l2_norm),
    "ReduceMax": _reduction(mb.reduce_max),
    "ReduceMean": _reduction(mb.reduce_mean),
    "ReduceMin": _reduction(mb.reduce_min),
    "ReduceSum": _reduction(mb.reduce_sum),
    "Resize": resize,
    "Slice": slice_,
    "Softmax": softmax,
    "Split": split,
    "Transpose": transpose,
    "Where": where,
}
