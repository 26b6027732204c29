"""The ONNX operators that have a TFLite form, each as a function that adds operations to a :class:`Converter`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from targets.static_graph import Node
from targets.tflite.builder import Quantization, Tensor
from targets.tflite.convert import LAST, Converter, refuse
from targets.tflite.grow import batch_norm, conv_transpose, resize
from targets.tflite.products import conv, gemm, matmul
from targets.tflite.shapes import concat, gather, gather_nd, identity, pad, reshape, slice_, split, transpose
from targets.tflite.windows import padded, window_of

Emit = Callable[[Converter, Node], None]
# Kernels whose int8 form has a fixed output scale (TFLite's quantization specification).
FIXED_OUTPUT = {
    "SOFTMAX": Quantization((1 / 256,), (-128,)),
    "LOGISTIC": Quantization((1 / 256,), (-128,)),
    "TANH": Quantization((1 / 128,), (0,)),
}


# ---------------------------------------------------------------- element by element


def _unary(operator: str, options: str = "") -> Emit:
    def emit(state: Converter, node: Node) -> None:
        last = state.is_last(node.input(0))
        source = state.get(node.input(0), last)
        chosen = getattr(state.schema, options)() if options else None
        state.builder.add(operator, [source], [state.result(node.outputs[0], last)], chosen)

    return emit


def _fixed_output(operator: str, options: str = "") -> Emit:
    """Softmax, sigmoid and tanh: int8 in, int8 out at the kernel's own scale, then to the file's scale."""

    def emit(state: Converter, node: Node) -> None:
        output, source = node.outputs[0], node.input(0)
        params = state.int8_result(node, output)
        last = state.is_last(source) and operator != "SOFTMAX"
        chosen: Any = getattr(state.schema, options)() if options else None
        if operator == "SOFTMAX":
            _last_axis(state, node)
            chosen.beta = 1.0
        if params is None:
            state.builder.add(operator, [state.get(source, last)], [state.result(output, last)], chosen)
            return
        value = state.get(source, last, quantized=True)
        own = state.builder.tensor(f"{output}/int8", value.shape, "int8", FIXED_OUTPUT[operator])
        state.builder.add(operator, [value], [own], chosen)
        result = state.result(output, last, params)
        state.builder.add("QUANTIZE", [own], [result], state.schema.QuantizeOptionsT())

    return emit


def _last_axis(state: Converter, node: Node) -> None:
    rank = state.rank(node.input(0))
    if int(node.attributes.get("axis", -1)) % rank != rank - 1:
        raise refuse(node, f"{node.operator} over an axis that is not the last has no TFLite form here")


def relu(state: Converter, node: Node) -> None:
    """Relu and Clip that no kernel before has taken."""
    operator = {"relu": "RELU", "relu6": "RELU6", "relu1": "RELU_N1_TO_1"}.get(state.clip_kind(node))
    source, output = node.input(0), node.outputs[0]
    last = state.is_last(source)
    params = state.int8_result(node, output) if operator else None
    value = state.get(source, last, quantized=params is not None)
    result = state.result(output, last, params)
    if operator:
        state.builder.add(operator, [value], [result])
        return
    low, high = state.limits(node)
    if np.isfinite(low):
        between = state.temporary(f"{node.name}/low", value.shape) if np.isfinite(high) else result
        state.builder.add("MAXIMUM", [value, _scalar(state, low)], [between], state.schema.MaximumMinimumOptionsT())
        value = between
    state.builder.add("MINIMUM", [value, _scalar(state, high)], [result], state.schema.MaximumMinimumOptionsT())


def _scalar(state: Converter, value: float) -> Tensor:
    return state.constant(np.asarray([value], np.float32))


def _binary(operator: str, options: str, int8: bool = False) -> Emit:
    def emit(state: Converter, node: Node) -> None:
        output, activation = node.outputs[0], 0
        if operator in ("ADD", "SUB", "MUL"):
            output, activation = state.activation_after(node)
        params = state.int8_result(node, output) if int8 and not any(map(state.is_constant, node.inputs)) else None
        last = len(state.graph.shape(output)) == 4 and any(
            state.is_last(name) for name in node.inputs if not state.is_constant(name)
        )
        operands = [_operand(state, name, last, params is not None) for name in node.inputs]
        chosen = getattr(state.schema, options)()
        if hasattr(chosen, "fusedActivationFunction"):
            chosen.fusedActivationFunction = activation
        state.builder.add(operator, operands, [state.result(output, last, params)], chosen)

    return emit


def _operand(state: Converter, name: str, last: bool, quantized: bool) -> Tensor:
    if last and not state.is_constant(name) and state.rank(name) != 4:
        source = state.get(name, quantized=quantized)
        shape = (1,) * (4 - len(source.shape)) + source.shape
        wide = state.builder.tensor(f"{name}/rank4", shape, source.type, source.quantization)
        state.reshape(source, wide)
        turned = state.builder.tensor(f"{name}/last", [shape[axis] for axis in LAST], source.type, source.quantization)
        state.move(wide, turned, LAST)
        return turned
    return state.get(name, last, quantized)


def hard_sigmoid(state: Converter, node: Node) -> None:
    """max(0, min(1, alpha x + beta))."""
    last = state.is_last(node.input(0))
    value = state.get(node.input(0), last)
    alpha, beta = node.attributes.get("alpha", 0.2), node.attributes.get("beta", 0.5)
    scaled, moved = (state.temporary(f"{node.name}/{part}", value.shape) for part in ("scaled", "moved"))
    state.builder.add("MUL", [value, _scalar(state, alpha)], [scaled], state.schema.MulOptionsT())
    state.builder.add("ADD", [scaled, _scalar(state, beta)], [moved], state.schema.AddOptionsT())
    state.builder.add("RELU_0_TO_1", [moved], [state.result(node.outputs[0], last)])


def leaky_relu(state: Converter, node: Node) -> None:
    last = state.is_last(node.input(0))
    options = state.schema.LeakyReluOptionsT()
    options.alpha = node.attributes.get("alpha", 0.01)
    state.builder.add("LEAKY_RELU", [state.get(node.input(0), last)], [state.result(node.outputs[0], last)], options)


def gelu(state: Converter, node: Node) -> None:
    last = state.is_last(node.input(0))
    options = state.schema.GeluOptionsT()
    options.approximate = node.attributes.get("approximate", "none") == "tanh"
    state.builder.add("GELU", [state.get(node.input(0), last)], [state.result(node.outputs[0], last)], options)


def cast(state: Converter, node: Node) -> None:
    last = state.is_last(node.input(0))
    source = state.get(node.input(0), last)
    state.builder.add("CAST", [source], [state.result(node.outputs[0], last)], state.schema.CastOptionsT())


def where(state: Converter, node: Node) -> None:
    operands = [state.get(name) for name in node.inputs]
    state.builder.add("SELECT_V2", operands, [state.result(node.outputs[0])], state.schema.SelectV2OptionsT())


def logical_and(state: Converter, node: Node) -> None:
    """And; a stored operand that is all true changes nothing but the shape."""
    for mask, other in (node.inputs, node.inputs[::-1]):
        array = state.array(mask)
        if array is not None and array.all() and state.graph.shape(other) == state.graph.shape(node.outputs[0]):
            state.alias(node.outputs[0], other)
            return
    operands = [state.get(name) for name in node.inputs]
    state.builder.add("LOGICAL_AND", operands, [state.result(node.outputs[0])], state.schema.LogicalAndOptionsT())


# ---------------------------------------------------------------- pools and reductions


def pool(state: Converter, node: Node) -> None:
    """MaxPool and AveragePool; int8 in the scale of the input, which both keep."""
    largest = node.operator == "MaxPool"
    window = window_of(state, node, node.attributes["kernel_shape"])
    counted = bool(node.attributes.get("count_include_pad", 0))
    if not largest and ((window.mode == "explicit" and not counted) or (window.mode == "same" and counted)):
        raise refuse(node, "AveragePool with this padding has no TFLite form")
    if window.dilations != (1, 1) or len(node.outputs) > 1:
        raise refuse(node, f"{node.operator} with dilations or indices has no TFLite form")
    quantized = state.is_quantized(node.input(0))
    source = padded(state, node, window, quantized=quantized, lowest=largest)
    options = state.schema.Pool2DOptionsT()
    options.padding = window.padding(state.schema)
    options.strideH, options.strideW = window.strides
    options.filterHeight, options.filterWidth = window.kernel
    operator = "MAX_POOL_2D" if largest else "AVERAGE_POOL_2D"
    result = state.result(node.outputs[0], last=True, params=source.quantization)
    state.builder.add(operator, [source], [result], options)


def global_pool(state: Converter, node: Node) -> None:
    """GlobalAveragePool: MEAN over height and width."""
    params = state.int8_result(node, node.outputs[0])
    source = state.get(node.input(0), last=True, quantized=params is not None)
    _reduce(state, "MEAN", source, (1, 2), state.result(node.outputs[0], last=True, params=params), keep=True)


def _reduce(
    state: Converter, operator: str, source: Tensor, axes: Sequence[int], result: Tensor, *, keep: bool
) -> Tensor:
    options = state.schema.ReducerOptionsT()
    options.keepDims = keep
    state.builder.add(operator, [source, state.constant(np.asarray(axes, np.int32), "axes")], [result], options)
    return result


def _reduction(operator: str) -> Emit:
    def emit(state: Converter, node: Node) -> None:
        rank = state.rank(node.input(0))
        given = state.array(node.input(1)) if node.input(1) else node.attributes.get("axes")
        axes = sorted(int(axis) % rank for axis in (range(rank) if given is None else np.atleast_1d(given)))
        keep = bool(node.attributes.get("keepdims", 1))
        last = rank == 4 and keep and state.is_last(node.input(0))
        places = [LAST.index(axis) for axis in axes] if last else axes
        params = state.int8_result(node, node.outputs[0]) if operator == "MEAN" else None
        source = state.get(node.input(0), last, quantized=params is not None)
        _reduce(state, operator, source, places, state.result(node.outputs[0], last, params), keep=keep)

    return emit


def layer_norm(state: Converter, node: Node) -> None:
    """LayerNormalization over the last axis, from means, a square and a reciprocal root."""
    _last_axis(state, node)
    schema, add = state.schema, state.builder.add
    source = state.get(node.input(0))
    narrow, axis = (*source.shape[:-1], 1), (len(source.shape) - 1,)
    mean, variance, shifted, factor = (
        state.temporary(f"{node.name}/{part}", narrow) for part in ("mean", "variance", "shifted", "factor")
    )
    centred, square, unit = (
        state.temporary(f"{node.name}/{part}", source.shape) for part in ("centred", "square", "unit")
    )
    _reduce(state, "MEAN", source, axis, mean, keep=True)
    add("SUB", [source, mean], [centred], schema.SubOptionsT())
    add("MUL", [centred, centred], [square], schema.MulOptionsT())
    _reduce(state, "MEAN", square, axis, variance, keep=True)
    add("ADD", [variance, _scalar(state, node.attributes.get("epsilon", 1e-5))], [shifted], schema.AddOptionsT())
    add("RSQRT", [shifted], [factor])
    add("MUL", [centred, factor], [unit], schema.MulOptionsT())
    bias = node.input(2)
    result = state.result(node.outputs[0])
    scaled = state.temporary(f"{node.name}/scaled", source.shape) if bias else result
    add("MUL", [unit, state.get(node.input(1))], [scaled], schema.MulOptionsT())
    if bias:
        add("ADD", [scaled, state.get(bias)], [result], schema.AddOptionsT())


OPERATORS: Mapping[str, Emit] = {
    "Abs": _unary("ABS"),
    "Add": _binary("ADD", "AddOptionsT", int8=True),
    "And": logical_and,
    "AveragePool": pool,
    "BatchNormalization": batch_norm,
    "Cast": cast,
    "Clip": relu,
    "Concat": concat,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Div": _binary("DIV", "DivOptionsT"),
    "Dropout": identity,
    "Elu": _unary("ELU"),
    "Exp": _unary("EXP", "ExpOptionsT"),
    "Flatten": reshape,
    "Gather": gather,
    "GatherND": gather_nd,
    "Gelu": gelu,
    "Gemm": gemm,
    "GlobalAveragePool": global_pool,
    "HardSigmoid": hard_sigmoid,
    "HardSwish": _unary("HARD_SWISH", "HardSwishOptionsT"),
    "Identity": identity,
    "LayerNormalization": layer_norm,
    "LeakyRelu": leaky_relu,
    "Log": _unary("LOG"),
    "MatMul": matmul,
    "Max": _binary("MAXIMUM", "MaximumMinimumOptionsT"),
    "MaxPool": pool,
    "Min": _binary("MINIMUM", "MaximumMinimumOptionsT"),
    "Mul": _binary("MUL", "MulOptionsT", int8=True),
    "Neg": _unary("NEG", "NegOptionsT"),
    "Pad": pad,
    "Pow": _binary("POW", "PowOptionsT"),
    "ReduceMax": _reduction("REDUCE_MAX"),
    "ReduceMean": _reduction("MEAN"),
    "ReduceSum": _reduction("SUM"),
    "Relu": relu,
    "Reshape": reshape,
    "Resize": resize,
    "Sigmoid": _fixed_output("LOGISTIC"),
    "Slice": slice_,
    "Softmax": _fixed_output("SOFTMAX", "SoftmaxOptionsT"),
    "Split": split,
    "Sqrt": _unary("SQRT"),
    "Squeeze": reshape,
    "Sub": _binary("SUB", "SubOptionsT", int8=True),
    "Tanh": _fixed_output("TANH"),
    "Transpose": transpose,
    "Unsqueeze": reshape,
    "Where": where,
}
