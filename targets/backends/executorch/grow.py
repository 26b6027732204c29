"""Operators that make a picture larger, and batch norm that no convolution took, in torch: ConvTranspose, Resize."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from compressor.errors import CompileError
from compressor.types import Array
from targets.backends.executorch.module import OnnxModule
from targets.static_graph import Node


def refuse(node: Node, why: str) -> CompileError:
    return CompileError(f"node `{node.name}`: {why}", hint="Export the model without it, or use another target.")


def batch_norm(_module: OnnxModule, node: Node, operands: list[Any]) -> Tensor:
    value, scale, bias, mean, variance = operands[:5]
    return functional.batch_norm(value, mean, variance, scale, bias, False, 0.0, node.attributes.get("epsilon", 1e-5))


def conv_transpose(_module: OnnxModule, node: Node, operands: list[Any]) -> Tensor:
    """Uneven padding is output padding of torch where that is small enough, otherwise cut off afterwards."""
    value, weight = operands[:2]
    bias = operands[2] if len(operands) > 2 else None
    attributes = node.attributes
    if attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or "output_shape" in attributes:
        raise refuse(node, "ConvTranspose with auto_pad or output_shape has no form here")
    if value.dim() != 4:
        raise refuse(node, f"ConvTranspose over {value.dim() - 2} dimensions has no form here")
    strides, dilations = (list(attributes.get(key, (1, 1))) for key in ("strides", "dilations"))
    pads, extra = list(attributes.get("pads", (0, 0, 0, 0))), list(attributes.get("output_padding", (0, 0)))
    group, before, after = int(attributes.get("group", 1)), pads[:2], pads[2:]
    uneven = [extra[axis] + before[axis] - after[axis] for axis in range(2)]
    if all(0 <= uneven[axis] < max(strides[axis], dilations[axis]) for axis in range(2)):
        return functional.conv_transpose2d(value, weight, bias, strides, before, uneven, group, dilations)
    whole = functional.conv_transpose2d(value, weight, bias, strides, 0, extra, group, dilations)
    height, width = (whole.shape[axis + 2] - after[axis] for axis in range(2))
    return whole[:, :, before[0] : height, before[1] : width]


def resize(module: OnnxModule, node: Node, operands: list[Any]) -> Tensor:
    """Of height and width: nearest by torch where it takes the same places, else by index; linear by whole pictures."""
    before, after = module.shape(node.input(0)), module.shape(node.outputs[0])
    mode = node.attributes.get("mode", "nearest")
    if len(before) != 4 or before[:2] != after[:2] or node.attributes.get("antialias", 0):
        raise refuse(node, f"Resize ({mode}) from {before} to {after} has no form here")
    scales = module.constant(node.input(2)) if node.input(2) else None
    factors = [after[axis] / before[axis] if scales is None or not len(scales) else scales[axis] for axis in (2, 3)]
    if mode == "nearest":
        return _nearest(node, operands[0], before[2:], after[2:], factors)
    where = node.attributes.get("coordinate_transformation_mode", "half_pixel")
    exact = all(abs(factors[axis] * before[axis + 2] - after[axis + 2]) < 1e-4 for axis in range(2))
    known = where in ("half_pixel", "align_corners") or (where == "pytorch_half_pixel" and min(after[2:]) > 1)
    if mode != "linear" or not exact or not known:
        raise refuse(node, f"Resize ({mode}, {where}) from {before} to {after} has no form here")
    return functional.interpolate(operands[0], after[2:], mode="bilinear", align_corners=where == "align_corners")


def _nearest(
    node: Node, value: Tensor, before: tuple[int, ...], after: tuple[int, ...], factors: list[float]
) -> Tensor:
    places = [_places(node, *each) for each in zip(before, after, factors, strict=True)]
    torch_places = [np.arange(large) * small // large for small, large in zip(before, after, strict=True)]
    if all(np.array_equal(*pair) for pair in zip(places, torch_places, strict=True)):
        return functional.interpolate(value, after, mode="nearest")
    for axis, picked in enumerate(places):
        value = torch.index_select(value, axis + 2, torch.from_numpy(picked))
    return value


def _places(node: Node, before: int, after: int, factor: float) -> Array:
    """The source of every row or column, by the definition of ONNX's Resize."""
    where = node.attributes.get("coordinate_transformation_mode", "half_pixel")
    at: Array = np.arange(after, dtype=np.float32)  # in single precision, as the runtimes do
    if where == "align_corners":
        at = at * (before - 1) / max(after - 1, 1)
    elif where == "asymmetric":
        at = at / np.float32(factor)
    elif where == "half_pixel" or (where == "pytorch_half_pixel" and after > 1):
        at = (at + np.float32(0.5)) / np.float32(factor) - np.float32(0.5)
    elif where == "pytorch_half_pixel":
        at = np.zeros(1, np.float32)
    else:
        raise refuse(node, f"Resize with coordinates `{where}` has no form here")
    rounded = {
        "round_prefer_floor": np.ceil(at - 0.5),
        "round_prefer_ceil": np.floor(at + 0.5),
        "floor": np.floor(at),
        "ceil": np.ceil(at),
    }[node.attributes.get("nearest_mode", "round_prefer_floor")]
    places: Array = np.clip(rounded, 0, before - 1).astype(np.int64)
    return places
