"""How each ATen operation carries labels: pointwise, shape, reduction. Weights meet data in ``rules_nn``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from compressor.models.structure.labels import LabelSpace, Value, axes_of, layer_along, replace


@dataclass(frozen=True)
class Call:
    """One executed operation."""

    name: str
    func: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]
    output: Any
    space: LabelSpace
    value_of: Callable[[Tensor], Value]

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in tree_leaves((list(self.args), self.kwargs)) if isinstance(leaf, Tensor)]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)


Rule = Callable[[Call], list[Value]]
FIXED = "is combined with a tensor of fixed size"


def combine(space: LabelSpace, operands: Sequence[tuple[Value, Sequence[int]]], skip: int | None = None) -> Value:
    """Labels of a broadcast combination. An axis of which one side has no labels, yet a size, cannot shrink."""
    rank = max(len(shape) for _, shape in operands)
    lifted = [(_lift(value, len(shape), rank), [1] * (rank - len(shape)) + list(shape)) for value, shape in operands]
    layers = []
    for value, _ in lifted:
        for layer in value.layers:
            current = layer
            for axis in axes_of(layer):
                if axis != skip and _is_fixed(lifted, axis):
                    current = space.fix_axis(current, axis, FIXED)
            layers.append(current)
    return Value(space.merge(layers), _free(lifted))


def _lift(value: Value, rank: int, target: int) -> Value:
    return Value(
        [layer.reshape([1] * (target - rank) + list(layer.shape)) for layer in value.layers],
        frozenset(axis + target - rank for axis in value.free),
    )


def _is_fixed(operands: Sequence[tuple[Value, Sequence[int]]], axis: int) -> bool:
    return any(
        shape[axis] > 1 and axis not in value.free and layer_along(value, axis) is None for value, shape in operands
    )


def _free(operands: Sequence[tuple[Value, Sequence[int]]]) -> frozenset[int]:
    rank = len(operands[0][1])
    sized = {axis: [value for value, shape in operands if shape[axis] > 1] for axis in range(rank)}
    return frozenset(axis for axis, values in sized.items() if values and all(axis in v.free for v in values))


def pointwise(call: Call) -> list[Value]:
    """Element by element, with broadcasting: addition, activation functions, the gate of a squeeze-excite block."""
    return [combine(call.space, [(call.value_of(tensor), tuple(tensor.shape)) for tensor in call.tensors])]


def unknown(call: Call) -> list[Value]:
    """Nothing is assumed about it: whatever goes in stays as it is."""
    values = [call.value_of(tensor) for tensor in call.tensors]
    call.space.freeze_all(values, f"enters the operation `{call.name}`, which the pruner does not follow")
    return []


def default_rule(func: Any) -> Rule:
    return pointwise if torch.Tag.pointwise in func.tags else unknown


def reshape(call: Call) -> list[Value]:
    """Views and other moves of elements: the same move, made on the labels."""
    tensor = call.args[0]
    value = call.value_of(tensor)
    layers = []
    for layer in value.layers:
        moved = _apply(call, layer.expand(tensor.shape))
        moved = call.space.collapse(moved)
        if len(axes_of(moved)) > 1 and call.name in _VIEWS:
            call.space.grids.append(moved)
        if axes_of(moved):
            layers.append(moved)
    return [Value(layers, _free_after(call, value, tensor), value.param)]


def _apply(call: Call, labels: Tensor) -> Tensor:
    if call.name in _VIEWS:
        return labels.reshape(call.output.shape)
    if call.name in {"clone", "contiguous", "_to_copy", "alias", "detach", "lift_fresh"}:
        return labels
    return call.func(labels, *call.args[1:], **call.kwargs)  # type: ignore[no-any-return]


def _free_after(call: Call, value: Value, tensor: Tensor) -> frozenset[int]:
    """Axes made by ``expand`` follow whatever they were expanded to; copies keep them."""
    if call.name == "expand":
        shift = call.output.dim() - tensor.dim()
        grown = {a for a in range(call.output.dim()) if a < shift or tensor.shape[a - shift] != call.output.shape[a]}
        return frozenset(grown | {axis + shift for axis in value.free})
    return value.free if tuple(call.output.shape) == tuple(tensor.shape) and call.name in _COPIES else frozenset()


_VIEWS = {"view", "_unsafe_view", "reshape"}
_COPIES = {"clone", "contiguous", "_to_copy", "alias", "detach"}


def part(call: Call) -> list[Value]:
    """Slices and splits. Equal parts are joined element by element so that they can only shrink together."""
    tensor = call.args[0]
    outputs = [leaf for leaf in tree_leaves(call.output) if isinstance(leaf, Tensor)]
    axis = call.argument(2 if call.name.startswith("split") else 1, "dim", 0) % tensor.dim()
    value = call.value_of(tensor)
    sizes = [out.shape[axis] for out in outputs]
    for layer in list(value.layers):
        if layer.shape[axis] > 1 and sizes not in ([tensor.shape[axis]], [0]):
            replace(value, layer, _cut_axis(call, layer, axis, sizes))
    made = [[] for _ in outputs]  # type: list[list[Tensor]]
    for layer in value.layers:
        parts = call.func(layer.expand(tensor.shape), *call.args[1:], **call.kwargs)
        for position, moved in enumerate(tree_leaves(parts)):
            made[position].append(call.space.collapse(moved))
    free = value.free - {axis}
    return [Value([layer for layer in layers if axes_of(layer)], free, value.param) for layers in made]


def _cut_axis(call: Call, layer: Tensor, axis: int, sizes: Sequence[int]) -> Tensor:
    start = call.argument(2, "start", 0) if call.name == "slice" else 0
    step = call.argument(4, "step", 1) if call.name == "slice" else 1
    even = len(set(sizes)) == 1 and step == 1 and (start or 0) % sizes[0] == 0
    if even and call.space.couple(layer, axis, sizes[0]):
        return layer
    return call.space.fix_axis(layer, axis, "is split at a fixed position")


def pick(call: Call) -> list[Value]:
    """``select``, ``unbind`` and indexing: the axis that is picked from keeps its size."""
    tensor = call.args[0]
    value = call.value_of(tensor)
    if call.name == "index":
        fixed = [axis for axis, index in enumerate(call.args[1]) if index is not None]
    else:
        fixed = [call.argument(1, "dim", 0) % tensor.dim()]
    kept = []
    for layer in value.layers:
        current = layer
        for axis in fixed:
            current = call.space.fix_axis(current, axis, "is picked from by position")
        kept.append(current)
    outputs = [leaf for leaf in tree_leaves(call.output) if isinstance(leaf, Tensor)]
    made = [Value(param=value.param) for _ in outputs]
    for layer in kept:
        moved = tree_leaves(call.func(layer.expand(tensor.shape), *call.args[1:], **call.kwargs))
        for target, labels in zip(made, moved, strict=True):
            collapsed = call.space.collapse(labels)
            target.layers += [collapsed] if axes_of(collapsed) else []
    return made


def gather(call: Call) -> list[Value]:
    """Picked by position along one axis; along the others the index has the data's size, and must follow it."""
    tensor, axis, index = call.args[0], call.args[1] % call.args[0].dim(), call.args[2]
    free = call.value_of(index).free
    layers = []
    for layer in call.value_of(tensor).layers:
        current = layer
        for other in axes_of(layer):
            if other == axis:
                current = call.space.fix_axis(current, other, "is picked from by position")
            elif index.shape[other] != tensor.shape[other] or other not in free:
                current = call.space.fix_axis(current, other, FIXED)
        if all(current.shape[a] in (1, call.output.shape[a]) for a in range(current.dim())):
            layers.append(current)
    return [Value([layer for layer in layers if axes_of(layer) and layer.shape[axis] == 1])]


def concatenate(call: Call) -> list[Value]:
    """Along the joined axis labels are laid side by side; along the others they are joined pairwise."""
    stacked = call.name == "stack"
    rank = call.output.dim()
    axis = call.argument(1, "dim", 0) % rank
    operands = []
    for tensor in call.args[0]:
        if tensor.numel() == 0 and not stacked:
            continue
        value, shape = call.value_of(tensor), list(tensor.shape)
        if stacked:
            value, shape = Value([layer.unsqueeze(axis) for layer in value.layers]), [*shape[:axis], 1, *shape[axis:]]
        operands.append((Value(list(value.layers), value.free), shape))
    for value, _ in operands:
        for layer in list(value.layers):
            if layer.shape[axis] > 1 and len(axes_of(layer)) > 1:
                replace(value, layer, call.space.fix_axis(layer, axis, FIXED))
    joined = _side_by_side(call.space, operands, axis, rank)
    others = [(Value([la for la in v.layers if la.shape[axis] == 1], v.free), shape) for v, shape in operands]
    rest = combine(call.space, others, skip=axis)
    return [Value(joined + [layer for layer in rest.layers if axes_of(layer)])]


def _side_by_side(space: LabelSpace, operands: Sequence[tuple[Value, list[int]]], axis: int, rank: int) -> list[Tensor]:
    along = [layer_along(value, axis) for value, _ in operands]
    if all(layer is None for layer in along):
        return []
    pieces = []
    for layer, (_, shape) in zip(along, operands, strict=True):
        if layer is None:
            layer = space.allocate(shape[axis])
            space.freeze(layer, "")
        pieces.append(layer.reshape(-1))
    return [torch.cat(pieces).reshape([-1 if other == axis else 1 for other in range(rank)])]


def reduce(call: Call) -> list[Value]:
    """Sums, means, maxima. Over the units themselves they change when a unit goes."""
    tensor = call.args[0]
    place = 2 if call.name in {"linalg_vector_norm", "norm"} else 1  # norms have their order before the dimensions
    dims = call.argument(place, "dim", None)
    dims = list(range(tensor.dim())) if dims is None else [dims] if isinstance(dims, int) else list(dims)
    axes = [axis % tensor.dim() for axis in (dims or range(tensor.dim()))] if tensor.dim() else []
    soft = call.name in {"mean", "sum", "var", "var_mean", "std"}
    layers = []
    for layer in call.value_of(tensor).layers:
        current = layer
        for axis in axes:
            current = call.space.fix_axis(current, axis, f"is reduced by `{call.name}` over its own units", soft=soft)
        layers.append(current)
    outputs = [leaf for leaf in tree_leaves(call.output) if isinstance(leaf, Tensor)]
    keeps = bool(outputs) and outputs[0].dim() == tensor.dim()
    made = [_without(layer, axes, keeps) for layer in layers]
    return [Value([layer for layer in made if axes_of(layer)]) for _ in outputs]


def _without(layer: Tensor, axes: Sequence[int], keeps: bool) -> Tensor:
    for axis in axes:
        layer = layer.narrow(axis, 0, 1)
    return layer if keeps else layer.reshape([size for axis, size in enumerate(layer.shape) if axis not in axes])


def along_axis(call: Call) -> list[Value]:
    """Softmax and running sums: elements of one axis depend on each other."""
    tensor = call.args[0]
    axis = call.argument(1, "dim", -1) % max(tensor.dim(), 1)
    layers = [
        call.space.fix_axis(layer, axis, f"is normalised by `{call.name}` over its own units")
        for layer in call.value_of(tensor).layers
    ]
    return [Value([layer for layer in layers if axes_of(layer)])]


def spatial(call: Call) -> list[Value]:
    """Pooling, resizing and padding: axes whose size changes, and all after the channels, keep their labels' size."""
    tensor = call.args[0]
    outputs = [leaf for leaf in tree_leaves(call.output) if isinstance(leaf, Tensor)]
    layers = []
    for layer in call.value_of(tensor).layers:
        current = layer
        for axis in axes_of(layer):
            if axis >= 2 or outputs[0].shape[axis] != tensor.shape[axis]:
                current = call.space.fix_axis(current, axis, f"is moved by `{call.name}`").narrow(axis, 0, 1)
        if axes_of(current):
            layers.append(current)
    return [Value(layers) for _ in outputs]


def _table() -> dict[str, Rule]:
    table: dict[str, Rule] = {}
    for rule, names in (
        (pointwise, "_prelu_kernel hardswish hardsigmoid dropout native_dropout copy zeros_like ones_like empty_like"),
        (pointwise, "full_like rand_like randn_like masked_fill logit"),
        (
            reshape,
            "view _unsafe_view reshape t transpose permute unsqueeze squeeze expand alias detach lift_fresh clone",
        ),
        (reshape, "contiguous _to_copy repeat flip pixel_shuffle pixel_unshuffle channel_shuffle"),
        (part, "slice split split_with_sizes"),
        (pick, "select unbind index"),
        (gather, "gather"),
        (concatenate, "cat stack"),
        (reduce, "mean sum amax amin max min var var_mean std prod argmax argmin any all linalg_vector_norm norm"),
        (along_axis, "_softmax _log_softmax _safe_softmax cumsum cumprod"),
        (spatial, "max_pool1d max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d"),
        (spatial, "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d"),
        (spatial, "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d"),
        (spatial, "_upsample_bilinear2d_aa upsample_linear1d upsample_trilinear3d constant_pad_nd"),
        (spatial, "reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d"),
    ):
        table.update(dict.fromkeys(names.split(), rule))
    from compressor.models.structure.rules_nn import NN_RULES

    return {**table, **NN_RULES}


RULES: dict[str, Rule] = _table()
