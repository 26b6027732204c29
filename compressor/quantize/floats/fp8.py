"""Float8 (E4M3) quantize-dequantize pairs around layers with constant weights, as TensorRT takes them from compute
capability 8.9 on: one scale per activation, one per weight tensor or output channel, no zero points."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, version_converter

from compressor.errors import StageError, sdk_errors
from compressor.models.onnx_graph import name_nodes, opset_of
from compressor.quantize.adjust.graph import Wiring, along, output_axis
from compressor.quantize.floats.formats import FORMATS
from compressor.quantize.ranges import Ranges
from compressor.types import Array

OPSET = 19  # first with float8 in QuantizeLinear
LAYERS = ("Conv", "Gemm", "MatMul")
SCALE, SCALES = "_fp8_scale", "_fp8_scales"  # how names of scales end: of activations, of weights
LARGEST = FORMATS["fp8"].largest


def float8_pairs(model: ModelProto, ranges: Ranges, skip: Mapping[str, str], *, per_channel: bool) -> ModelProto:
    """A new model in which every Conv, Gemm and MatMul with a constant weight reads float8 values.

    ``ranges``: lowest and highest value of each activation (:func:`compressor.quantize.ranges.collect`). Raises
    :class:`StageError` when nothing can be converted.
    """
    made = ModelProto()
    made.CopyFrom(model)
    if opset_of(made) < OPSET:
        with sdk_errors(StageError, f"raise the model to opset {OPSET}", hint="Export the model again."):
            made = version_converter.convert_version(made, OPSET)
        name_nodes(made)
    wiring, nodes, pairs = Wiring(made), [], {}
    for node in made.graph.node:
        weight = wiring.array(node.input[1]) if len(node.input) > 1 else None
        if node.op_type in LAYERS and weight is not None and node.input[0] in ranges and node.name not in skip:
            name = node.input[0]
            if name not in pairs:
                nodes += _activation(made, name, ranges[name])
                pairs[name] = f"{name}_fp8_dequantized"
            nodes.append(_weight(made, node, weight, output_axis(node) if per_channel else None))
            node.input[0], node.input[1] = pairs[name], f"{node.name}_fp8_weight"
        nodes.append(node)
    if not pairs:
        raise StageError("no layer can become float8", hint="It takes Conv, Gemm or MatMul with constant weights.")
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del made.graph.node[:]
    made.graph.node.extend(copies)
    return made


def float8_emulated(model: ModelProto) -> ModelProto:
    """``model`` (of :func:`float8_pairs`) without pairs: casts to float8 and back between two products.

    ONNX Runtime 1.31 moves the pairs across pooling, for which it has no float8 kernel, and then refuses the graph.
    """
    made = ModelProto()
    made.CopyFrom(model)
    stored = {tensor.name: tensor for tensor in made.graph.initializer}
    nodes: list[NodeProto] = []
    for node in made.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[1].endswith(SCALE):
            scaled = f"{node.output[0]}_scaled"
            nodes.append(helper.make_node("Div", list(node.input[:2]), [scaled], f"{scaled}_div"))
            cast = helper.make_node("Cast", [scaled], list(node.output), node.name, to=TensorProto.FLOAT8E4M3FN)
            nodes.append(cast)
        elif node.op_type == "DequantizeLinear" and node.input[1].endswith(SCALE):
            wide = f"{node.input[0]}_wide"
            nodes.append(helper.make_node("Cast", [node.input[0]], [wide], f"{wide}_cast", to=TensorProto.FLOAT))
            nodes.append(helper.make_node("Mul", [wide, node.input[1]], list(node.output), node.name))
        elif node.op_type == "DequantizeLinear" and node.input[1].endswith(SCALES):
            codes, scales = (numpy_helper.to_array(stored[name]).astype(np.float32) for name in node.input[:2])
            axis = next((item.i for item in node.attribute if item.name == "axis"), 0)
            shaped = along(scales, codes.ndim, axis) if scales.ndim else scales
            made.graph.initializer.append(numpy_helper.from_array(codes * shaped, node.output[0]))
        else:
            nodes.append(node)
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del made.graph.node[:]
    made.graph.node.extend(copies)
    return made


def rounded(array: Array, scale: Array) -> Array:
    """Nearest E4M3 values of ``array / scale``, never beyond the last finite one."""
    return np.clip(array / scale, -LARGEST, LARGEST).astype(ml_dtypes.float8_e4m3fn)


def _activation(model: ModelProto, name: str, span: tuple[float, float]) -> list[NodeProto]:
    scale = np.array(max(abs(span[0]), abs(span[1])) / LARGEST or 1.0, np.float32)
    zero = numpy_helper.from_array(np.zeros((), ml_dtypes.float8_e4m3fn), f"{name}_fp8_zero")
    model.graph.initializer.extend([numpy_helper.from_array(scale, name + SCALE), zero])
    pair = [name + SCALE, f"{name}_fp8_zero"]
    return [
        helper.make_node("QuantizeLinear", [name, *pair], [f"{name}_fp8"], f"{name}_fp8_quantize"),
        helper.make_node("DequantizeLinear", [f"{name}_fp8", *pair], [f"{name}_fp8_dequantized"], f"{name}_fp8_back"),
    ]


def _weight(model: ModelProto, node: NodeProto, weight: Array, axis: int | None) -> NodeProto:
    """The stored float8 weight and the node that widens it. A channel of zeros has the scale 1."""
    around = None if axis is None else tuple(n for n in range(weight.ndim) if n != axis)
    scale = np.abs(weight).max(axis=around, keepdims=True) / LARGEST
    scale = np.where(scale > 0, scale, 1.0).astype(np.float32)
    codes = numpy_helper.from_array(rounded(weight, scale), f"{node.name}_fp8_codes")
    scales = numpy_helper.from_array(scale.reshape(() if axis is None else -1), node.name + SCALES)
    zero = np.zeros(scale.size if axis is not None else (), ml_dtypes.float8_e4m3fn)
    zeros = numpy_helper.from_array(zero, f"{node.name}_fp8_zeros")
    model.graph.initializer.extend([codes, scales, zeros])
    more = {} if axis is None else {"axis": axis}
    names = [codes.name, scales.name, zeros.name]
    return helper.make_node("DequantizeLinear", names, [f"{node.name}_fp8_weight"], f"{node.name}_fp8_widen", **more)
