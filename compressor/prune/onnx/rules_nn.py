"""Where weights meet data: convolutions, matrix products and normalisation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from compressor.models.structure.groups import Index
from compressor.prune.onnx.labels import Value, axes_of, first_of, layer_along
from compressor.prune.onnx.trace import Call


def _column(call: Call, value: Value, axis: int) -> Index | None:
    """The labels along one axis of a value as a vector, other axes of the same layer fixed."""
    layer = layer_along(value, axis)
    if layer is None:
        return None
    for other in axes_of(layer):
        if other != axis:
            layer = call.space.fix_axis(layer, other, f"is mixed by `{call.node.op_type}`")
    return layer.reshape(-1) if layer.size == layer.shape[axis] else None


def _others_fixed(call: Call, value: Value, channel: int, mixed: Callable[[int], bool]) -> None:
    for layer in value.layers:
        for axis in axes_of(layer):
            if axis != channel and mixed(axis):
                call.space.freeze(layer, f"is mixed by `{call.node.op_type}` along axis {axis}")


def _reads(call: Call, data: Index | None, weight: Index | None) -> None:
    """Data channels and the weight's columns are the same units; a side without labels holds the other."""
    if data is not None and weight is not None:
        call.space.union(data, weight)
        call.space.mark(weight, call.space.consumed)
    elif weight is not None:
        call.space.freeze(weight, "")
    elif data is not None:
        call.space.freeze(data, f"is read by `{call.node.op_type}` with a weight that is computed or shared in size")


def _makes(call: Call, rows: Index | None, bias: int, rank: int, channel: int) -> Value:
    """Labels of the output: the weight's rows, joined with the bias."""
    if rows is None:
        return Value()
    call.space.mark(rows, call.space.produced)
    if call.has(bias):
        vector = _column(call, call.value(bias), len(call.shape(bias)) - 1)
        if vector is not None:
            call.space.union(rows, vector)
        elif call.array(bias) is None or int(np.prod(call.shape(bias))) > 1:
            call.space.freeze(rows, "gets a bias that is computed")
    return Value([rows.reshape([-1 if axis == channel else 1 for axis in range(rank)])])


def _weight(call: Call, position: int = 1) -> Value | None:
    """Labels of a weight; None when it is computed from data."""
    value = call.value(position)
    return value if value.param else None


def conv(call: Call) -> list[Value]:
    """Plain, grouped and depthwise convolutions (weight: outputs, inputs per group, taps)."""
    weight, data, groups = _weight(call), call.value(0), int(call.attribute("group", 1))
    if weight is None:
        return _computed(call)
    _others_fixed(call, data, 1, lambda axis: axis > 1)
    channels = _column(call, data, 1)
    rows = _column(call, weight, 0)
    if groups > 1 and groups == call.shape(0)[1]:
        return [_depthwise(call, channels, rows, groups)]
    if groups > 1:
        _grouped(call, channels, rows, groups)
    else:
        _reads(call, channels, _column(call, weight, 1))
    return [_makes(call, rows, 2, len(call.shape(0)), 1)]


def _depthwise(call: Call, channels: Index | None, rows: Index | None, groups: int) -> Value:
    """Every filter reads one channel: they go together, and the group count goes down."""
    if rows is not None and channels is not None:
        call.space.union(rows.reshape(groups, -1), channels[:, None])
        shape = [1, groups] + [1] * (len(call.shape(0)) - 2)
        call.site("group", 1, Value([channels.reshape(shape)]), ())
    elif rows is not None:
        call.space.freeze(rows, "filters channels of fixed number one by one")
    return _makes(call, rows, 2, len(call.shape(0)), 1)


def _grouped(call: Call, channels: Index | None, rows: Index | None, groups: int) -> None:
    """All groups lose the same places, so that they stay equal in size."""
    weight = call.value(1)
    if rows is not None:
        parts = rows.reshape(groups, -1)
        call.space.union(parts, first_of(parts, 0))
    columns = _column(call, weight, 1)
    if channels is not None and columns is not None:
        call.space.union(channels.reshape(groups, -1), columns[None, :])
        call.space.mark(columns, call.space.consumed)
    else:
        for each in (channels, columns):
            if each is not None:
                call.space.freeze(each, "is read by a grouped convolution of fixed inputs")


def conv_transpose(call: Call) -> list[Value]:
    """Transposed convolution (weight: inputs, outputs per group, taps); groups are followed when there is one."""
    weight, data = _weight(call), call.value(0)
    if weight is None or int(call.attribute("group", 1)) > 1:
        return _computed(call)
    _others_fixed(call, data, 1, lambda axis: axis > 1)
    _reads(call, _column(call, data, 1), _column(call, weight, 0))
    return [_makes(call, _column(call, weight, 1), 2, len(call.shape(0)), 1)]


def _computed(call: Call) -> list[Value]:
    values = [call.value(i) for i in range(len(call.node.input)) if call.has(i)]
    why = f"enters `{call.node.op_type}` in a way that is not followed (a computed weight, or groups)"
    call.space.freeze_all(values, why)
    return []


def gemm(call: Call) -> list[Value]:
    weight, data = _weight(call), call.value(0)
    if weight is None or int(call.attribute("transA", 0)) or len(call.shape(1)) != 2:
        return _computed(call)
    reading = 1 if int(call.attribute("transB", 0)) else 0
    _reads(call, _column(call, data, 1), _column(call, weight, reading))
    return [_makes(call, _column(call, weight, 1 - reading), 2, 2, 1)]


def matmul(call: Call) -> list[Value]:
    """A matrix of constants on the right; two computed sides (attention) are not followed."""
    rank = len(call.shape(0))
    weight, data = _weight(call), call.value(0)
    if weight is None or len(call.shape(1)) != 2 or rank < 2:
        return _computed(call)
    _reads(call, _column(call, data, rank - 1), _column(call, weight, 0))
    result = _makes(call, _column(call, weight, 1), len(call.node.input), rank, rank - 1)
    others = [layer for layer in data.layers if layer.shape[rank - 1] == 1]
    return [Value(call.space.merge([*others, *result.layers]))]


def channel_norm(call: Call) -> list[Value]:
    """Batch and instance normalisation: every channel is normalised alone, its vectors go with it."""
    data = call.value(0)
    if int(call.attribute("training_mode", 0)) or any(call.array(i) is None for i in range(1, len(call.node.input))):
        return _computed(call)
    _others_fixed(call, data, 1, lambda axis: axis > 0)
    channels = _column(call, data, 1)
    for position in range(1, len(call.node.input)):
        vector = _column(call, call.value(position), 0)
        if vector is not None and channels is not None:
            call.space.union(channels, vector)
    if channels is None:
        return []
    shape = [1, channels.size] + [1] * (len(call.shape(0)) - 2)
    return [Value([np.ascontiguousarray(channels.reshape(shape))])]


def layer_norm(call: Call) -> list[Value]:
    """Normalises over the last axes together: removing one element changes all others."""
    values = [call.value(i) for i in range(len(call.node.input)) if call.has(i)]
    call.space.freeze_all(values, "is normalised over all its units together (layer norm)")
    return []


RULES = {
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Gemm": gemm,
    "MatMul": matmul,
    "BatchNormalization": channel_norm,
    "InstanceNormalization": channel_norm,
    **dict.fromkeys(
        ("LayerNormalization", "SkipLayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization",
         "SkipSimplifiedLayerNormalization", "GroupNormalization", "EmbedLayerNormalization"),
        layer_norm,
    ),
}  # fmt: skip
