"""Operators of one tensor, value by value: kernels of their own, int8 tables, and formulas for what has no kernel.

In int8 such an operator has 256 answers. Where the runtime has no int8 kernel for it, they are stored and gathered:
exact to half a step, on any runtime that has CAST, ADD and GATHER.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from compressor.types import Array
from targets.static_graph import Node
from targets.tflite.builder import Quantization, Tensor
from targets.tflite.convert import Converter, refuse

Emit = Callable[[Converter, Node], None]
# Kernels whose int8 form has a fixed output scale (TFLite's quantization specification).
FIXED_OUTPUT = {
    "SOFTMAX": Quantization((1 / 256,), (-128,)),
    "LOGISTIC": Quantization((1 / 256,), (-128,)),
    "TANH": Quantization((1 / 128,), (0,)),
}
ZERO_TO_ONE = Quantization((1 / 255,), (-128,))  # saturates where a hard sigmoid is clipped
FLOAT_HARD_SWISH = "HARD_SWISH/float32"  # Vela refuses a file that has one
REPLACED = ("GELU", "RELU_0_TO_1", "RELU_N1_TO_1")  # have another form where the runtime lacks them
# erf(z) = 1 - poly(1 / (1 + p z)) exp(-z^2) for z >= 0, error below 1.5e-7 (Abramowitz and Stegun, 7.1.26)
_P = 0.3275911
_A = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
_STEEP = 1e30  # times this, everything but 0 leaves -1 .. 1


def unary(operator: str, options: str = "", *, int8: bool = False) -> Emit:
    """One operator of TFLite; ``int8``: its kernel also takes int8, each end in its own scale."""

    def emit(state: Converter, node: Node) -> None:
        last = state.is_last(node.input(0))
        params = state.int8_result(node, node.outputs[0]) if int8 else None
        source = state.get(node.input(0), last, quantized=params is not None)
        chosen = getattr(state.schema, options)() if options else None
        state.builder.add(operator, [source], [state.result(node.outputs[0], last, params)], chosen)

    return emit


def fixed_output(operator: str, options: str = "") -> Emit:
    """Softmax, sigmoid and tanh: int8 in, int8 out at the kernel's own scale, then to the file's scale."""

    def emit(state: Converter, node: Node) -> None:
        output, source = node.outputs[0], node.input(0)
        params = state.int8_result(node, output)
        last = state.is_last(source) and operator != "SOFTMAX"
        chosen: Any = getattr(state.schema, options)() if options else None
        if operator == "SOFTMAX":
            last_axis(state, node)
            chosen.beta = 1.0
        if params is None:
            state.builder.add(operator, [state.get(source, last)], [state.result(output, last)], chosen)
            return
        value = state.get(source, last, quantized=True)
        own = state.builder.tensor(f"{output}/int8", value.shape, "int8", FIXED_OUTPUT[operator])
        state.builder.add(operator, [value], [own], chosen)
        _to_scale(state, own, state.result(output, last, params))

    return emit


def _to_scale(state: Converter, own: Tensor, result: Tensor) -> None:
    state.builder.add("QUANTIZE", [own], [result], state.schema.QuantizeOptionsT())


def last_axis(state: Converter, node: Node) -> None:
    """Raises :class:`CompileError` where ``node`` runs over another axis than the last."""
    rank = state.rank(node.input(0))
    if int(node.attributes.get("axis", -1)) % rank != rank - 1:
        raise refuse(node, f"{node.operator} over an axis that is not the last has no TFLite form here")


def scalar(state: Converter, value: float) -> Tensor:
    """A stored float vector of one."""
    return state.constant(np.asarray([value], np.float32))


# ---------------------------------------------------------------- hard sigmoid and hard swish


def hard_sigmoid(state: Converter, node: Node) -> None:
    """max(0, min(1, alpha x + beta)); x times it, with alpha 1/6 and beta 1/2, is HARD_SWISH."""
    alpha, beta = float(node.attributes.get("alpha", 0.2)), float(node.attributes.get("beta", 0.5))
    if _is_hard_swish(state, node, alpha, beta):
        product = state.readers[node.outputs[0]][0]
        state.absorbed.add(product.name)
        hard_swish(state, Node("HardSwish", product.name, (node.input(0),), product.outputs))
        return
    last = state.is_last(node.input(0))
    params = state.int8_result(node, node.outputs[0])
    if params is not None:
        _int8_hard_sigmoid(state, node, alpha, beta, state.result(node.outputs[0], last, params))
        return
    _float_hard_sigmoid(state, node, alpha, beta, state.result(node.outputs[0], last))


def _float_hard_sigmoid(state: Converter, node: Node, alpha: float, beta: float, result: Tensor) -> None:
    value = state.get(node.input(0), state.is_last(node.input(0)))
    scaled, moved = (state.temporary(f"{node.name}/{part}", value.shape) for part in ("scaled", "moved"))
    state.builder.add("MUL", [value, scalar(state, alpha)], [scaled], state.schema.MulOptionsT())
    state.builder.add("ADD", [scaled, scalar(state, beta)], [moved], state.schema.AddOptionsT())
    if "RELU_0_TO_1" in state.absent:
        clip(state, moved, 0.0, 1.0, result)
    else:
        state.builder.add("RELU_0_TO_1", [moved], [result])


def hard_swish(state: Converter, node: Node) -> None:
    """HARD_SWISH in float or int8; x times a hard sigmoid where the runtime has it in int8 only."""
    if FLOAT_HARD_SWISH not in state.absent or state.int8_result(node, node.outputs[0]) is not None:
        unary("HARD_SWISH", "HardSwishOptionsT", int8=True)(state, node)
        return
    last = state.is_last(node.input(0))
    value = state.get(node.input(0), last)
    gate = state.temporary(f"{node.name}/gate", value.shape)
    _float_hard_sigmoid(state, node, 1 / 6, 0.5, gate)
    state.builder.add("MUL", [value, gate], [state.result(node.outputs[0], last)], state.schema.MulOptionsT())


def _is_hard_swish(state: Converter, node: Node, alpha: float, beta: float) -> bool:
    output = node.outputs[0]
    after = state.readers.get(output, [])
    if len(after) != 1 or after[0].operator != "Mul" or output in state.graph.outputs:
        return False
    other = next((name for name in after[0].inputs if name != output), "")
    return state.same(other, node.input(0)) and abs(alpha - 1 / 6) < 1e-4 and beta == 0.5


def _int8_hard_sigmoid(state: Converter, node: Node, alpha: float, beta: float, result: Tensor) -> None:
    """The same codes in a scale of alpha; then the sum with beta saturates at 0 and 1, the ends of its int8 range."""
    source = state.get(node.input(0), state.is_last(node.input(0)), quantized=True)
    assert source.quantization is not None
    factor, shift = (
        state.builder.constant(f"{node.name}/{name}", np.asarray([127], np.int8), Quantization((value / 127,), (0,)))
        for name, value in (("alpha", alpha), ("beta", beta))
    )
    wider = Quantization((source.quantization.scales[0] * alpha,), source.quantization.zero_points)
    scaled = state.builder.tensor(f"{node.name}/scaled", source.shape, "int8", wider)
    clipped = state.builder.tensor(f"{node.name}/clipped", source.shape, "int8", ZERO_TO_ONE)
    state.builder.add("MUL", [source, factor], [scaled], state.schema.MulOptionsT())
    state.builder.add("ADD", [scaled, shift], [clipped], state.schema.AddOptionsT())
    _to_scale(state, clipped, result)


def clip(state: Converter, value: Tensor, low: float, high: float, result: Tensor) -> None:
    """MAXIMUM and MINIMUM with stored floats; an infinite bound is left out."""
    options = state.schema.MaximumMinimumOptionsT
    if np.isfinite(low):
        between = state.temporary(f"{result.name}/low", value.shape) if np.isfinite(high) else result
        state.builder.add("MAXIMUM", [value, scalar(state, low)], [between], options())
        value = between
    if np.isfinite(high) or not np.isfinite(low):
        state.builder.add("MINIMUM", [value, scalar(state, high)], [result], options())


def leaky_relu(state: Converter, node: Node) -> None:
    options = state.schema.LeakyReluOptionsT()
    options.alpha = node.attributes.get("alpha", 0.01)
    last = state.is_last(node.input(0))
    params = state.int8_result(node, node.outputs[0])
    source = state.get(node.input(0), last, quantized=params is not None)
    state.builder.add("LEAKY_RELU", [source], [state.result(node.outputs[0], last, params)], options)


# ---------------------------------------------------------------- Gelu and Erf


def gelu(state: Converter, node: Node) -> None:
    """GELU in float or int8; without such a kernel a table, or a formula that is exact to 1e-7."""
    last = state.is_last(node.input(0))
    params = state.int8_result(node, node.outputs[0])
    by_tanh = node.attributes.get("approximate", "none") == "tanh"
    if "GELU" not in state.absent:
        options = state.schema.GeluOptionsT()
        options.approximate = by_tanh
        source = state.get(node.input(0), last, quantized=params is not None)
        state.builder.add("GELU", [source], [state.result(node.outputs[0], last, params)], options)
    elif params is not None:
        _table(state, node, _gelu_by_tanh if by_tanh else _gelu, params)
    elif by_tanh:
        raise refuse(node, "the tanh form of Gelu in float has no form for this runtime here")
    else:
        _float_gelu(state, node)


def erf(state: Converter, node: Node) -> None:
    """Erf outside of a Gelu: TFLite has no such operator; int8 by a table, float by its formula."""
    params = state.int8_result(node, node.outputs[0])
    if params is not None:
        _table(state, node, _erf, params)
    else:
        _float_erf(state, node)


def _erf(value: Array) -> Array:
    return np.asarray([math.erf(x) for x in value.tolist()])


def _gelu(value: Array) -> Array:
    return np.asarray(0.5 * value * (1 + _erf(value / math.sqrt(2))))


def _gelu_by_tanh(value: Array) -> Array:
    return np.asarray(0.5 * value * (1 + np.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3))))


def _table(state: Converter, node: Node, function: Callable[[Array], Array], params: Quantization) -> None:
    """All 256 answers, stored in the scale of the result and gathered by the input's code + 128."""
    last, schema = state.is_last(node.input(0)), state.schema
    source = state.get(node.input(0), last, quantized=True)
    assert source.quantization is not None
    real = (np.arange(-128, 128, dtype=np.float64) - source.quantization.zero_points[0]) * source.quantization.scales[0]
    codes = np.rint(function(real) / params.scales[0]) + params.zero_points[0]
    table = state.builder.constant(f"{node.name}/table", np.clip(codes, -128, 127).astype(np.int8), params)
    code, place = (state.temporary(f"{node.name}/{part}", source.shape, "int32") for part in ("code", "place"))
    state.builder.add("CAST", [source], [code], schema.CastOptionsT())
    state.builder.add("ADD", [code, state.constant(np.asarray([128], np.int32))], [place], schema.AddOptionsT())
    state.builder.add("GATHER", [table, place], [state.result(node.outputs[0], last, params)], schema.GatherOptionsT())


def _float_gelu(state: Converter, node: Node) -> None:
    """max(x, 0) - |x| / 2 * (1 - erf(|x| / sqrt(2))): the same on both sides of 0."""
    last, schema, add = state.is_last(node.input(0)), state.schema, state.builder.add
    value = state.get(node.input(0), last)
    size, share, right = (state.temporary(f"{node.name}/{part}", value.shape) for part in ("size", "share", "right"))
    add("ABS", [value], [size])
    rest = _complement(state, node, size, 1 / math.sqrt(2), 0.5)
    add("MUL", [size, rest], [share], schema.MulOptionsT())
    add("RELU", [value], [right])
    add("SUB", [right, share], [state.result(node.outputs[0], last)], schema.SubOptionsT())


def _float_erf(state: Converter, node: Node) -> None:
    """sign(z) (1 - (1 - erf(|z|)))."""
    last, schema, add = state.is_last(node.input(0)), state.schema, state.builder.add
    value = state.get(node.input(0), last)
    size, steep, sign, whole = (
        state.temporary(f"{node.name}/{part}", value.shape) for part in ("size", "steep", "sign", "whole")
    )
    add("ABS", [value], [size])
    rest = _complement(state, node, size, 1.0, 1.0)
    add("SUB", [scalar(state, 1.0), rest], [whole], schema.SubOptionsT())
    add("MUL", [value, scalar(state, _STEEP)], [steep], schema.MulOptionsT())
    clip(state, steep, -1.0, 1.0, sign)
    add("MUL", [whole, sign], [state.result(node.outputs[0], last)], schema.MulOptionsT())


def _complement(state: Converter, node: Node, size: Tensor, inside: float, factor: float) -> Tensor:
    """factor * (1 - erf(inside * size)) for ``size`` >= 0."""
    schema = state.schema

    def step(operator: str, options: str, *operands: Tensor | float) -> Tensor:
        made = state.temporary(f"{node.name}/{len(state.builder.operations)}", size.shape)
        given = [scalar(state, item) if isinstance(item, float) else item for item in operands]
        state.builder.add(operator, given, [made], getattr(schema, options)())
        return made

    shifted = step("ADD", "AddOptionsT", step("MUL", "MulOptionsT", size, _P * inside), 1.0)
    part = step("DIV", "DivOptionsT", scalar(state, 1.0), shifted)
    total = step("MUL", "MulOptionsT", part, _A[0] * factor)
    for coefficient in _A[1:]:
        total = step("MUL", "MulOptionsT", step("ADD", "AddOptionsT", total, coefficient * factor), part)
    square = step("MUL", "MulOptionsT", step("MUL", "MulOptionsT", size, size), -inside * inside)
    return step("MUL", "MulOptionsT", total, step("EXP", "ExpOptionsT", square))
