"""Zeros in the weights of an ONNX file: by magnitude, in the patterns of :mod:`compressor.prune.sparsity`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import numpy as np

from compressor.errors import PlanError, Problem
from compressor.masks import Zeros
from compressor.models.onnx_graph import all_graphs, constants
from compressor.models.patterns import Axes, kept, why_not
from compressor.recipe import PruneStage
from compressor.types import LayerFact

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto


@dataclass(frozen=True)
class SparseOnnx:
    """A graph of the same sizes with zeros, a row for each layer, and how many of the masked weights are zero."""

    model: ModelProto
    facts: tuple[LayerFact, ...]
    weights: int
    zeros: int


@dataclass
class _Found:
    layers: dict[str, tuple[TensorProto, Axes]]  # node -> its weight
    dense: dict[str, str]  # node -> why it stays


def check(model: ModelProto, config: PruneStage) -> list[Problem]:
    """What keeps the zeros that ``config`` asks for from being made; ``where`` is the key inside the stage."""
    if config.zeros is None:
        return []
    found = _find(model, config.zeros, config.protect)
    names = [*found.layers, *found.dense]
    problems = [
        Problem(f"protect.{number}", f"`{pattern}` matches no node; one of {', '.join(names[:8])} ...")
        for number, pattern in enumerate(config.protect)
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
    if not found.layers:
        reasons = "; ".join(sorted(set(found.dense.values()))) or "no convolution or product with a constant weight"
        problems.append(Problem("sparsity" if config.sparsity else "pattern", f"matches nothing: {reasons}"))
    return problems


def sparsify(model: ModelProto, config: PruneStage) -> SparseOnnx:
    """A copy of ``model`` with the zeros that ``config`` asks for.

    Raises :class:`PlanError` for what :func:`check` finds.
    """
    from onnx import numpy_helper

    zeros, problems = config.zeros, check(model, config)
    if problems or zeros is None:
        raise PlanError("the prune stage", problems or [Problem("sparsity", "is not given")])
    made = type(model)()
    made.CopyFrom(model)
    found = _find(made, zeros, config.protect)
    weights = {name: numpy_helper.to_array(tensor) for name, (tensor, _) in found.layers.items()}
    masks = kept(weights, {name: axes for name, (_, axes) in found.layers.items()}, zeros)
    facts = [LayerFact("prune", name, "kept", "dense", "dense", why) for name, why in found.dense.items()]
    for name, (tensor, _) in found.layers.items():
        after = np.where(masks[name], weights[name], np.zeros((), weights[name].dtype))
        tensor.CopyFrom(numpy_helper.from_array(after, tensor.name))
        before, now = (f"{float((values == 0).mean()):.1%} zeros" for values in (weights[name], after))
        facts.append(LayerFact("prune", name, "sparsified", before, now, f"magnitude, {zeros.scope}, {zeros.shown}"))
    total = sum(mask.size for mask in masks.values())
    return SparseOnnx(made, tuple(facts), total, sum(int((~mask).sum()) for mask in masks.values()))


def _find(model: ModelProto, zeros: Zeros, protect: Sequence[str]) -> _Found:
    """Layers of the top graph whose weight is a constant of its own."""
    fixed = constants(model.graph)
    uses = Counter(name for _, graph in all_graphs(model.graph) for node in graph.node for name in node.input)
    found = _Found({}, {})
    for node in model.graph.node:
        axes, tensor = _axes(node), fixed.get(node.input[1]) if len(node.input) > 1 else None
        if axes is None or tensor is None or len(tensor.dims) < 2 or tensor.data_type != tensor.FLOAT:
            continue
        pattern = next((pattern for pattern in protect if fnmatchcase(node.name, pattern)), None)
        if pattern is not None:
            found.dense[node.name] = f"protected by `{pattern}`"
        elif uses[node.input[1]] > 1:
            found.dense[node.name] = "its weight is used twice"
        elif reason := why_not(tuple(tensor.dims), axes, zeros):
            found.dense[node.name] = reason
        else:
            found.layers[node.name] = tensor, axes
    return found


def _axes(node: NodeProto) -> Axes | None:
    """Where the second input keeps outputs and inputs; None for other operators."""
    if node.op_type == "Conv":
        return Axes(0, 1)
    if node.op_type == "ConvTranspose":
        return Axes(1, 0)
    if node.op_type == "Gemm":
        turned = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        return Axes(0, 1) if turned else Axes(1, 0)
    return Axes(1, 0) if node.op_type == "MatMul" else None


__all__ = ["SparseOnnx", "check", "sparsify"]
