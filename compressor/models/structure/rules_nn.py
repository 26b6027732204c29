"""How weights meet data: matrix products, convolutions, normalisation, attention, embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from compressor.models.structure.labels import LabelSpace, Value, axes_of, layer_along, replace

if TYPE_CHECKING:
    from compressor.models.structure.rules import Call, Rule

FIXED = "is multiplied with a tensor of fixed size"
HEAD = "lies inside one attention head"


def product(space: LabelSpace, a: tuple[Value, Tensor], b: tuple[Value, Tensor]) -> Value:
    """``a @ b`` over the last axis of ``a`` and the last but one of ``b``; the axes before them are a shared batch."""
    left, right = Value(list(a[0].layers), param=a[0].param), Value(list(b[0].layers), param=b[0].param)
    inner, rows = a[1].dim() - 1, a[1].dim() - 2
    read, weight = layer_along(left, inner), layer_along(right, rows)
    if not left.param and not right.param:
        _note_heads(space, (left, right), rows)
    if read is not None and weight is not None and len(axes_of(read)) == len(axes_of(weight)) == 1:
        space.union(read.reshape(-1), weight.reshape(-1))
        space.mark(right, weight, space.consumed)
        space.mark(left, read, space.consumed)
    else:
        for value, layer, axis in ((left, read, inner), (right, weight, rows)):
            if layer is not None:
                replace(value, layer, space.fix_axis(layer, axis, FIXED if a[1].dim() == 2 else HEAD))
    for value, axis in ((left, rows), (right, inner)):
        made = layer_along(value, axis)
        if made is not None:
            space.mark(value, made, space.produced)
    kept = [layer for layer in left.layers if layer.shape[inner] == 1]
    kept += [layer for layer in right.layers if layer.shape[rows] == 1]
    return Value(space.merge(kept))


def _note_heads(space: LabelSpace, values: Sequence[Value], batch: int) -> None:
    """Units that vary along one of the first ``batch`` axes of a product of two activations are attention heads."""
    for value in values:
        for layer in value.layers:
            if not value.param and any(axis < batch for axis in axes_of(layer)):
                space.head_labels.append(layer.numpy().reshape(-1))


def mm(call: Call) -> list[Value]:
    a, b = call.args[0], call.args[1]
    return [product(call.space, (call.value_of(a), a), (call.value_of(b), b))]


def addmm(call: Call) -> list[Value]:
    from compressor.models.structure.rules import combine

    bias, a, b = call.args[:3]
    made = product(call.space, (call.value_of(a), a), (call.value_of(b), b))
    shape = tuple(call.output.shape)
    return [combine(call.space, [(made, shape), (call.value_of(bias), tuple(bias.shape))])]


def grouped_mm(call: Call) -> list[Value]:
    """Every row times the matrix of its expert: (T, K) by (experts, K, N). The experts are no units here."""
    from compressor.models.structure.rules import unknown

    x, weight = call.args[:2]
    if x.dim() != 2 or weight.dim() != 3:
        return unknown(call)
    value = call.value_of(weight)
    inside = Value([layer.squeeze(0) for layer in value.layers if layer.shape[0] == 1], param=value.param)
    return [product(call.space, (call.value_of(x), x), (inside, weight[0]))]


def convolution(call: Call) -> list[Value]:
    x, weight, bias = call.args[:3]
    transposed, groups = bool(call.args[6]), int(call.args[8])
    space, w = call.space, call.value_of(weight)
    rank = x.dim()
    data = _channels(space, call.value_of(x))
    for axis in range(2, rank):
        taps = layer_along(w, axis)
        if taps is not None:
            space.freeze(taps, "")
    sides = (layer_along(w, 1), layer_along(w, 0)) if transposed else (layer_along(w, 0), layer_along(w, 1))
    made = _convolve(space, w, data, sides, (x.shape[1], groups, transposed, call.output.shape[1]))
    if made is None:
        return [Value()]
    if bias is not None and layer_along(call.value_of(bias), 0) is not None:
        space.union(made, layer_along(call.value_of(bias), 0))
    return [Value([made.reshape([1, -1] + [1] * (rank - 2))])]


def _channels(space: LabelSpace, value: Value) -> Tensor | None:
    """The channel labels of what a convolution reads; labels along other axes are fixed."""
    found = None
    for layer in value.layers:
        current = layer
        for axis in axes_of(layer):
            if axis != 1:
                current = space.fix_axis(current, axis, "is moved by a convolution")
        found = current if axes_of(current) == (1,) else found
    return found


def _convolve(
    space: LabelSpace,
    w: Value,
    data: Tensor | None,
    sides: tuple[Tensor | None, Tensor | None],
    how: tuple[int, int, bool, int],
) -> Tensor | None:
    """Join input channels with the weight; return the labels of the output channels."""
    channels, groups, transposed, outputs = how
    out, read = sides
    if groups > 1 and channels == groups:
        return _depthwise(space, data, read if transposed else out, out if transposed else read, (channels, outputs))
    per_group = channels // groups
    if read is not None:
        columns = read.reshape(-1)
        if transposed and groups > 1:
            space.union(columns.reshape(groups, per_group), columns.reshape(groups, per_group)[:1])
        _join_data(space, data, columns if transposed else columns.repeat(groups))
        space.mark(w, read, space.consumed)
    elif data is not None:
        space.freeze(data, FIXED)
    if out is None:
        return None
    space.mark(w, out, space.produced)
    rows = out.reshape(-1)
    if transposed:
        return rows.repeat(groups)
    if groups > 1:
        space.union(rows.reshape(groups, -1), rows.reshape(groups, -1)[:1])
    return rows


def _depthwise(
    space: LabelSpace, data: Tensor | None, unit: Tensor | None, other: Tensor | None, sizes: tuple[int, int]
) -> Tensor | None:
    """One filter (or a few) a channel: a channel, its filters and its outputs are one unit."""
    channels, outputs = sizes
    if unit is None:
        return None
    rows = unit.reshape(channels, -1)
    space.union(rows, rows[:, :1])
    _join_data(space, data, rows[:, 0])
    if other is not None:
        space.freeze(other, "")
    return unit.reshape(-1) if unit.numel() == outputs else rows[:, 0].repeat_interleave(outputs // channels)


def _join_data(space: LabelSpace, data: Tensor | None, columns: Tensor) -> None:
    if data is None:
        space.freeze(columns, "reads a tensor of fixed size")
    else:
        space.union(data.reshape(-1), columns)


def batch_norm(call: Call) -> list[Value]:
    """Weight, bias and running statistics follow the channels."""
    x = call.args[0]
    value = call.value_of(x)
    data = layer_along(value, 1) if x.dim() > 1 else None
    for tensor in call.args[1:5]:
        vector = layer_along(call.value_of(tensor), 0) if isinstance(tensor, Tensor) else None
        if vector is not None:
            _join_vector(call.space, data, vector, x.dim())
    return [Value(list(value.layers))]


def _join_vector(space: LabelSpace, data: Tensor | None, vector: Tensor, rank: int) -> None:
    if data is None:
        space.freeze(vector, "normalises a tensor of fixed size")
    else:
        space.union(data, vector.reshape([1, -1] + [1] * (rank - 2)))


def group_norm(call: Call) -> list[Value]:
    """A whole group of channels can go without changing the statistics of the others; part of one cannot."""
    x, weight, bias = call.args[:3]
    groups = int(call.args[6])
    value = call.value_of(x)
    data = layer_along(value, 1)
    if data is not None and groups == 1:
        call.space.freeze(data, "is normalised together with the other channels", soft=True)
    elif data is not None:
        rows = data.reshape(-1).reshape(groups, -1)
        call.space.union(rows, rows[:, :1])
    for tensor in (weight, bias):
        vector = layer_along(call.value_of(tensor), 0) if tensor is not None else None
        if vector is not None:
            _join_vector(call.space, data, vector, x.dim())
    return [Value(list(value.layers)), Value(), Value()]


def layer_norm(call: Call) -> list[Value]:
    """Statistics run over the units: they may only go when a narrower network is wanted (soft)."""
    x, shape, weight, bias = call.args[:4]
    value = Value(list(call.value_of(x).layers))
    first = x.dim() - len(shape)
    for layer in list(value.layers):
        for axis in range(first, x.dim()):
            if layer.shape[axis] > 1:
                fixed = call.space.fix_axis(layer, axis, "is normalised over its own units (layer norm)", soft=True)
                replace(value, layer, fixed)
    for tensor in (weight, bias):
        for vector in call.value_of(tensor).layers if tensor is not None else []:
            lifted = vector.reshape([1] * first + list(vector.shape))
            data = layer_along(value, first + axes_of(vector)[0])
            if data is None:
                call.space.freeze(vector, "normalises a tensor of fixed size")
            else:
                call.space.union(data, lifted)
    return [Value(value.layers), Value(), Value()]


def embedding(call: Call) -> list[Value]:
    """Rows are looked up by number and stay; columns are the units."""
    weight, index = call.args[:2]
    value = call.value_of(weight)
    call.space.freeze_all([call.value_of(index)], "is used as an index")
    rows, columns = layer_along(value, 0), layer_along(value, 1)
    if rows is not None:
        call.space.freeze(rows, "")
    if columns is None:
        return [Value()]
    call.space.mark(value, columns, call.space.produced)
    return [Value([columns.reshape([1] * index.dim() + [-1])])]


def attention(call: Call) -> list[Value]:
    """Scaled dot-product attention on (B, heads, T, size): heads are units, nothing inside a head is.

    With grouped queries a key-value head goes together with all the query heads that read it.
    """
    space = call.space
    query, key, value = (_heads(call, tensor) for tensor in call.args[:3])
    count = call.args[0].shape[1]
    layers = []
    for layer, tensor in ((query, call.args[0]), (key, call.args[1]), (value, call.args[2])):
        if layer is not None:
            layers.append(layer.repeat_interleave(count // tensor.shape[1], dim=1))
    if 0 < len(layers) < 3:
        for layer in layers:
            space.freeze(layer, "attends to a tensor of fixed size")
    for layer in layers[1:]:
        space.union(layers[0], layer)
    for layer in layers:
        space.head_labels.append(layer.numpy().reshape(-1))
    _bias(call, layers)
    return [Value(layers[-1:] if len(layers) == 3 else []), Value()]


def _heads(call: Call, tensor: Tensor) -> Tensor | None:
    found = None
    for layer in call.value_of(tensor).layers:
        current = layer
        for axis in axes_of(layer):
            if axis != 1:
                current = call.space.fix_axis(current, axis, HEAD)
        if current.shape[1] > 1:
            found = current.narrow(3, 0, 1).narrow(2, 0, 1).narrow(0, 0, 1)
    return found


def _bias(call: Call, heads: list[Tensor]) -> None:
    """A position bias with one plane a head shrinks with the heads."""
    extra = [leaf for leaf in [*call.args[3:], *call.kwargs.values()] if isinstance(leaf, Tensor) and leaf.dim() == 4]
    for tensor in extra:
        plane = layer_along(call.value_of(tensor), 1)
        if plane is not None and heads:
            call.space.union(plane, heads[0])
        elif tensor.shape[1] > 1 and 1 not in call.value_of(tensor).free:
            for layer in heads:
                call.space.freeze(layer, "is biased by a tensor of fixed size")
        elif plane is not None:
            call.space.freeze(plane, HEAD)


NN_RULES: dict[str, Rule] = {
    "mm": mm,
    "bmm": mm,
    "addmm": addmm,
    "baddbmm": addmm,
    "_grouped_mm": grouped_mm,
    "convolution": convolution,
    "_convolution": convolution,
    "native_batch_norm": batch_norm,
    "_native_batch_norm_legit_no_training": batch_norm,
    "native_group_norm": group_norm,
    "native_layer_norm": layer_norm,
    "embedding": embedding,
    "_scaled_dot_product_flash_attention_for_cpu": attention,
    "_scaled_dot_product_flash_attention": attention,
    "_scaled_dot_product_efficient_attention": attention,
}
