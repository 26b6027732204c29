"""How each ONNX operator carries labels: pointwise, shape and reduction. Weights meet data in ``rules_nn``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from onnx import NodeProto

from compressor.models.structure.groups import Index
from compressor.prune.onnx.labels import LabelSpace, Value, axes_of, layer_along
from compressor.prune.onnx.trace import Call

Rule = Callable[[Call], list[Value]]
FIXED = "is combined with a tensor of fixed size"


def combine(space: LabelSpace, operands: Sequence[tuple[Value, Sequence[int]]]) -> Value:
    """Labels of a broadcast combination. An axis of which one side has no labels, yet a size, cannot shrink."""
    rank = max(len(shape) for _, shape in operands)
    lifted = [(_lift(value, len(shape), rank), [1] * (rank - len(shape)) + list(shape)) for value, shape in operands]
    layers = []
    for value, _ in lifted:
        for layer in value.layers:
            current = layer
            for axis in axes_of(layer):
                if any(shape[axis] > 1 and layer_along(other, axis) is None for other, shape in lifted):
                    current = space.fix_axis(current, axis, FIXED)
            layers.append(current)
    return Value(space.merge(layers), all(value.param for value, _ in operands))


def _lift(value: Value, rank: int, target: int) -> Value:
    return Value([layer.reshape([1] * (target - rank) + list(layer.shape)) for layer in value.layers])


def pointwise(call: Call) -> list[Value]:
    """Element by element, with broadcasting: addition, activation functions, the gate of a squeeze-excite block."""
    operands = [(call.value(i), call.shape(i)) for i in range(len(call.node.input)) if call.has(i)]
    return [combine(call.space, operands)] * len(call.node.output)


def unknown(call: Call) -> list[Value]:
    """Nothing is assumed about it: whatever goes in stays as it is."""
    values = [call.value(i) for i in range(len(call.node.input)) if call.has(i)]
    call.space.freeze_all(values, f"enters the operator `{call.node.op_type}`, which the pruner does not follow")
    return []


def sizes_only(_: Call) -> list[Value]:
    """Shape and Size look at no element; whoever uses the numbers is checked when the cut is made."""
    return []


def unary(call: Call) -> list[Value]:
    """Further inputs are settings (bounds, a ratio, a seed)."""
    return [call.value(0)] * len(call.node.output)


def reshape(call: Call) -> list[Value]:
    """Reshape, Flatten, Squeeze, Unsqueeze: the same move, made on the labels."""
    value, before, after = call.value(0), call.shape(0), call.out_shape()
    layers = []
    for layer in value.layers:
        moved = call.space.collapse(np.broadcast_to(layer, before).reshape(after))
        if len(axes_of(moved)) > 1:
            call.space.grids.append(moved)
        if axes_of(moved):
            layers.append(moved)
    result = Value(layers, value.param)
    if call.node.op_type == "Reshape" and layers:
        if call.trace.opset < 9 and call.array(1) is None:  # there is no Where to mend a computed shape with
            call.space.freeze_all([result], "is reshaped to a computed shape")
        call.site("reshape", 0, value, (result,))
    return [result]


def transpose(call: Call) -> list[Value]:
    value = call.value(0)
    order = call.attribute("perm") or list(range(len(call.shape(0))))[::-1]
    return [Value([layer.transpose(order) for layer in value.layers], value.param)]


def concat(call: Call) -> list[Value]:
    """Along the axis labels stand one after the other; the other axes must agree as in an addition."""
    count, rank = len(call.node.input), len(call.out_shape())
    axis = int(call.attribute("axis", 0)) % max(rank, 1)
    values = [call.value(i) for i in range(count)]
    along = [layer_along(value, axis) for value in values]
    rest = []
    for value, shape in zip(values, [call.shape(i) for i in range(count)], strict=True):
        others = [layer for layer in value.layers if layer.shape[axis] == 1]
        rest.append((Value(others), [1 if a == axis else size for a, size in enumerate(shape)]))
    layers = list(combine(call.space, rest).layers) if rest else []
    if any(layer is not None for layer in along):
        parts = [_part(call, i, layer, axis) for i, layer in enumerate(along)]
        layers = call.space.merge([*layers, np.concatenate(parts, axis=axis)])
    return [Value(layers, all(value.param for value in values))]


def _part(call: Call, position: int, layer: Index | None, axis: int) -> Index:
    """Labels of one operand along the joined axis; an operand without labels is labelled 0, which never goes."""
    shape = [1] * len(call.shape(position))
    shape[axis] = call.shape(position)[axis]
    if layer is None:
        return np.zeros(shape, dtype=np.int64)
    for other in axes_of(layer):
        if other != axis:
            layer = call.space.fix_axis(layer, other, "is concatenated along another axis")
    return np.broadcast_to(layer, shape)


def split(call: Call) -> list[Value]:
    """Every part keeps the labels it is given; the sizes are written anew when units go."""
    value, axis = call.value(0), int(call.attribute("axis", 0)) % len(call.shape(0))
    made: list[list[Index]] = [[] for _ in call.node.output]
    for layer in value.layers:
        if layer.shape[axis] == 1:
            for part in made:
                part.append(layer)
            continue
        ends = np.cumsum([call.out_shape(i)[axis] for i in range(len(made))])
        for part, piece in zip(made, np.split(layer, ends[:-1], axis=axis), strict=True):
            part.append(piece)
    results = [Value(part) for part in made]
    if layer_along(value, axis) is not None:
        if call.has(1) and call.array(1) is None:
            call.space.freeze_all([value], "is split at computed places")
        call.site("split", axis, value, tuple(results))
    return results


def slice_(call: Call) -> list[Value]:
    """A run of neighbours along an axis of constant bounds; anything else on a labelled axis fixes it."""
    value, shape, after = call.value(0), call.shape(0), call.out_shape()
    changed = [axis for axis, size in enumerate(shape) if size != after[axis] and layer_along(value, axis) is not None]
    if not changed:
        return [value]
    bounds = slice_bounds(call)
    if bounds is None or len(changed) > 1 or any(step != 1 for _, _, step in bounds.values()):
        call.space.freeze_all([value], "is sliced with a step, at computed places or along several axes")
        return []
    axis = changed[0]
    start, stop, _ = bounds[axis]
    cut = (slice(None),) * axis + (slice(start, stop),)
    result = Value([layer[cut] if layer.shape[axis] > 1 else layer for layer in value.layers])
    call.site("slice", axis, value, (result,))
    return [result]


def slice_bounds(call: Call) -> dict[int, tuple[int, int, int]] | None:
    """Start, stop and step by axis, within the shape; None when they are computed."""
    names = ("starts", "ends", "axes", "steps")
    if call.trace.opset < 10:
        parts = [call.attribute(name) for name in names]
    else:
        if any(call.has(i) and call.array(i) is None for i in range(1, 5)):
            return None
        parts = [call.array(i) for i in range(1, 5)]
    starts, ends, axes, steps = (None if part is None else [int(x) for x in np.ravel(part)] for part in parts)
    if starts is None or ends is None:
        return None
    shape = call.shape(0)
    axes = axes if axes is not None else list(range(len(starts)))
    steps = steps if steps is not None else [1] * len(starts)
    found = {}
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        found[axis % len(shape)] = slice(start, end, step).indices(shape[axis % len(shape)])
    return found


def spatial(call: Call) -> list[Value]:
    """Pools and resampling: channels (axis 1) go on, every other labelled axis is mixed and must stay."""
    value, after = call.value(0), call.out_shape()
    layers = []
    for layer in value.layers:
        current = layer
        for axis in axes_of(layer):
            if axis != 1 or after[axis] != layer.shape[axis]:
                current = call.space.fix_axis(current, axis, f"enters `{call.node.op_type}` along axis {axis}")
        if len(axes_of(current)) == 1 and current.shape[1] == after[1] > 1:
            layers.append(current)
    result = Value(layers)
    if call.node.op_type == "Resize" and layers:
        call.site("resize", 1, value, (result,))
    return [result] * len(call.node.output)


def pad(call: Call) -> list[Value]:
    """Axes that are not padded go on."""
    value, before, after = call.value(0), call.shape(0), call.out_shape()
    layers = []
    for layer in value.layers:
        current = layer
        for axis in axes_of(layer):
            if before[axis] != after[axis]:
                current = call.space.fix_axis(current, axis, f"is padded along axis {axis}")
        if all(size in (1, after[axis]) for axis, size in enumerate(current.shape)):
            layers.append(current)
    return [Value(layers)]


def reduce(call: Call) -> list[Value]:
    """Sums, means and extrema: a labelled axis that is reduced must stay."""
    value, rank = call.value(0), len(call.shape(0))
    axes = call.attribute("axes")
    if axes is None and call.has(1):
        given = call.array(1)
        if given is None:
            return unknown(call)
        axes = given.reshape(-1).tolist()
    gone = {int(axis) % rank for axis in axes} if axes is not None and len(axes) else set(range(rank))
    layers = []
    for layer in value.layers:
        current = layer
        for axis in sorted(gone):
            current = call.space.fix_axis(current, axis, f"is reduced by `{call.node.op_type}`")
        if not set(axes_of(current)) & gone:
            layers.append(current.reshape(call_shape(current, gone, bool(call.attribute("keepdims", 1)))))
    return [Value(layers)]


def call_shape(layer: Index, gone: set[int], keepdims: bool) -> list[int]:
    """The layer's shape after a reduction along ``gone`` (all of size 1)."""
    return [size for axis, size in enumerate(layer.shape) if keepdims or axis not in gone]


def softmax(call: Call) -> list[Value]:
    """Normalises along an axis (before opset 13: from an axis on): these must stay."""
    value, rank = call.value(0), len(call.shape(0))
    old = call.trace.opset < 13
    axis = int(call.attribute("axis", 1 if old else -1)) % rank
    fixed = set(range(axis, rank)) if old else {axis}
    layers = []
    for layer in value.layers:
        current = layer
        for each in sorted(fixed):
            current = call.space.fix_axis(current, each, f"is normalised by `{call.node.op_type}`")
        layers.append(current)
    return [Value(layers)]


_UNARY = (
    "Relu LeakyRelu Clip Sigmoid HardSigmoid HardSwish Tanh Elu Selu Celu Gelu Mish Softplus Softsign Erf Sqrt Exp Abs "
    "Neg Reciprocal Log Identity Cast Dropout Floor Ceil Round Sign ThresholdedRelu Swish QuickGelu Sin Cos"
)
_BINARY = "PRelu Add Mul Sub Div Pow Min Max Sum Mean Where Greater Less GreaterOrEqual LessOrEqual FastGelu BiasGelu"
_SPATIAL = "MaxPool AveragePool LpPool GlobalAveragePool GlobalMaxPool GlobalLpPool Resize Upsample"
_REDUCE = "ReduceMean ReduceSum ReduceMax ReduceMin ReduceL1 ReduceL2 ReduceSumSquare ReduceProd ReduceLogSumExp"


def _table() -> dict[str, Rule]:
    from compressor.prune.onnx import rules_nn

    table: dict[str, Rule] = {}
    for names, rule in ((_UNARY, unary), (_BINARY, pointwise), (_SPATIAL, spatial), (_REDUCE, reduce)):
        table |= dict.fromkeys(names.split(), rule)
    for name in ("Reshape", "Flatten", "Squeeze", "Unsqueeze"):
        table[name] = reshape
    table |= {"Transpose": transpose, "Concat": concat, "Split": split, "Slice": slice_, "Pad": pad}
    table |= {"Softmax": softmax, "LogSoftmax": softmax, "Shape": sizes_only, "Size": sizes_only}
    return table | rules_nn.RULES


def rule_for(node: NodeProto) -> Rule:
    """The rule of an operator of a domain that is known; anything else is not followed."""
    if node.domain not in ("", "ai.onnx", "com.microsoft"):
        return unknown
    return _table().get(node.op_type, unknown)
