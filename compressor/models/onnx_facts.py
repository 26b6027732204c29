"""What an ONNX graph is made of: weights, work, and whatever stands in the way of quantizing it."""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from onnx import GraphProto, ModelProto, NodeProto

from compressor.models.onnx_graph import (
    all_graphs,
    all_tensors,
    constants,
    graph_inputs,
    graph_outputs,
    metadata_of,
    opset_of,
    read_model,
)
from compressor.types import TensorSpec

WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN"})
CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
CONTROL_FLOW = frozenset({"If", "Loop", "Scan"})
DATA_DEPENDENT = frozenset({"NonZero", "Unique", "Compress", "NonMaxSuppression"})
QUANTIZED = frozenset(
    [
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "QLinearConv",
        "QLinearMatMul",
        "ConvInteger",
        "MatMulInteger",
        "MatMulNBits",
        "QGemm",
        "QLinearAdd",
        "DynamicQuantizeMatMul",
        "MatMulIntegerToFloat",
        "QAttention",
        "GatherBlockQuantized",
    ]
)
FUSED_ATTENTION = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention", "PackedAttention"})
# Operators that hand a tensor on unchanged or scaled: looked through when searching for a mask before Softmax.
PASSING = frozenset({"Cast", "Reshape", "Transpose", "Mul", "Div", "Identity", "Dropout", "Squeeze", "Unsqueeze"})
DEFAULT_SEQUENCE = 128  # tokens, for estimates of work only


@dataclass(frozen=True)
class WeightedNode:
    """A node that does most of the work, and what an int8 engine must know of it."""

    name: str
    operator: str
    weight_shape: tuple[int, ...]  # () when both operands are computed (attention)
    inside: str = ""  # name of the If/Loop/Scan it stands in
    after: str = ""  # name of the data-dependent node it comes after


@dataclass(frozen=True)
class ModelFacts:
    """One ONNX file. ``macs`` is for batch 1 (sequence 128) and is None when shapes cannot be inferred."""

    parameters: int
    macs: int | None
    operators: Mapping[str, int]
    opset: int
    file_bytes: int
    quantized: bool
    has_control_flow: bool
    has_masked_attention: bool
    has_attention: bool
    weighted: tuple[WeightedNode, ...]
    data_dependent: tuple[str, ...]  # names of nodes whose output shape depends on values
    custom_domains: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_convolutions(self) -> bool:
        return any(node.operator in CONVOLUTIONS for node in self.weighted)

    @property
    def quantizable(self) -> tuple[WeightedNode, ...]:
        """Weighted nodes at the top level, with constant weights, that no data-dependent shape reaches."""
        return tuple(node for node in self.weighted if node.weight_shape and not node.inside and not node.after)


def describe(path: Path, dims: Mapping[str, int] | None = None) -> ModelFacts:
    """Facts of an ONNX file. ``dims`` gives sizes to dynamic dimensions for the estimate of work (MACs).

    Raises :class:`compressor.errors.ConfigError` when the file cannot be read.
    """
    return describe_model(read_model(path), path.stat().st_size, dims)


def describe_model(model: ModelProto, file_bytes: int, dims: Mapping[str, int] | None = None) -> ModelFacts:
    """Facts of a loaded model."""
    names = [node.op_type for _, graph in all_graphs(model.graph) for node in graph.node]
    domains = {node.domain for _, graph in all_graphs(model.graph) for node in graph.node}
    attention, masked = _attention(model.graph)
    return ModelFacts(
        parameters=count_parameters(model),
        macs=estimate_macs(model, dims or {}),
        operators=dict(sorted(Counter(names).items())),
        opset=opset_of(model),
        file_bytes=file_bytes,
        quantized=any(name in QUANTIZED for name in names),
        has_control_flow=any(name in CONTROL_FLOW for name in names),
        has_masked_attention=masked,
        has_attention=attention,
        weighted=_weighted(model),
        data_dependent=tuple(node.name or node.op_type for node in model.graph.node if node.op_type in DATA_DEPENDENT),
        custom_domains=tuple(sorted(domains - {"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})),
        inputs=graph_inputs(model),
        outputs=graph_outputs(model),
        metadata=metadata_of(model),
    )


def count_parameters(model: ModelProto) -> int:
    """Floating-point and quantized weights: every constant tensor of at least one dimension, but no shape constants."""
    integer = {onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL, onnx.TensorProto.STRING}
    return sum(math.prod(t.dims) for t in all_tensors(model.graph) if t.dims and t.data_type not in integer)


def _weighted(model: ModelProto) -> tuple[WeightedNode, ...]:
    reached = _reached(model.graph)
    found = []
    for inside, graph in all_graphs(model.graph):
        fixed = constants(graph) if not inside else constants(graph) | constants(model.graph)
        for node in graph.node:
            if node.op_type in WEIGHTED:
                weight = fixed.get(node.input[1])
                shape = tuple(weight.dims) if weight is not None else ()
                name = node.name or node.output[0]
                found.append(WeightedNode(name, node.op_type, shape, inside, reached.get(node.output[0], "")))
    return tuple(found)


def _reached(graph: GraphProto) -> dict[str, str]:
    """Tensors downstream of a data-dependent node -> that node's name. Nodes stand in topological order."""
    reached: dict[str, str] = {}
    for node in graph.node:
        source = next((reached[name] for name in node.input if name in reached), "")
        if node.op_type in DATA_DEPENDENT:
            source = node.name or node.op_type
        if source:
            reached.update(dict.fromkeys(node.output, source))
    return reached


def _attention(graph: GraphProto) -> tuple[bool, bool]:
    """(has attention, has masked attention): a Softmax whose result is multiplied with a computed tensor; a mask is an
    Add or Where with a computed operand on the way into that Softmax."""
    attention = masked = False
    for _, part in all_graphs(graph):
        made = {name: node for node in part.node for name in node.output}
        fixed = constants(part)
        users: dict[str, list[NodeProto]] = {}
        for node in part.node:
            for name in node.input:
                users.setdefault(name, []).append(node)
        for node in part.node:
            if node.op_type in FUSED_ATTENTION:
                attention, masked = True, masked or len([name for name in node.input if name]) > 3
            elif node.op_type == "Softmax" and _feeds_matmul(node.output[0], users, fixed):
                attention, masked = True, masked or _is_masked(node.input[0], made, fixed)
    return attention, masked


def _feeds_matmul(name: str, users: dict[str, list[NodeProto]], fixed: Mapping[str, object], depth: int = 5) -> bool:
    for node in users.get(name, []):
        if node.op_type == "MatMul" and not any(operand in fixed for operand in node.input):
            return True
        if (
            depth
            and node.op_type in PASSING | {"Where", "IsNaN"}
            and _feeds_matmul(node.output[0], users, fixed, depth - 1)
        ):
            return True
    return False


def _is_masked(name: str, made: Mapping[str, NodeProto], fixed: Mapping[str, object]) -> bool:
    for _ in range(6):
        node = made.get(name)
        if node is None:
            return False
        if node.op_type in ("Add", "Sub", "Where"):
            return not any(operand in fixed for operand in node.input[:1]) or node.op_type == "Where"
        if node.op_type not in PASSING:
            return False
        name = node.input[0]
    return False


def estimate_macs(model: ModelProto, dims: Mapping[str, int]) -> int | None:
    """Multiply-accumulates of Conv, ConvTranspose, Gemm and MatMul at batch 1, by ONNX shape inference."""
    sized = ModelProto()
    sized.CopyFrom(model)
    for value in sized.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if not (dim.HasField("dim_value") and dim.dim_value > 0):
                _resize(dim, axis, dims)
    for part in (sized.graph.value_info, sized.graph.output):
        for value in part:
            value.type.tensor_type.ClearField("shape")
    del sized.graph.value_info[:]
    try:
        inferred = onnx.shape_inference.infer_shapes(sized, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, ValueError, RuntimeError):
        return None
    macs = _sum_macs(inferred)
    return macs if macs is not None else _sum_macs_symbolic(sized)


def _sum_macs_symbolic(sized: ModelProto) -> int | None:
    """Second try, with ONNX Runtime's inference, which follows computed shapes (reshapes of attention heads)."""
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    logger = logging.getLogger("onnxruntime.tools.symbolic_shape_infer")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            inferred = SymbolicShapeInference.infer_shapes(sized, auto_merge=True)
    except Exception:  # noqa: BLE001 - an estimate only; this inference throws AssertionError, KeyError and bare Exception
        return None
    finally:
        logger.setLevel(level)
    return _sum_macs(inferred.graph) if inferred is not None else None


def _resize(dim: onnx.TensorShapeProto.Dimension, axis: int, dims: Mapping[str, int]) -> None:
    if dim.dim_param in dims:
        dim.dim_value = dims[dim.dim_param]
    elif axis == 0:
        dim.dim_value = 1
    elif "seq" in dim.dim_param.lower():
        dim.dim_value = DEFAULT_SEQUENCE


def _sum_macs(graph: GraphProto) -> int | None:
    shapes = {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for part in (graph.input, graph.value_info, graph.output)
        for value in part
        if value.type.tensor_type.HasField("shape")
    }
    return macs_of_shapes(graph, shapes | {name: tuple(tensor.dims) for name, tensor in constants(graph).items()})


def macs_of_shapes(graph: GraphProto, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Multiply-accumulates of Conv, ConvTranspose, Gemm and MatMul for tensors of these shapes (constants included);
    None when one is not known."""
    total = 0
    for node in graph.node:
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            macs = _macs(node, shapes)
            if macs is None:
                return None
            total += macs
    return total


def _macs(node: NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    first, second, out = (shapes.get(name, ()) for name in (node.input[0], node.input[1], node.output[0]))
    wanted = first if node.op_type == "ConvTranspose" else out
    if not all(wanted) or not wanted or not all(second) or not second:
        return None
    if node.op_type in CONVOLUTIONS:
        return math.prod(wanted) * math.prod(second[1:])
    if node.op_type == "Gemm":
        return math.prod(out) * (math.prod(second) // out[-1])
    return math.prod(out) * (second[-2] if len(second) > 1 else second[0])
