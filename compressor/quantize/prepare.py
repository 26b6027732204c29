"""A working copy of a model that quantizers can handle, and which of its nodes they must leave alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, version_converter

from compressor.errors import StageError, sdk_errors
from compressor.models.onnx_facts import DATA_DEPENDENT
from compressor.models.onnx_graph import constants, name_nodes, opset_of
from compressor.quantize.batch_norm import fold_batch_norms

PER_CHANNEL_OPSET = 13  # first whose QuantizeLinear has an axis
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
BEFORE_LOGARITHM = "feeds a logarithm in the signal front end, which magnifies small errors"
COMPUTED = "both operands are computed (attention); int8 gains nothing here"
INSIDE_GELU = "part of a GELU, which runtimes compute as one operator; rounding inside would keep them from it"
END_OF_GRAPH = "activation at the output: int8 would only coarsen the result"
ACTIVATIONS = ("Softmax", "Sigmoid", "HardSigmoid", "Tanh", "LogSoftmax")


def prepare(original: ModelProto) -> ModelProto:
    """A copy with unique node names, weights as initializers (not Constant nodes or inputs), batch norms in the
    convolutions before them, opset 13 or later and no recorded shapes (stale ones make ONNX Runtime's dynamic quantizer
    fail on a transposed Gemm)."""
    model = ModelProto()
    model.CopyFrom(original)
    fixed = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in fixed]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    _lift_constants(model)
    name_nodes(model)
    opset = opset_of(model)
    if opset < PER_CHANNEL_OPSET:
        hint = f"Export the model again at opset {PER_CHANNEL_OPSET} or later."
        with sdk_errors(StageError, f"raise the model from opset {opset} to {PER_CHANNEL_OPSET}", hint=hint):
            model = version_converter.convert_version(model, PER_CHANNEL_OPSET)
        name_nodes(model)
        _lift_constants(model)
    _cast_constants(model)
    fold_batch_norms(model)
    _divisions_to_products(model)
    model.ir_version = max(model.ir_version, 7)
    del model.graph.value_info[:]
    return model


def _cast_constants(model: ModelProto) -> None:
    """Stored tensors in the type they are cast to: NNCF asks for the recorded type of what a Cast reads, and a stored
    tensor has none."""
    fixed = constants(model.graph)
    kept: list[NodeProto] = []
    for node in model.graph.node:
        tensor = fixed.get(node.input[0]) if node.op_type == "Cast" else None
        if tensor is None or any(node.output[0] == value.name for value in model.graph.output):
            kept.append(node)
            continue
        kind = helper.tensor_dtype_to_np_dtype(next(item.i for item in node.attribute if item.name == "to"))
        model.graph.initializer.append(
            numpy_helper.from_array(numpy_helper.to_array(tensor).astype(kind), node.output[0])
        )
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _divisions_to_products(model: ModelProto) -> None:
    """x / c becomes x * (1 / c) for a float scalar c: Mul has an int8 kernel, Div has none (hard-swish ends in one)."""
    fixed = constants(model.graph)
    for node in model.graph.node:
        tensor = fixed.get(node.input[1]) if node.op_type == "Div" else None
        if tensor is None or tensor.data_type != TensorProto.FLOAT:
            continue
        value = numpy_helper.to_array(tensor)
        if value.size != 1 or not value.all():
            continue
        inverse = numpy_helper.from_array((1 / value).astype(value.dtype), f"{node.name}_inverse")
        model.graph.initializer.append(inverse)
        node.op_type, node.input[1] = "Mul", inverse.name


def _lift_constants(model: ModelProto) -> None:
    """Constant nodes at the top level become initializers, where the quantizers look for weights."""
    kept: list[NodeProto] = []
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            tensor = TensorProto()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
            model.graph.initializer.append(tensor)
        else:
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)


def left_alone(model: ModelProto) -> Mapping[str, str]:
    """Nodes that stay float in every static variant: node name -> reason."""
    graph = model.graph
    reasons: dict[str, str] = {}
    fixed = constants(graph)
    for node in graph.node:
        if node.op_type == "MatMul" and not any(name in fixed for name in node.input):
            reasons[node.name] = COMPUTED
    outputs = {value.name for value in graph.output}
    for node in graph.node:
        if node.op_type in ACTIVATIONS and outputs & set(node.output):
            reasons[node.name] = END_OF_GRAPH
    reasons.update(dict.fromkeys(gelu_chains(graph), INSIDE_GELU))
    reasons.update(_front_end(graph))
    reasons.update(_after_data(graph))
    return reasons


def gelu_chains(graph: onnx.GraphProto) -> set[str]:
    """Names of all nodes of ``x * (1 + erf(x / sqrt(2))) / 2``, which is how exporters write Gelu below opset 20."""
    fixed = constants(graph)
    made = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def scales(node: NodeProto | None, source: str) -> bool:
        """Does it multiply ``source`` by one stored number?"""
        if node is None or node.op_type not in ("Mul", "Div") or source not in node.input:
            return False
        return any(np.prod(fixed[name].dims) == 1 for name in node.input if name in fixed)

    def only(node: NodeProto | None, operator: str) -> NodeProto | None:
        """The only reader, where it is such an operator."""
        found = readers.get(node.output[0], []) if node is not None else []
        return found[0] if len(found) == 1 and found[0].op_type == operator else None

    chains: set[str] = set()
    for node in graph.node:
        inner = made.get(node.input[0]) if node.op_type == "Erf" else None
        source = next((name for name in inner.input if name not in fixed), "") if inner is not None else ""
        plus = only(node, "Add")
        product = only(plus, "Mul")
        if inner is None or plus is None or product is None or not scales(inner, source):
            continue
        other = next((name for name in product.input if name != plus.output[0]), "")
        half = only(product, "Mul") if other == source else made.get(other)
        if scales(half, product.output[0] if other == source else source):
            assert half is not None
            chains |= {inner.name, node.name, plus.name, product.name, half.name}
    return chains


def _front_end(graph: onnx.GraphProto) -> dict[str, str]:
    """Everything that feeds a logarithm which weighted layers come after: spectra inside the graph (STFT, log-mel)."""
    logarithms = [node for node in graph.node if node.op_type == "Log"]
    if not logarithms or not any(_weighted_after(graph, node) for node in logarithms):
        return {}
    made = {name: node for node in graph.node for name in node.output}
    found: dict[str, str] = {}
    pending = [node for node in logarithms if _weighted_after(graph, node)]
    while pending:
        node = pending.pop()
        for name in node.input:
            source = made.get(name)
            if source is not None and source.name not in found:
                found[source.name] = BEFORE_LOGARITHM
                pending.append(source)
    return found


def _weighted_after(graph: onnx.GraphProto, start: NodeProto) -> bool:
    reached = set(start.output)
    for node in graph.node:
        if reached & set(node.input):
            if node.op_type in WEIGHTED:
                return True
            reached |= set(node.output)
    return False


def _after_data(graph: onnx.GraphProto) -> dict[str, str]:
    """Nodes downstream of operators whose output shape depends on values: there may be nothing to calibrate on."""
    reached: dict[str, str] = {}
    found: dict[str, str] = {}
    for node in graph.node:
        source = next((reached[name] for name in node.input if name in reached), "")
        if node.op_type in DATA_DEPENDENT:
            source = node.name
        if source:
            reached.update(dict.fromkeys(node.output, source))
            found[node.name] = f"its shape depends on data (after `{source}`)"
    return found
