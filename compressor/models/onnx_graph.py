"""Read, write and describe ONNX files: what every later stage needs to know, without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from compressor.errors import ConfigError, Problem, StageError
from compressor.types import TensorSpec, write_atomic

TWO_GIB = 2**31 - 1  # protobuf's limit for one message
STANDARD_DOMAINS = ("", "ai.onnx")
OPERATOR_HINT = "Export again with a released ONNX opset, or replace the operator."


def read_model(path: Path) -> ModelProto:
    """Load an ONNX file and its external data. Truncated files, unknown standard operators and external data that lies
    outside the file's folder raise :class:`ConfigError` (bad input)."""
    subject = f"`{path}`"
    try:
        model = onnx.load(path, load_external_data=False)
    except FileNotFoundError:
        raise ConfigError.single(subject, "file", "does not exist", hint="Check the path.") from None
    except (DecodeError, OSError, ValueError) as error:
        raise ConfigError.single(subject, "file", f"is not a complete ONNX file: {error}") from error
    if not model.graph.node or not model.graph.output:
        raise ConfigError.single(subject, "file", "holds no graph: it is empty or cut short", hint="Download it again.")
    _load_external(model, path)
    unknown = unknown_operators(model)
    if unknown:
        raise ConfigError(subject, unknown, hint=OPERATOR_HINT)
    return model


def _load_external(model: ModelProto, path: Path) -> None:
    """Pull external tensors in; refuse absolute paths and paths that leave the folder (also through links)."""
    folder = path.resolve().parent
    for tensor in all_tensors(model.graph):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        file = (folder / location).resolve()
        if Path(location).is_absolute() or not file.is_relative_to(folder):
            what = f"external data `{location}` of tensor `{tensor.name}` lies outside the model's folder"
            raise ConfigError.single(f"`{path}`", "external data", what, hint="Move the data beside the model.")
        if not file.is_file():
            what = f"external data `{location}` of tensor `{tensor.name}` does not exist"
            raise ConfigError.single(f"`{path}`", "external data", what, hint="Copy the data file beside the model.")
        try:
            onnx.external_data_helper.load_external_data_for_tensor(tensor, str(folder))
        except (onnx.checker.ValidationError, OSError, ValueError) as error:
            raise ConfigError.single(f"`{path}`", "external data", f"`{location}`: {error}") from error
        tensor.data_location = TensorProto.DEFAULT
        del tensor.external_data[:]


def save_model(model: ModelProto, path: Path) -> None:
    """Write one file, atomically, with bytes that depend on the model only."""
    if model.ByteSize() >= TWO_GIB:
        hint = "Prune or quantize the weights first; one-file ONNX ends at 2 GiB."
        raise StageError(f"`{path.name}` would be {model.ByteSize() / 2**30:.1f} GiB", hint=hint)
    write_atomic(path, model.SerializeToString(deterministic=True))


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """Bodies of If, Loop and Scan."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def all_graphs(graph: GraphProto, inside: str = "") -> Iterator[tuple[str, GraphProto]]:
    """The graph and every nested one, with the name of the node it stands in (empty at the top)."""
    yield inside, graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from all_graphs(inner, node.name or node.op_type)


def all_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Initializers and the tensors of Constant nodes, nested graphs included."""
    for _, part in all_graphs(graph):
        yield from part.initializer
        for node in part.node:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.TENSOR:
                    yield attribute.t


def constants(graph: GraphProto) -> dict[str, TensorProto]:
    """Constant tensors of one graph by name: initializers, and Constant nodes that hold a tensor."""
    found = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            found[node.output[0]] = node.attribute[0].t
    return found


def opset_of(model: ModelProto) -> int:
    """Version of the standard operator set."""
    return max((entry.version for entry in model.opset_import if entry.domain in STANDARD_DOMAINS), default=0)


def unknown_operators(model: ModelProto) -> list[Problem]:
    """Standard-domain operators that no ONNX release knows. Other domains are the runtime's business."""
    opset, local = opset_of(model), {function.name for function in model.functions}
    unknown = []
    for _, graph in all_graphs(model.graph):
        for node in graph.node:
            known = onnx.defs.has(node.op_type, "") if node.domain in STANDARD_DOMAINS else True
            if not known and node.op_type not in local:
                what = f"operator `{node.op_type}` is not in ONNX (opset {opset})"
                unknown.append(Problem(f"node `{node.name or node.output[0]}`", what))
    return unknown


def graph_inputs(model: ModelProto) -> tuple[TensorSpec, ...]:
    """Inputs a caller must feed (old files list their initializers as inputs as well; those are left out)."""
    fixed = {tensor.name for tensor in model.graph.initializer}
    return tuple(_spec(value) for value in model.graph.input if value.name not in fixed)


def graph_outputs(model: ModelProto) -> tuple[TensorSpec, ...]:
    """Outputs with dtype and shape as the file declares them."""
    return tuple(_spec(value) for value in model.graph.output)


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name if tensor.elem_type else "float32"
    shape: list[int | str] = []
    for axis, dim in enumerate(tensor.shape.dim):
        if dim.HasField("dim_value") and dim.dim_value > 0:  # Paddle writes -1 for "any"
            shape.append(dim.dim_value)
        else:
            named = dim.dim_param if dim.dim_param not in ("", "?") else ""
            shape.append(named or ("batch" if axis == 0 else f"{value.name}_{axis}"))
    return TensorSpec(value.name, dtype, tuple(shape))


def metadata_of(model: ModelProto) -> dict[str, str]:
    """The file's own key-value metadata."""
    return {entry.key: entry.value for entry in model.metadata_props}


def set_metadata(model: ModelProto, metadata: Mapping[str, str]) -> None:
    """Replace the file's metadata, sorted by key."""
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, dict(sorted(metadata.items())))


def name_nodes(model: ModelProto) -> None:
    """Give every node a unique name (engines address nodes by name; files in the wild have none or duplicates)."""
    taken: set[str] = set()
    for _, graph in all_graphs(model.graph):
        for node in graph.node:
            base = node.name or f"{node.op_type}_{node.output[0] if node.output else ''}"
            name, count = base, 1
            while name in taken:
                name, count = f"{base}_{count}", count + 1
            taken.add(name)
            node.name = name
