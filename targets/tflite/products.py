"""Convolutions and matrix products: float, int8 and hybrid kernels."""

from __future__ import annotations

from typing import Any

import numpy as np

from compressor.errors import CompileError
from compressor.types import Array
from targets.static_graph import Node
from targets.tflite.builder import Quantization, Tensor
from targets.tflite.convert import Converter, Stored
from targets.tflite.windows import Window, padded, window_of


def conv(state: Converter, node: Node) -> None:
    """Conv: CONV_2D, or DEPTHWISE_CONV_2D where every input channel has its own filters."""
    kernel = state.array(node.input(1))
    if kernel is None or kernel.ndim != 4 or state.rank(node.input(0)) != 4:
        raise CompileError(f"node `{node.name}`: only 2-D Conv with a stored kernel has a TFLite form here")
    output, activation = state.activation_after(node)
    window = window_of(state, node, kernel.shape[2:])
    params = state.int8_result(node, output)
    stored = state.stored.get(node.input(1))
    depthwise = int(node.attributes.get("group", 1)) == state.graph.shape(node.input(0))[1] > 1
    order = (1, 2, 3, 0) if depthwise else (0, 2, 3, 1)
    if params is not None and _usable(stored) and state.is_quantized(node.input(0)):
        assert stored is not None
        source = padded(state, node, window, quantized=True)
        weight = _int8_weight(state, node.input(1), stored, order, axis=3 if depthwise else 0)
        bias = _int32_bias(state, node, state.params(node.input(0)), stored, kernel.shape[0])
        target = state.result(output, last=True, params=params)
    else:
        source = padded(state, node, window, quantized=False)
        weight = state.constant(np.ascontiguousarray(kernel.transpose(order)), node.input(1))
        bias = _float_bias(state, node.input(2), kernel.shape[0])
        target = state.result(output, last=True)
    operator = "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D"
    state.builder.add(
        operator, [source, weight, bias], [target], _conv_options(state, node, window, activation, depthwise)
    )


def _conv_options(state: Converter, node: Node, window: Window, activation: int, depthwise: bool) -> Any:
    options = state.schema.DepthwiseConv2DOptionsT() if depthwise else state.schema.Conv2DOptionsT()
    options.padding = window.padding(state.schema)
    options.strideH, options.strideW = window.strides
    options.dilationHFactor, options.dilationWFactor = window.dilations
    options.fusedActivationFunction = activation
    if depthwise:
        shape = state.graph.shape(node.input(0))
        options.depthMultiplier = state.graph.shape(node.outputs[0])[1] // shape[1]
    return options


def gemm(state: Converter, node: Node) -> None:
    """Gemm with a stored second matrix: FULLY_CONNECTED."""
    kernel = state.array(node.input(1))
    attributes = node.attributes
    scaled = attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0
    if kernel is None or scaled or attributes.get("transA", 0):
        raise CompileError(f"node `{node.name}`: only Gemm(x, stored) with alpha = beta = 1 has a TFLite form here")
    _fully_connected(state, node, node.input(2), node.outputs[0], transposed=bool(attributes.get("transB", 0)))


def matmul(state: Converter, node: Node) -> None:
    """MatMul: FULLY_CONNECTED with a stored matrix (a bias that is added next goes along), BATCH_MATMUL otherwise."""
    kernel = state.array(node.input(1))
    if (
        kernel is not None
        and kernel.ndim == 2
        and not state.is_constant(node.input(0))
        and state.rank(node.input(0)) >= 2
    ):
        bias, output = _added_bias(state, node, kernel.shape[1])
        _fully_connected(state, node, bias, output, transposed=False)
        return
    stored_side = any(map(state.is_constant, node.inputs))
    params = None if stored_side else state.int8_result(node, node.outputs[0])
    first, second = (state.get(name, quantized=params is not None) for name in node.inputs[:2])
    if min(len(first.shape), len(second.shape)) < 2:
        raise CompileError(f"node `{node.name}`: MatMul with a vector has no TFLite form here")
    options = state.schema.BatchMatMulOptionsT()
    state.builder.add("BATCH_MATMUL", [first, second], [state.result(node.outputs[0], params=params)], options)


def _added_bias(state: Converter, node: Node, width: int) -> tuple[str, str]:
    """Name of the stored vector that the only reader adds, and that reader's output; else empty and the node's own."""
    after = state.readers.get(node.outputs[0], [])
    if len(after) == 1 and after[0].operator == "Add" and node.outputs[0] not in state.graph.outputs:
        other = next((name for name in after[0].inputs if name != node.outputs[0]), "")
        array = state.array(other) if other else None
        if array is not None and array.shape == (width,):
            state.absorbed.add(after[0].name)
            return other, after[0].outputs[0]
    return "", node.outputs[0]


def _fully_connected(state: Converter, node: Node, bias_name: str, output: str, *, transposed: bool) -> None:
    stored, order = state.stored.get(node.input(1)), (0, 1) if transposed else (1, 0)
    kernel = state.array(node.input(1))
    assert kernel is not None
    width = kernel.shape[0 if transposed else 1]
    fused, activation = output, state.schema.ActivationFunctionType.NONE
    if output == node.outputs[0]:
        fused, activation = state.activation_after(node)
    params = state.int8_result(node, fused)
    source = state.get(node.input(0), quantized=params is not None and _usable(stored))
    if params is not None and _usable(stored):
        assert stored is not None
        assert source.quantization is not None
        weight = _int8_weight(state, node.input(1), stored, order, axis=0)
        biased = Node(node.operator, node.name, (*node.inputs[:2], bias_name), node.outputs)
        bias = _int32_bias(state, biased, source.quantization, stored, width)
        target = state.result(fused, params=params)
    else:
        weight = _hybrid_weight(state, node.input(1), None if state.small else stored, order)
        bias = _float_bias(state, bias_name, width)
        target = state.result(fused)
    options = state.schema.FullyConnectedOptionsT()
    options.fusedActivationFunction = activation
    options.keepNumDims = len(target.shape) > 2
    options.asymmetricQuantizeInputs = True  # read by hybrid kernels only
    state.builder.add("FULLY_CONNECTED", [source, weight, bias], [target], options)


def _usable(stored: Stored | None) -> bool:
    """TFLite's int8 weights have zero point 0."""
    return stored is not None and stored.values.dtype == np.int8 and not stored.zero_points.any()


def _hybrid_weight(state: Converter, name: str, stored: Stored | None, order: tuple[int, ...]) -> Tensor:
    if _usable(stored):
        assert stored is not None
        return _int8_weight(state, name, stored, order, axis=0)
    kernel = state.array(name)
    assert kernel is not None
    return state.constant(np.ascontiguousarray(kernel.transpose(order)), name)


def _int8_weight(state: Converter, name: str, stored: Stored, order: tuple[int, ...], axis: int) -> Tensor:
    values = np.ascontiguousarray(stored.values.transpose(order))
    scales = tuple(float(scale) for scale in stored.scales)
    if len(scales) > 1 and len(scales) != values.shape[axis]:
        raise CompileError(f"weight `{name}` has its scales along another axis than TFLite takes")
    return state.builder.constant(name, values, Quantization(scales, (0,) * len(scales), axis))


def _bias(state: Converter, name: str, width: int) -> Array:
    array = state.array(name) if name else None
    if name and array is None:
        raise CompileError(f"bias `{name}` is computed; TFLite takes a stored one")
    return np.zeros(width, np.float32) if array is None else np.broadcast_to(array.reshape(-1), (width,))


def _float_bias(state: Converter, name: str, width: int) -> Tensor:
    return state.constant(_bias(state, name, width).astype(np.float32), name or "no_bias")


def _int32_bias(state: Converter, node: Node, source: Quantization, stored: Stored, width: int) -> Tensor:
    """Round to input scale x weight scale: exact for a bias that QDQ stored so."""
    scales = np.float64(source.scales[0]) * stored.scales.astype(np.float64)
    limits = np.iinfo(np.int32)
    values = np.clip(np.rint(_bias(state, node.input(2), width) / scales), limits.min, limits.max).astype(np.int32)
    quantization = Quantization(tuple(float(scale) for scale in scales), (0,) * len(scales), 0)
    return state.builder.constant(f"{node.name}/bias", values, quantization)
