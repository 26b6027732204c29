"""The ONNX operators that have a TFLite form, each as a function that adds operations to a :class:`Converter`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from targets.static_graph import Node
from targets.tflite.builder import Tensor
from targets.tflite.convert import LAST, Converter, refuse
from targets.tflite.grow import batch_norm, conv_transpose, resize
from targets.tflite.products import conv, gemm, matmul
from targets.tflite.shapes import concat, gather, gather_nd, identity, pad, reshape, slice_, split, transpose
from targets.tflite.unary import (
    Emit,
    clip,
    erf,
    fixed_output,
    gelu,
    hard_sigmoid,
    hard_swish,
    last_axis,
    leaky_relu,
    scalar,
    unary,
)
from targets.tflite.windows import padded, window_of


def relu(state: Converter, node: Node) -> None:
    """Relu and Clip that no kernel before has taken."""
    operator = {"relu": "RELU", "relu6": "RELU6", "relu1": "RELU_N1_TO_1"}.get(state.clip_kind(node))
    operator = None if operator in state.absent else operator
    source, output = node.input(0), node.outputs[0]
    last = state.is_last(source)
    params = state.int8_result(node, output) if operator else None
    value = state.get(source, last, quantized=params is not None)
    result = state.result(output, last, params)
    if operator:
        state.builder.add(operator, [value], [result])
    else:
        clip(state, value, *state.limits(node), result)


def _binary(operator: str, options: str, int8: bool = False) -> Emit:
    def emit(state: Converter, node: Node) -> None:
        output, activation = node.outputs[0], 0
        if operator in ("ADD", "SUB", "MUL"):
            output, activation = state.activation_after(node)
        takes = int8 and all(state.has_int8(name) for name in node.inputs if state.is_constant(name))
        params = state.int8_result(node, output) if takes else None
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
    if quantized and state.is_constant(name):
        return state.int8_constant(name, last)
    return state.get(name, last, quantized)


def cast(state: Converter, node: Node) -> None:
    if not state.is_constant(node.input(0)) and state.kind(node.input(0)) == state.kind(node.outputs[0]):
        state.alias(node.outputs[0], node.input(0))
        return
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
    last_axis(state, node)
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
    add("ADD", [variance, scalar(state, node.attributes.get("epsilon", 1e-5))], [shifted], schema.AddOptionsT())
    add("RSQRT", [shifted], [factor])
    add("MUL", [centred, factor], [unit], schema.MulOptionsT())
    bias = node.input(2)
    result = state.result(node.outputs[0])
    scaled = state.temporary(f"{node.name}/scaled", source.shape) if bias else result
    add("MUL", [unit, state.get(node.input(1))], [scaled], schema.MulOptionsT())
    if bias:
        add("ADD", [scaled, state.get(bias)], [result], schema.AddOptionsT())


OPERATORS: Mapping[str, Emit] = {
    "Abs": unary("ABS"),
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
    "Elu": unary("ELU"),
    "Erf": erf,
    "Exp": unary("EXP", "ExpOptionsT"),
    "Flatten": reshape,
    "Gather": gather,
    "GatherND": gather_nd,
    "Gelu": gelu,
    "Gemm": gemm,
    "GlobalAveragePool": global_pool,
    "HardSigmoid": hard_sigmoid,
    "HardSwish": hard_swish,
    "Identity": identity,
    "LayerNormalization": layer_norm,
    "LeakyRelu": leaky_relu,
    "Log": unary("LOG"),
    "MatMul": matmul,
    "Max": _binary("MAXIMUM", "MaximumMinimumOptionsT"),
    "MaxPool": pool,
    "Min": _binary("MINIMUM", "MaximumMinimumOptionsT"),
    "Mul": _binary("MUL", "MulOptionsT", int8=True),
    "Neg": unary("NEG", "NegOptionsT"),
    "Pad": pad,
    "Pow": _binary("POW", "PowOptionsT"),
    "ReduceMax": _reduction("REDUCE_MAX"),
    "ReduceMean": _reduction("MEAN"),
    "ReduceSum": _reduction("SUM"),
    "Relu": relu,
    "Reshape": reshape,
    "Resize": resize,
    "Sigmoid": fixed_output("LOGISTIC"),
    "Slice": slice_,
    "Softmax": fixed_output("SOFTMAX", "SoftmaxOptionsT"),
    "Split": split,
    "Sqrt": unary("SQRT"),
    "Squeeze": reshape,
    "Sub": _binary("SUB", "SubOptionsT", int8=True),
    "Tanh": fixed_output("TANH"),
    "Transpose": transpose,
    "Unsqueeze": reshape,
    "Where": where,
}
