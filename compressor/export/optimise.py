"""Graph optimisation that keeps a file portable: standard operators in, standard operators out.

ONNX Runtime's *basic* level does the work offline (constant folding, batch-norm folding, elimination of Identity,
Dropout, double Cast, dead and duplicate weights). Tried on a ResNet and on BERT exports, the onnxscript optimiser found
nothing more (torch's exporter has already run it); and the runtime alone does without torch. Two of its passes are
switched off: MatMul+Add -> Gemm surrounds transformer layers with Reshape, and moved Transposes separate convolutions
that int8 kernels would fuse.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, helper, numpy_helper

from compressor.errors import StageError, sdk_errors
from compressor.models.onnx_graph import (
    STANDARD_DOMAINS,
    all_graphs,
    constants,
    metadata_of,
    name_nodes,
    opset_of,
    read_model,
    save_model,
    set_metadata,
)
from compressor.types import LayerFact

KEPT_APART = ["MatMulAddFusion", "TransposeOptimizer"]
STAGE = "optimise"


def optimise(source: Path, out: Path) -> tuple[LayerFact, ...]:
    """Write an optimised copy of ``source`` to ``out`` and say what happened to which operators.

    Inputs, outputs, metadata and opset are kept; the source is not touched. Raises :class:`StageError` when the runtime
    cannot load the graph (the message names the node).
    """
    original = read_model(source)
    before = _names(original)
    model = _fold(_prepared(original), source.name)
    facts = pool_means(model)
    _tidy(model, original)
    save_model(model, out)
    return (*_removed(before, _names(model)), *facts)


def _prepared(original: ModelProto) -> ModelProto:
    """A copy in which weights are constants: files of IR 3 list them as inputs, which forbids folding."""
    model = ModelProto()
    model.CopyFrom(original)
    fixed = {tensor.name for tensor in model.graph.initializer}
    kept = [value for value in model.graph.input if value.name not in fixed]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model.ir_version = max(model.ir_version, 4)
    name_nodes(model)
    return model


def _fold(model: ModelProto, name: str) -> ModelProto:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    hint = "The message names the node; the file may need operators that this ONNX Runtime does not have."
    with tempfile.TemporaryDirectory(prefix="optimise-") as folder, sdk_errors(StageError, f"load `{name}`", hint=hint):
        target = Path(folder) / "folded.onnx"
        options.optimized_model_filepath = str(target)
        plain = Path(folder) / "plain.onnx"
        save_model(model, plain)
        onnxruntime.InferenceSession(
            plain, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(KEPT_APART)
        )
        return onnx.load(target)


def pool_means(model: ModelProto) -> list[LayerFact]:
    """Rewrite a mean over height and width into GlobalAveragePool (+ Flatten): the same numbers, and it has an int8
    kernel, so that a quantized network does not return to float before its classifier."""
    facts: list[LayerFact] = []
    fixed = constants(model.graph)
    images = _image_tensors(model)
    nodes = list(model.graph.node)
    for node in nodes:
        if node.op_type != "ReduceMean" or node.input[0] not in images or _axes(node, fixed) != {2, 3}:
            continue
        keep = next((attribute.i for attribute in node.attribute if attribute.name == "keepdims"), 1)
        pooled = node.output[0] if keep else f"{node.output[0]}_pooled"
        made = [helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], name=f"{node.name}_pool")]
        if not keep:
            made.append(helper.make_node("Flatten", [pooled], [node.output[0]], name=f"{node.name}_flat", axis=1))
        position = list(model.graph.node).index(node)
        model.graph.node.remove(node)
        for offset, new in enumerate(made):
            model.graph.node.insert(position + offset, new)
        facts.append(LayerFact(STAGE, node.name, "fused", "ReduceMean", "GlobalAveragePool", "has an int8 kernel"))
    return facts


def _axes(node: onnx.NodeProto, fixed: dict[str, onnx.TensorProto]) -> set[int]:
    """Axes of a ReduceMean over a 4-D tensor, counted from the front; empty when they are computed."""
    listed = next((list(attribute.ints) for attribute in node.attribute if attribute.name == "axes"), None)
    if listed is None and len(node.input) > 1 and node.input[1] in fixed:
        listed = [int(axis) for axis in np.atleast_1d(numpy_helper.to_array(fixed[node.input[1]]))]
    return {axis % 4 for axis in listed or []}


def _image_tensors(model: ModelProto) -> set[str]:
    """Tensors known to be (batch, channel, height, width): outputs of 2-D convolutions and what passes them on."""
    fixed = constants(model.graph)
    found: set[str] = set()
    passing = {
        "Relu",
        "Clip",
        "HardSwish",
        "HardSigmoid",
        "Sigmoid",
        "LeakyRelu",
        "PRelu",
        "MaxPool",
        "AveragePool",
        "Gelu",
    }
    for node in model.graph.node:
        conv = node.op_type == "Conv" and node.input[1] in fixed and len(fixed[node.input[1]].dims) == 4
        passed = node.op_type in passing | {"BatchNormalization"} and node.input[0] in found
        summed = node.op_type in ("Add", "Mul") and all(name in found for name in node.input)
        if conv or passed or summed:
            found.add(node.output[0])
    return found


def _tidy(model: ModelProto, original: ModelProto) -> None:
    """Only what is used: operator sets, weights; the original's metadata, producer and graph name; no stale shapes."""
    used = {node.domain for _, graph in all_graphs(model.graph) for node in graph.node} | {""}
    kept = [entry for entry in model.opset_import if entry.domain in used or entry.domain in STANDARD_DOMAINS]
    kept.sort(key=lambda entry: entry.domain)
    del model.opset_import[:]
    model.opset_import.extend(kept)
    if opset_of(model) != opset_of(original):
        raise StageError("optimising changed the operator set", hint="Report this file.")
    read = {name for _, graph in all_graphs(model.graph) for node in graph.node for name in node.input}
    read |= {value.name for value in model.graph.output}
    weights = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(sorted(weights, key=lambda tensor: tensor.name))
    del model.graph.value_info[:]
    for part, source in ((model.graph.input, original.graph.input), (model.graph.output, original.graph.output)):
        names = {value.name: value for value in source}
        for value in part:
            value.CopyFrom(names[value.name])
    model.graph.name = original.graph.name
    model.producer_name, model.producer_version = original.producer_name, original.producer_version
    model.doc_string = original.doc_string
    set_metadata(model, metadata_of(original))
    name_nodes(model)


def _names(model: ModelProto) -> Counter[str]:
    return Counter(node.op_type for _, graph in all_graphs(model.graph) for node in graph.node)


def _removed(before: Counter[str], after: Counter[str]) -> list[LayerFact]:
    """One fact per operator type whose count changed."""
    facts = []
    for operator in sorted(set(before) | set(after)):
        if before[operator] != after[operator]:
            facts.append(
                LayerFact(
                    STAGE, operator, "fused", str(before[operator]), str(after[operator]), "constant or redundant"
                )
            )
    return facts
