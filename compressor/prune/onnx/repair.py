"""What is mended after a cut without any training: biases and batch-norm statistics of the masked graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from compressor.models.onnx_graph import constants, opset_of
from compressor.models.structure.groups import Cut, Floats, Index, Key, owner, removed_positions
from compressor.prune.onnx.graph import Structure
from compressor.prune.onnx.refit import WAY, refit
from compressor.prune.onnx.runtime import Watcher, batches_of, fixed_samples
from compressor.types import Array

ENOUGH_SAMPLES = 32  # fewer make batch-norm statistics worse than the file's own
FLOATS_HINT = 2**18  # per sample; the graph's own outputs are small, its inner tensors are the runtime's business
Statistics = Mapping[str, tuple[Floats, Floats]]  # batch-norm node -> mean and variance


@dataclass(frozen=True)
class Repaired:
    """The masked graph after mending, in words what was done, and the mean squared distance of its outputs to the
    original's on calibration data, by way."""

    masked: ModelProto
    way: str
    biased: tuple[str, ...]  # nodes whose bias took over the removed units' mean contribution
    norms: tuple[str, ...]
    distances: Mapping[str, float]
    fitted: tuple[str, ...] = ()  # nodes whose weights were fitted again


def repair(
    structure: Structure,
    masked: ModelProto,
    cuts: Sequence[Cut],
    means: Mapping[Key, Floats],
    batches: Sequence[Mapping[str, Array]],
) -> Repaired:
    """Mend ``masked`` in the way whose outputs on ``batches`` are nearest to the original's.

    The ways: nothing; the removed units' mean contribution moved into the reading nodes' biases; that, and batch-norm
    statistics moved by what the cut changed in them, or taken from the data anew; or, with enough samples, the weights
    fitted again layer by layer. Where there are batches enough, the last quarter of them only judges.
    """
    original = structure.trace.model
    if not cuts or not batches:
        return Repaired(masked, "nothing", (), (), {})
    compensated, biased = compensate(structure, masked, cuts, means)
    ways: dict[str, ModelProto] = {"nothing": masked, "bias compensation": compensated}
    norms = _norms(compensated)
    samples = sum(len(next(iter(batch.values()))) for batch in batches)
    if norms and samples >= ENOUGH_SAMPLES and fixed_samples(original) is None:
        ranks = {node.name: len(structure.trace.shapes[node.input[0]]) for node in norms}
        ways |= _mended_norms(original, compensated, norms, batches, ranks)
    fit, judge = (
        (batches[: -(len(batches) // 4)], batches[-(len(batches) // 4) :]) if len(batches) >= 4 else (batches,) * 2
    )
    fitted: list[str] = []
    if samples >= ENOUGH_SAMPLES:
        ways[WAY], fitted = refit(structure, compensated, cuts, fit)
    distances = distances_of(original, ways, judge)
    best = min(distances, key=lambda way: distances[way])
    changed = tuple(node.name for node in norms) if "statistics" in best else ()
    kept = tuple(fitted) if best == WAY else ()
    return Repaired(ways[best], best, tuple(biased) if best != "nothing" else (), changed, distances, kept)


def _mended_norms(
    original: ModelProto,
    masked: ModelProto,
    norms: Sequence[NodeProto],
    batches: Sequence[Mapping[str, Array]],
    ranks: Mapping[str, int],
) -> dict[str, ModelProto]:
    before, after = (statistics_on(model, batches, ranks) for model in (original, masked))
    tensors = constants(original.graph)
    moved = {}
    for node in norms:
        own = [numpy_helper.to_array(tensors[name]).astype(np.float64) for name in node.input[3:5]]
        epsilon = _epsilon(node)
        (old_mean, old_variance), (mean, variance) = before[node.name], after[node.name]
        moved[node.name] = own[0] + mean - old_mean, own[1] * (variance + epsilon) / (old_variance + epsilon)
    return {
        "bias compensation; statistics moved by what the cut changed": with_statistics(masked, moved),
        "bias compensation; statistics estimated again on calibration data": with_statistics(masked, after),
    }


def compensate(
    structure: Structure, masked: ModelProto, cuts: Sequence[Cut], means: Mapping[Key, Floats]
) -> tuple[ModelProto, list[str]]:
    """A copy of ``masked`` where ``b += W[:, gone] @ mean(x[gone])`` in each node that read removed units.

    Exact for units that are constant over the data; for a padded convolution exact away from the border. A convolution
    without a bias has a zero one by then; a MatMul is mended where an Add of a vector follows it.
    """
    changed = ModelProto()
    changed.CopyFrom(masked)
    nodes = {node.name: node for node in changed.graph.node}
    done = []
    for key, gone in removed_positions(cuts).items():
        node = nodes[owner(key.tensor)]
        if key not in means or not any(key in cut.group.consumed for cut in cuts):
            continue
        weight = structure.trace.arrays[structure.constant(key)].astype(np.float64)
        shift = _contribution(node, weight, key, gone, means[key])
        if shift is not None and _add_bias(changed, node, shift):
            done.append(node.name)
    return changed, done


def _contribution(node: NodeProto, weight: Array, key: Key, gone: Index, mean: Floats) -> Floats | None:
    """What the removed inputs gave each output on average; None for transposed convolutions (their stride decides)."""
    if node.op_type == "Conv" and key.axis == 1:
        taps = weight.sum(axis=tuple(range(2, weight.ndim)))
        groups = len(mean) // weight.shape[1]
        rows = taps[:, gone].reshape(groups, -1, len(gone))
        read = mean.reshape(groups, -1)[:, gone]
        return np.asarray(np.einsum("goi,gi->go", rows, read).reshape(-1))
    if node.op_type in ("Gemm", "MatMul"):
        scale = next((attribute.f for attribute in node.attribute if attribute.name == "alpha"), 1.0)
        return np.asarray(scale * np.tensordot(np.take(weight, gone, axis=key.axis), mean[gone], (key.axis, 0)))
    return None


def _add_bias(model: ModelProto, node: NodeProto, shift: Floats) -> bool:
    tensors = constants(model.graph)
    holder, position = (node, 2) if node.op_type != "MatMul" else _following_add(model, node)
    if holder is None:
        return False
    scale = next((attribute.f for attribute in holder.attribute if attribute.name == "beta"), 1.0)
    tensor = tensors.get(holder.input[position]) if len(holder.input) > position else None
    if tensor is None or int(np.prod(tensor.dims)) != shift.size or not scale:
        return False
    old = numpy_helper.to_array(tensor)
    new = (old + (shift / scale).reshape(old.shape)).astype(old.dtype)
    tensor.CopyFrom(numpy_helper.from_array(new, tensor.name))
    return True


def _following_add(model: ModelProto, node: NodeProto) -> tuple[NodeProto | None, int]:
    """The only reader of a MatMul's result, if it adds a constant to it, and where that constant stands."""
    readers = [each for each in model.graph.node if node.output[0] in each.input]
    if len(readers) == 1 and readers[0].op_type == "Add" and len(set(readers[0].input)) == 2:
        return readers[0], 1 - list(readers[0].input).index(node.output[0])
    return None, 0


def distances_of(
    original: ModelProto, ways: Mapping[str, ModelProto], batches: Iterable[Mapping[str, Array]]
) -> dict[str, float]:
    """Mean squared difference of each graph's floating-point outputs to the original's."""
    wanted_by, sessions = Watcher(original), {way: Watcher(model) for way, model in ways.items()}
    total, count = dict.fromkeys(ways, 0.0), 0
    for batch in batches:
        for piece in batches_of(original, batch, FLOATS_HINT):
            wanted = {name: array for name, array in wanted_by.run(piece).items() if array.dtype.kind == "f"}
            count += sum(array.size for array in wanted.values())
            for way, session in sessions.items():
                got = session.run(piece)
                total[way] += sum(
                    float(np.square(wanted[name].astype(np.float64) - got[name]).sum()) for name in wanted
                )
    return {way: value / max(count, 1) for way, value in total.items()}


def _norms(model: ModelProto) -> list[NodeProto]:
    return [node for node in model.graph.node if node.op_type == "BatchNormalization"]


def _epsilon(node: NodeProto) -> float:
    return float(next((attribute.f for attribute in node.attribute if attribute.name == "epsilon"), 1e-5))


def with_statistics(model: ModelProto, values: Statistics) -> ModelProto:
    """A copy of ``model`` whose batch norms have these means and variances."""
    changed = ModelProto()
    changed.CopyFrom(model)
    tensors = constants(changed.graph)
    for node in _norms(changed):
        for name, value in zip(node.input[3:5], values[node.name], strict=True):
            tensor = tensors[name]
            dtype = numpy_helper.to_array(tensor).dtype
            tensor.CopyFrom(numpy_helper.from_array(value.astype(dtype), name))
    return changed


def statistics_on(
    model: ModelProto, batches: Iterable[Mapping[str, Array]], ranks: Mapping[str, int]
) -> dict[str, tuple[Floats, Floats]]:
    """Mean and variance that every batch norm sees, averaged over batches; ``ranks``: of each norm's input.

    Every norm normalises by its batch's own statistics meanwhile, as in training, so that all are consistent.
    """
    opened, names = _normalising_itself(model, ranks)
    session = Watcher(opened, [name for pair in names.values() for name in pair])
    sums: dict[str, list[Floats]] = {}
    count = 0
    for batch in batches:
        if len(next(iter(batch.values()))) < 2:  # the variance of one value is not defined
            continue
        found = session.run(batch)
        count += 1
        for norm, pair in names.items():
            seen = [found[name].reshape(-1).astype(np.float64) for name in pair]
            old = sums.get(norm, [np.zeros_like(seen[0]), np.zeros_like(seen[1])])
            sums[norm] = [old[0] + seen[0], old[1] + seen[1]]
    return {norm: (pair[0] / max(count, 1), pair[1] / max(count, 1)) for norm, pair in sums.items()}


def _normalising_itself(model: ModelProto, ranks: Mapping[str, int]) -> tuple[ModelProto, dict[str, tuple[str, str]]]:
    """``model`` with each BatchNormalization written out over its batch: (x - mean) / sqrt(variance + eps) * s + b."""
    opened = ModelProto()
    opened.CopyFrom(model)
    nodes: list[NodeProto] = []
    names: dict[str, tuple[str, str]] = {}
    for node in opened.graph.node:
        if node.op_type == "BatchNormalization":
            names[node.name] = (f"{node.name}_mean", f"{node.name}_variance")
            nodes += _written_out(opened, node, ranks[node.name])
        else:
            nodes.append(node)
    kept = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del opened.graph.node[:]
    opened.graph.node.extend(kept)
    return opened, names


def _written_out(model: ModelProto, node: NodeProto, rank: int) -> list[NodeProto]:
    tensors, p = constants(model.graph), node.name
    scale = numpy_helper.to_array(tensors[node.input[1]])
    vectors = {"scale": scale, "offset": numpy_helper.to_array(tensors[node.input[2]])}
    mean, variance = f"{p}_mean", f"{p}_variance"
    wide = [1, -1] + [1] * (rank - 2)
    for name, vector in vectors.items():
        model.graph.initializer.append(numpy_helper.from_array(vector.reshape(wide), f"{p}_{name}"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(_epsilon(node), dtype=scale.dtype), f"{p}_epsilon"))
    axes = [0, *range(2, rank)]
    model.graph.initializer.append(numpy_helper.from_array(np.array(axes, dtype=np.int64), f"{p}_axes"))
    by_input = opset_of(model) >= 18

    def average(data: str, to: str) -> NodeProto:
        if by_input:
            return helper.make_node("ReduceMean", [data, f"{p}_axes"], [to], keepdims=1)
        return helper.make_node("ReduceMean", [data], [to], axes=axes, keepdims=1)

    return [
        average(node.input[0], mean),
        helper.make_node("Sub", [node.input[0], mean], [f"{p}_centred"]),
        helper.make_node("Mul", [f"{p}_centred", f"{p}_centred"], [f"{p}_squared"]),
        average(f"{p}_squared", variance),
        helper.make_node("Add", [variance, f"{p}_epsilon"], [f"{p}_above"]),
        helper.make_node("Sqrt", [f"{p}_above"], [f"{p}_deviation"]),
        helper.make_node("Div", [f"{p}_centred", f"{p}_deviation"], [f"{p}_normal"]),
        helper.make_node("Mul", [f"{p}_normal", f"{p}_scale"], [f"{p}_scaled"]),
        helper.make_node("Add", [f"{p}_scaled", f"{p}_offset"], [node.output[0]]),
    ]
