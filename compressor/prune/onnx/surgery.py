"""Cutting units out of an ONNX graph: the masked twin, smaller constants, and the numbers that nodes carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper

from compressor.errors import StageError
from compressor.models.onnx_graph import constants, opset_of
from compressor.models.structure.groups import Cut, Index, owner, removed_positions
from compressor.prune.onnx.graph import Structure
from compressor.prune.onnx.runtime import Watcher, few_samples
from compressor.prune.onnx.trace import Call, Site, kept_along
from compressor.types import Array

TO_THE_END = 2**31 - 1
TOLERANCE = 1e-4  # of the largest output (at least 1): committed against masked, in fp32


@dataclass(frozen=True)
class Committed:
    """Which cuts hold, and why the others do not (group name -> reason)."""

    cuts: list[Cut]
    refused: Mapping[str, str]


def commit(structure: Structure, cuts: Sequence[Cut], example: Mapping[str, Array]) -> Committed:
    """Keep the cuts after which the smaller graph is valid and computes what the masked one does, to 1e-4."""
    fault = fault_of(structure, list(cuts), example)
    if not fault:
        return Committed(list(cuts), {})
    accepted: list[Cut] = []
    refused: dict[str, str] = {}
    for cut in cuts:
        fault = fault_of(structure, [*accepted, cut], example)
        if fault:
            refused[cut.group.name] = fault
        else:
            accepted.append(cut)
    return Committed(accepted, refused)


def fault_of(structure: Structure, cuts: list[Cut], example: Mapping[str, Array]) -> str:
    """What is wrong with the graph after ``cuts``; empty when nothing is."""
    masked = mask(structure.trace.model, structure, cuts)
    try:
        small = shrink(masked, structure, cuts)
    except StageError as error:
        return f"the smaller graph is not valid: {error}".split("\n")[0][:300]
    try:
        inputs = few_samples(masked, example)
        wanted, found = Watcher(masked).run(inputs), Watcher(small).run(inputs)
    except StageError as error:
        return f"the smaller graph does not run: {error}".split("\n")[0][:300]
    return "" if _agree(wanted, found) else "the smaller graph does not compute what the masked one does"


def _agree(wanted: Mapping[str, Array], found: Mapping[str, Array]) -> bool:
    for name, a in wanted.items():
        b = found[name]
        if a.shape != b.shape:
            return False
        if a.dtype.kind == "f" and a.size:
            scale = max(1.0, float(np.abs(a).max()))
            if not float(np.abs(a.astype(np.float64) - b).max()) <= TOLERANCE * scale:  # also False for NaN
                return False
    return True


def mask(model: ModelProto, structure: Structure, cuts: Sequence[Cut]) -> ModelProto:
    """A copy of ``model`` with all its sizes, in which every element of the removed units is zero (divisors: one)."""
    masked = ModelProto()
    masked.CopyFrom(model)
    tensors = constants(masked.graph)
    operators = structure.operators
    for key, gone in removed_positions(cuts).items():
        tensor = tensors[structure.constant(key)]
        array = numpy_helper.to_array(tensor).copy()
        divisor = operators[owner(key.tensor)] == "Div" and key.tensor.endswith(".1")
        array[(slice(None),) * key.axis + (gone,)] = 1 if divisor else 0
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return masked


def shrink(masked: ModelProto, structure: Structure, cuts: list[Cut]) -> ModelProto:
    """The graph with really smaller constants. Raises :class:`StageError` when ONNX's own checks refuse it."""
    small = ModelProto()
    small.CopyFrom(masked)
    tensors = constants(small.graph)
    for key, gone in removed_positions(cuts).items():
        tensor = tensors[structure.constant(key)]
        array = np.delete(numpy_helper.to_array(tensor), gone, axis=key.axis)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))
    gone_roots = structure.gone(cuts)
    for site in structure.trace.sites:
        _WRITERS[site.kind](_Edit(small, structure, site, gone_roots))
    del small.graph.value_info[:]
    return checked(small)


def checked(model: ModelProto) -> ModelProto:
    """``model`` after ONNX's checker and shape inference, both strict."""
    try:
        onnx.checker.check_model(model)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise StageError(" ".join(str(error).split())) from error
    return model


@dataclass(frozen=True)
class _Edit:
    """One node whose own numbers follow the cut."""

    model: ModelProto
    structure: Structure
    site: Site
    gone: Index

    @property
    def node(self) -> NodeProto:
        return next(node for node in self.model.graph.node if node.name == self.site.node)

    @property
    def call(self) -> Call:
        """The node as it was before the cut."""
        whole = next(node for node in self.structure.trace.model.graph.node if node.name == self.site.node)
        return Call(whole, self.structure.trace)

    def kept(self, output: int | None, axis: int) -> Index | None:
        """Which positions stay along an axis of an output (None: of the data); None when all do."""
        value = self.site.before if output is None else self.site.after[output]
        found = kept_along(self.structure.trace.space, value, axis, self.gone)
        return None if found is None or bool(found.all()) else found

    def constant(self, position: int, numbers: Sequence[int]) -> None:
        """Give the node its own constant at an input; others that read the old one keep theirs."""
        name = f"{self.site.node}_{self.site.kind}_{position}"
        self.model.graph.initializer.append(numpy_helper.from_array(np.asarray(numbers, dtype=np.int64), name))
        self.node.input[position] = name

    def attribute(self, name: str, value: int | Sequence[int]) -> None:
        kept = [each for each in self.node.attribute if each.name != name]
        del self.node.attribute[:]
        self.node.attribute.extend([*kept, helper.make_attribute(name, value)])


def _write_shape(edit: _Edit, position: int, rank: int) -> None:
    """New sizes where units went; a computed shape is mended by a Where on the way in."""
    kept = [edit.kept(0, axis) for axis in range(rank)]
    sizes = {axis: int(found.sum()) for axis, found in enumerate(kept) if found is not None}
    if not sizes:
        return
    given = edit.call.array(position)
    if given is not None:
        numbers = [sizes.get(axis, size) if size > 0 else int(size) for axis, size in enumerate(given.tolist())]
        edit.constant(position, numbers)
        return
    names = [f"{edit.site.node}_{edit.site.kind}_{part}" for part in ("where", "sizes", "shape")]
    computed = edit.node.input[position]
    edit.model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.array([axis in sizes for axis in range(rank)]), names[0]),
            numpy_helper.from_array(np.array([sizes.get(axis, 0) for axis in range(rank)], dtype=np.int64), names[1]),
        ]
    )
    place = next(i for i, node in enumerate(edit.model.graph.node) if node.name == edit.site.node)
    edit.node.input[position] = names[2]
    edit.model.graph.node.insert(
        place, helper.make_node("Where", [names[0], names[1], computed], [names[2]], names[2] + "_mended")
    )


def _reshape(edit: _Edit) -> None:
    _write_shape(edit, 1, len(edit.call.out_shape()))


def _resize(edit: _Edit) -> None:
    if edit.call.has(3) and len(edit.call.node.input) == 4 and not edit.call.attribute("axes"):
        _write_shape(edit, 3, len(edit.call.out_shape()))


def _split(edit: _Edit) -> None:
    axis = edit.site.axis
    parts = [edit.kept(i, axis) for i in range(len(edit.site.after))]
    if all(part is None for part in parts):
        return
    whole = [edit.call.out_shape(i)[axis] for i in range(len(parts))]
    sizes = [size if part is None else int(part.sum()) for part, size in zip(parts, whole, strict=True)]
    if opset_of(edit.model) < 13:
        edit.attribute("split", sizes)
        return
    kept = [each for each in edit.node.attribute if each.name != "num_outputs"]
    del edit.node.attribute[:]
    edit.node.attribute.extend(kept)
    if len(edit.node.input) < 2:
        edit.node.input.append("")
    edit.constant(1, sizes)


def _slice(edit: _Edit) -> None:
    """Start and end move by what went before them; further axes keep their bounds."""
    from compressor.prune.onnx.rules import slice_bounds

    kept = edit.kept(None, edit.site.axis)
    bounds = slice_bounds(edit.call)
    if kept is None or bounds is None:
        return
    moved = {axis: (start, stop) for axis, (start, stop, _) in bounds.items()}
    start, stop = moved[edit.site.axis]
    moved[edit.site.axis] = int(kept[:start].sum()), int(kept[:stop].sum())
    starts = [start for start, _ in moved.values()]
    ends = [_open_end(edit, axis, stop) for axis, (_, stop) in moved.items()]
    if opset_of(edit.model) < 10:
        for name, numbers in (("starts", starts), ("ends", ends), ("axes", list(moved))):
            edit.attribute(name, numbers)
        return
    while len(edit.node.input) < 4:
        edit.node.input.append("")
    for position, numbers in ((1, starts), (2, ends), (3, list(moved))):
        edit.constant(position, numbers)


def _open_end(edit: _Edit, axis: int, end: int) -> int:
    """A bound that means "to the end" stays so on axes that are not cut: other inputs may be longer."""
    return TO_THE_END if axis != edit.site.axis and end == edit.call.shape(0)[axis] else end


def _group(edit: _Edit) -> None:
    kept = edit.kept(None, 1)
    if kept is not None:
        edit.attribute("group", int(kept.sum()))


_WRITERS = {"reshape": _reshape, "resize": _resize, "split": _split, "slice": _slice, "group": _group}
