"""The ONNX operators that have a form in the ExecuTorch export, in torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from targets.backends.executorch.grow import batch_norm, conv_transpose, refuse, resize
from targets.backends.executorch.module import OnnxModule, Operator, OperatorTable
from targets.static_graph import Node


def _apply(function: Any) -> Operator:
    """An operator that is one torch function of its operands."""
    return lambda _module, _node, operands: function(*operands)


def _stored(module: OnnxModule, node: Node, position: int) -> Any:
    value = module.constant(node.input(position)) if node.input(position) else None
    if value is None and node.input(position):
        raise refuse(node, f"{node.operator} with a computed `{node.input(position)}` has no form here")
    return value


def _edges(module: OnnxModule, node: Node, kernel: Any) -> tuple[int, int, int, int]:
    """Pads (top, left, bottom, right), with what auto_pad or ceil_mode add."""
    strides = node.attributes.get("strides", (1, 1))
    dilations = node.attributes.get("dilations", (1, 1))
    shape, result = module.shape(node.input(0)), module.shape(node.outputs[0])
    if len(shape) != 4:
        raise refuse(node, f"{node.operator} over {len(shape) - 2} dimensions has no form here")
    pads = list(node.attributes.get("pads", (0, 0, 0, 0)))
    reach = [(kernel[axis] - 1) * dilations[axis] + 1 for axis in range(2)]
    needed = [(result[axis + 2] - 1) * strides[axis] + reach[axis] - shape[axis + 2] for axis in range(2)]
    mode = node.attributes.get("auto_pad", "NOTSET")
    if mode == "SAME_UPPER":
        pads[:2] = [max(total, 0) // 2 for total in needed]
    elif mode not in ("NOTSET", "VALID"):
        raise refuse(node, f"auto_pad {mode} has no form here")
    after = [max(pads[2 + axis], needed[axis] - pads[axis]) for axis in range(2)]
    return int(pads[0]), int(pads[1]), int(after[0]), int(after[1])


def conv(module: OnnxModule, node: Node, operands: list[Any]) -> Tensor:
    value, weight = operands[:2]
    bias = operands[2] if len(operands) > 2 else None
    top, left, bottom, right = _edges(module, node, weight.shape[2:])
    padding = [top, left]
    if (top, left) != (bottom, right):
        value, padding = functional.pad(value, (left, right, top, bottom)), [0, 0]
    strides, dilations = (list(node.attributes.get(key, (1, 1))) for key in ("strides", "dilations"))
    return functional.conv2d(value, weight, bias, strides, padding, dilations, int(node.attributes.get("group", 1)))


def max_pool(module: OnnxModule, node: Node, operands: list[Any]) -> Tensor:
    kernel = list(node.attributes["kernel_shape"])
    top, left, bottom, right = _edges(module, node, kernel)
    value, padding = operands[0], [top, left]
    if (top, left) != (bottom, right) or top > kernel[0] // 2 or left > kernel[1] // 2:
        value, padding = functional.pad(value, (left, right, top, bottom), value=torch.finfo(value.dtype).min), [0, 0]
    strides, dilations = (list(node.attributes.get(key, (1, 1))) for key in ("strides", "dilations"))
    return functional.max_pool2d(value, kernel, strides, padding, dilations)


def average_pool(module: OnnxModule, node: Node, operands: list[Any]) -> Tensor:
    kernel = list(node.attributes["kernel_shape"])
    top, left, bottom, right = _edges(module, node, kernel)
    if (top, left) != (bottom, right):
        raise refuse(node, "AveragePool with uneven padding has no form here")
    counted = bool(node.attributes.get("count_include_pad", 0))
    strides = list(node.attributes.get("strides", (1, 1)))
    return functional.avg_pool2d(operands[0], kernel, strides, [top, left], False, counted)


def gemm(module: OnnxModule, node: Node, operands: list[Any]) -> Tensor:
    """As a Linear, which is the form the partitioner knows."""
    attributes = node.attributes
    if attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0 or attributes.get("transA", 0):
        raise refuse(node, "only Gemm with alpha = beta = 1 and transA = 0 has a form here")
    weight = operands[1] if attributes.get("transB", 0) else operands[1].t()
    if node.name in module.linear:
        weight = module.linear_weight(node)
    bias = operands[2] if len(operands) > 2 else None
    return functional.linear(operands[0], weight, bias)


def matmul(module: OnnxModule, node: Node, operands: list[Any]) -> Tensor:
    if node.name in module.linear:
        return functional.linear(operands[0], module.linear_weight(node))
    return torch.matmul(operands[0], operands[1])


def clip(module: OnnxModule, node: Node, operands: list[Any]) -> Tensor:
    low, high = (_stored(module, node, position) for position in (1, 2))
    bounds = [None if bound is None else float(np.squeeze(bound)) for bound in (low, high)]
    return torch.clamp(operands[0], bounds[0], bounds[1])


def softmax(_module: OnnxModule, node: Node, operands: list[Any]) -> Tensor:
    return torch.softmax(operands[0], int(node.attributes.get("axis", -1)))


def hard_sigmoid(_module: OnnxModule, node: Node, operands: list[Any]) -> Tensor:
    alpha, beta = node.attributes.get("alpha", 0.2), node.attributes.get("beta", 0.5)
    return torch.clamp(operands[0] * alpha + beta, 0.0, 1.0)


def gelu(_module: OnnxModule, node: Node, operands: list[Any]) -> Tensor:
    return functional.gelu(operands[0], approximate=node.attributes.get("approximate", "none"))


def leaky_relu(_module: OnnxModule, node: Node, operands: list[Any]) -> Tensor:
    return functional.leaky_relu(operands[0], node.attributes.get("alpha", 0.01))


def layer_norm(_module: OnnxModule, node: Node, operands: list[Any]) -> Tensor:
    axis = int(node.attributes.get("axis", -1)) % operands[0].dim()
    shape = list(operands[0].shape[axis:])
    bias = operands[2] if len(operands) > 2 else None
    return functional.layer_norm(operands[0], shape, operands[1], bias, node.attributes.get("epsilon", 1e-5))


def reshape(module: OnnxModule, node: Node, operands: list[Any]) -> Tensor:
    return operands[0].reshape(module.shape(node.outputs[0]))


def transpose(_module: OnnxModule, node: Node, operands: list[Any]) -> Tensor:
    return operands[0].permute(tuple(node.attributes.get("perm", range(operands[0].dim())[::-1])))


def gather(_module: OnnxModule, node: Node, operands: list[Any]) -> Tensor:
    table, indices = operands[:2]
    axis = int(node.attributes.get("axis", 0)) % table.dim()
    indices = indices.to(torch.int64)
    if axis == 0 and table.dim() == 2 and indices.dim() > 0:
        return functional.embedding(indices, table)
    picked = torch.index_select(table, axis, indices.reshape(-1))
    return picked.reshape((*table.shape[:axis], *indices.shape, *table.shape[axis + 1 :]))


def gather_nd(module: OnnxModule, node: Node, operands: list[Any]) -> Tensor:
    if node.attributes.get("batch_dims", 0):
        raise refuse(node, "GatherND with batch dimensions has no form here")
    index, shape = _stored(module, node, 1), module.shape(node.input(0))
    if index.shape[-1] != len(shape):
        raise refuse(node, "GatherND of slices has no form here")
    places = np.ravel_multi_index(tuple(np.moveaxis(index, -1, 0)), shape, mode="wrap").reshape(-1)
    flat = operands[0].reshape(-1)
    if not np.array_equal(places, np.arange(flat.numel())):
        flat = torch.index_select(flat, 0, torch.from_numpy(places))
    return flat.reshape(module.shape(node.outputs[0]))


def cast(module: OnnxModule, node: Node, operands: list[Any]) -> Tensor:
    return operands[0].to(getattr(torch, module.graph.types[node.outputs[0]].name))


def concat(_module: OnnxModule, node: Node, operands: list[Any]) -> Tensor:
    return torch.cat(operands, int(node.attributes["axis"]))


def slice_(module: OnnxModule, node: Node, operands: list[Any]) -> Tensor:
    value = operands[0]
    starts, ends, axes, steps = (_stored(module, node, position) for position in range(1, 5))
    index = [slice(None)] * value.dim()
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis = number if axes is None else int(axes[number])
        step = 1 if steps is None else int(steps[number])
        if step < 1:
            raise refuse(node, "Slice with a negative step has no form here")
        index[axis] = slice(*slice(int(start), int(end), step).indices(value.shape[axis]))
    return value[tuple(index)]


def split(module: OnnxModule, node: Node, operands: list[Any]) -> tuple[Tensor, ...]:
    axis = int(node.attributes.get("axis", 0))
    return tuple(torch.split(operands[0], [module.shape(name)[axis] for name in node.outputs], axis))


def pad(module: OnnxModule, node: Node, operands: list[Any]) -> Tensor:
    edges, value = _stored(module, node, 1), _stored(module, node, 2)
    if node.attributes.get("mode", "constant") != "constant" or node.input(3):
        raise refuse(node, "only constant Pad over all axes has a form here")
    pairs = np.asarray(edges).reshape(2, -1).T[::-1].reshape(-1)
    return functional.pad(operands[0], [int(edge) for edge in pairs], value=0.0 if value is None else float(value))


def _reduction(function: Any) -> Operator:
    def reduce(module: OnnxModule, node: Node, operands: list[Any]) -> Tensor:
        axes = _stored(module, node, 1) if node.input(1) else node.attributes.get("axes")
        places = list(range(operands[0].dim())) if axes is None else [int(axis) for axis in np.atleast_1d(axes)]
        made: Tensor = function(operands[0], places, bool(node.attributes.get("keepdims", 1)))
        return made

    return reduce


OPERATORS: OperatorTable = {
    "Abs": _apply(torch.abs),
    "Add": _apply(torch.add),
    "And": _apply(torch.logical_and),
    "AveragePool": average_pool,
    "BatchNormalization": batch_norm,
    "Cast": cast,
    "Clip": clip,
    "Concat": concat,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Div": _apply(torch.div),
    "Elu": _apply(functional.elu),
    "Erf": _apply(torch.erf),
    "Exp": _apply(torch.exp),
    "Flatten": reshape,
    "Gather": gather,
    "GatherND": gather_nd,
    "Gelu": gelu,
    "Gemm": gemm,
    "GlobalAveragePool": _apply(lambda value: torch.mean(value, (-2, -1), keepdim=True)),
    "HardSigmoid": hard_sigmoid,
    "HardSwish": _apply(functional.hardswish),
    "Identity": _apply(lambda value: value),
    "LayerNormalization": layer_norm,
    "LeakyRelu": leaky_relu,
    "Log": _apply(torch.log),
    "MatMul": matmul,
    "Max": _apply(torch.maximum),
    "MaxPool": max_pool,
    "Min": _apply(torch.minimum),
    "Mul": _apply(torch.mul),
    "Neg": _apply(torch.neg),
    "Pad": pad,
    "Pow": _apply(torch.pow),
    "ReduceMax": _reduction(torch.amax),
    "ReduceMean": _reduction(torch.mean),
    "ReduceSum": _reduction(torch.sum),
    "Relu": _apply(functional.relu),
    "Reshape": reshape,
    "Resize": resize,
    "Sigmoid": _apply(torch.sigmoid),
    "Slice": slice_,
    "Softmax": softmax,
    "Split": split,
    "Sqrt": _apply(torch.sqrt),
    "Squeeze": reshape,
    "Sub": _apply(torch.sub),
    "Tanh": _apply(torch.tanh),
    "Transpose": transpose,
    "Unsqueeze": reshape,
    "Where": _apply(torch.where),
}
