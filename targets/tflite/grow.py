"""Operators that make a picture larger, and batch norm that no convolution took: ConvTranspose, Resize."""

from __future__ import annotations

import numpy as np

from targets.static_graph import Node
from targets.tflite.convert import Converter, refuse


def batch_norm(state: Converter, node: Node) -> None:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias, as a product and a sum with stored vectors."""
    arrays = [state.array(name) for name in node.inputs[1:5]]
    if any(array is None for array in arrays):
        raise refuse(node, "batch norm with computed statistics has no TFLite form here")
    scale, bias, mean, variance = (np.asarray(array, np.float32) for array in arrays)
    factor = scale / np.sqrt(variance + np.float32(node.attributes.get("epsilon", 1e-5)))
    last = state.rank(node.input(0)) == 4
    if not last and state.rank(node.input(0)) != 2:
        raise refuse(node, "batch norm over this rank has no TFLite form here")
    source = state.get(node.input(0), last)
    scaled = state.temporary(f"{node.name}/scaled", source.shape)
    product = [source, state.constant(factor.astype(np.float32), "factor")]
    state.builder.add("MUL", product, [scaled], state.schema.MulOptionsT())
    shift = state.constant((bias - mean * factor).astype(np.float32), "shift")
    state.builder.add("ADD", [scaled, shift], [state.result(node.outputs[0], last)], state.schema.AddOptionsT())


def conv_transpose(state: Converter, node: Node) -> None:
    """ConvTranspose of one group: TRANSPOSE_CONV in float, its weight as (output, height, width, input)."""
    weight = state.array(node.input(1))
    attributes = node.attributes
    strides = [int(value) for value in attributes.get("strides", (1, 1))]
    pads = [int(value) for value in attributes.get("pads", (0, 0, 0, 0))]
    extra = any(attributes.get("output_padding", ())) or any(value != 1 for value in attributes.get("dilations", ()))
    if weight is None or weight.ndim != 4 or int(attributes.get("group", 1)) != 1 or extra:
        raise refuse(node, "this ConvTranspose (groups, dilations or output padding) has no TFLite form here")
    if any(pads) or attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise refuse(node, "ConvTranspose with padding has no TFLite form here")
    source = state.get(node.input(0), last=True)
    result = state.result(node.outputs[0], last=True)
    options = state.schema.TransposeConvOptionsT()
    options.padding = state.schema.Padding.VALID
    options.strideH, options.strideW = strides
    filters = state.constant(np.ascontiguousarray(weight.transpose(1, 2, 3, 0)), node.input(1))
    shape = state.constant(np.asarray(result.shape, np.int32), "shape")
    inputs = [shape, filters, source]
    if node.input(2):
        inputs.append(state.get(node.input(2)))
    state.builder.add("TRANSPOSE_CONV", inputs, [result], options)


def resize(state: Converter, node: Node) -> None:
    """Resize of height and width, nearest or linear, in the coordinate systems that TFLite has."""
    shape, target = state.graph.shape(node.input(0)), state.graph.shape(node.outputs[0])
    mode = node.attributes.get("mode", "nearest")
    where = node.attributes.get("coordinate_transformation_mode", "half_pixel")
    if len(shape) != 4 or shape[:2] != target[:2] or mode not in ("nearest", "linear"):
        raise refuse(node, f"Resize ({mode}) of these dimensions has no TFLite form here")
    if where not in ("asymmetric", "half_pixel", "pytorch_half_pixel", "align_corners"):
        raise refuse(node, f"Resize with coordinates `{where}` has no TFLite form here")
    _check_nearest(node, mode, where, shape, target)
    quantized = state.is_quantized(node.input(0)) and mode == "nearest"
    source = state.get(node.input(0), last=True, quantized=quantized)
    linear = mode == "linear"
    options = getattr(state.schema, "ResizeBilinearOptionsT" if linear else "ResizeNearestNeighborOptionsT")()
    options.alignCorners = where == "align_corners"
    options.halfPixelCenters = where.endswith("half_pixel")
    size = state.constant(np.asarray(target[2:], np.int32), "size")
    result = state.result(node.outputs[0], last=True, params=source.quantization)
    state.builder.add("RESIZE_BILINEAR" if linear else "RESIZE_NEAREST_NEIGHBOR", [source, size], [result], options)


def _check_nearest(node: Node, mode: str, where: str, shape: tuple[int, ...], target: tuple[int, ...]) -> None:
    """TFLite rounds down (asymmetric) or to the middle; where a picture grows by whole factors all agree."""
    whole = all(large % small == 0 for large, small in zip(target[2:], shape[2:], strict=True))
    rounding = node.attributes.get("nearest_mode", "round_prefer_floor")
    if mode == "nearest" and not whole and not (where == "asymmetric" and rounding == "floor"):
        raise refuse(node, f"Resize to a nearest place ({rounding}) by a fraction has no TFLite form here")
    if (
        mode == "nearest"
        and where == "asymmetric"
        and rounding != "floor"
        and any(large // small > 2 for large, small in zip(target[2:], shape[2:], strict=True))
    ):
        raise refuse(node, f"Resize with asymmetric coordinates and {rounding} has no TFLite form here")
