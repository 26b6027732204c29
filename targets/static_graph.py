"""An ONNX file as the mobile converters want it: fixed shapes, constants folded, every tensor's shape and type known.

LiteRT and ExecuTorch take static graphs. ONNX Runtime's basic optimiser folds all that fixed shapes make constant (the
shape arithmetic of attention masks, for instance), then one run over zeros tells the shape and type of every tensor.
Dynamic quantization (``DynamicQuantizeLinear`` and ``MatMulInteger``) is written back as a product with a dequantized
constant, which is how both runtimes express it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from compressor.errors import CompileError, sdk_errors
from compressor.types import Array, TensorSpec

# Passes that would fence quantized operators in with reshapes and transposes or scatter DequantizeLinear nodes.
_UNWANTED = ["TransposeOptimizer", "MatMulAddFusion", "QDQPropagationTransformer", "EnsureUniqueDQForNodeUnit"]
UNQUANTIZED = "the file is not quantized"  # reason of a node in which nothing was to be integer; workers read it here
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


@dataclass(frozen=True)
class Node:
    """One ONNX operation; an absent optional input is the empty string."""

    operator: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def input(self, position: int) -> str:
        return self.inputs[position] if position < len(self.inputs) else ""


@dataclass(frozen=True)
class Graph:
    """Nodes in the order of execution, stored tensors, and shape and numpy type of every other tensor."""

    nodes: tuple[Node, ...]
    constants: Mapping[str, Array]
    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, np.dtype[Any]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.constants[name].shape) if name in self.constants else self.shapes[name]

    def consumers(self) -> dict[str, list[Node]]:
        """Nodes by the tensor they read; a node stands once for every time it reads it."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in node.inputs:
                found.setdefault(name, []).append(node)
        return found

    def makers(self) -> dict[str, Node]:
        return {name: node for node in self.nodes for name in node.outputs}


def fixed_shapes(inputs: Sequence[TensorSpec], batch: int, sequence: int) -> dict[str, tuple[int, ...]]:
    """Shapes with the first free dimension set to ``batch`` and every other one to ``sequence``.

    >>> fixed_shapes((TensorSpec("ids", "int64", ("batch", "sequence")),), 1, 128)
    {'ids': (1, 128)}
    """
    return {
        spec.name: tuple(
            size if isinstance(size, int) else (batch if axis == 0 else sequence)
            for axis, size in enumerate(spec.shape)
        )
        for spec in inputs
    }


def read_static(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Graph:
    """Read ``path`` with its inputs fixed to ``shapes``. Raises :class:`CompileError`."""
    import onnx

    with (
        tempfile.TemporaryDirectory(prefix="compress-static-") as scratch,
        sdk_errors(CompileError, f"fix the shapes of `{path.name}`", hint="Is the file a valid ONNX model?"),
    ):
        fixed = Path(scratch) / "fixed.onnx"
        onnx.save(with_shapes(onnx.load(str(path)), shapes), str(fixed))
        model = _folded(fixed, Path(scratch) / "folded.onnx")
        graph = _graph(model, _observe(model))
    from targets.gelu import with_gelu

    return with_gelu(_gathers_after_dequantize(_without_dynamic(graph)))


def with_shapes(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """``model`` (an ``onnx.ModelProto``, changed in place) with its inputs fixed; other shapes are left open."""
    stored = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        if value.name in stored:
            continue
        if value.name not in shapes:
            raise CompileError(f"input `{value.name}` of the model is not described by the artifact")
        for dimension, size in zip(value.type.tensor_type.shape.dim, shapes[value.name], strict=True):
            dimension.dim_value = size
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    return model


def _folded(path: Path, out: Path) -> Any:
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(out)
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=_UNWANTED)
    return onnx.load(str(out))


def _observe(model: Any) -> dict[str, Array]:
    """Every tensor of one run over zeros."""
    import onnx
    import onnxruntime

    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    known = {value.name for value in probe.graph.output}
    names = [name for node in probe.graph.node for name in node.output if name]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    types = {"tensor(float)": np.float32, "tensor(bool)": np.bool_, "tensor(double)": np.float64}
    feeds = {}
    for value in session.get_inputs():
        kind = types.get(value.type) or np.dtype(value.type[len("tensor(") : -1])
        feeds[value.name] = np.zeros(value.shape, kind)
    outputs = [output.name for output in session.get_outputs()]
    return {**feeds, **dict(zip(outputs, session.run(outputs, feeds), strict=True))}


def _graph(model: Any, seen: Mapping[str, Array]) -> Graph:
    from onnx import numpy_helper

    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = []
    for position, node in enumerate(model.graph.node):
        attributes = dict(_attributes(node))
        if node.op_type == "Constant":
            constants[node.output[0]] = np.asarray(next(iter(attributes.values())))
            continue
        operator = f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
        name = node.name or f"{node.op_type}_{position}"
        nodes.append(Node(operator, name, tuple(node.input), tuple(node.output), attributes))
    return Graph(
        nodes=tuple(nodes),
        constants=constants,
        shapes={name: tuple(array.shape) for name, array in seen.items()},
        types={name: array.dtype for name, array in seen.items()},
        inputs=tuple(value.name for value in model.graph.input if value.name not in constants),
        outputs=tuple(value.name for value in model.graph.output),
    )


def _attributes(node: Any) -> Iterator[tuple[str, Any]]:
    import onnx
    from onnx import numpy_helper

    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode()
        elif isinstance(value, onnx.TensorProto):
            value = numpy_helper.to_array(value)
        yield attribute.name, value


# ---------------------------------------------------------------- quantization patterns


def _without_dynamic(graph: Graph) -> Graph:
    """``Mul(Cast(MatMulInteger(DynamicQuantizeLinear(x), w)), x_scale * w_scale)`` becomes ``MatMul(x, Dq(w))``."""
    makers, readers = graph.makers(), graph.consumers()
    constants = dict(graph.constants)
    dropped: set[str] = set()
    replaced: dict[str, list[Node]] = {}
    weights: dict[str, str] = {}
    for node in graph.nodes:
        if node.operator == "ConvInteger":
            raise CompileError(
                f"node `{node.name}`: ConvInteger has no form in mobile runtimes",
                hint="Dynamic quantization of convolutions is slower than float; take a static int8 variant.",
            )
        source = makers.get(node.input(0))
        if node.operator != "MatMulInteger" or source is None or source.operator != "DynamicQuantizeLinear":
            continue
        cast = readers[node.outputs[0]][0]
        scaled = readers[cast.outputs[0]][0]
        factor = makers.get(next(name for name in scaled.inputs if name != cast.outputs[0]))
        scale = next((name for name in factor.inputs if name in constants), "") if factor is not None else ""
        if scaled.operator != "Mul" or not scale or node.input(1) not in constants:
            raise CompileError(f"node `{node.name}`: this form of dynamic quantization is not known")
        weight = f"{scaled.outputs[0]}/weight"
        weights[weight] = node.input(1)
        zero = node.input(3)
        if not zero:
            zero = f"{weight}/zero_point"
            constants[zero] = np.zeros((), constants[node.input(1)].dtype)
        constants[f"{weight}/scale"] = np.squeeze(constants[scale])
        constants[zero] = np.squeeze(constants[zero])
        dequantize = Node(
            DEQUANTIZE,
            weight,
            (node.input(1), f"{weight}/scale", zero),
            (weight,),
            {"axis": constants[node.input(1)].ndim - 1},
        )
        product = Node("MatMul", node.name, (source.input(0), weight), scaled.outputs)
        replaced[scaled.name] = [dequantize, product]
        dropped |= {node.name, cast.name}  # what made its operands goes when nothing reads it any more
    if not replaced:
        return graph
    shapes = {**graph.shapes, **{name: graph.constants[stored].shape for name, stored in weights.items()}}
    types = {**graph.types, **dict.fromkeys(weights, np.dtype(np.float32))}
    kept = (node for node in graph.nodes if node.name not in dropped)
    nodes = tuple(item for node in kept for item in replaced.get(node.name, [node]))
    return pruned(replace(graph, nodes=nodes, constants=constants, shapes=shapes, types=types))


def pruned(graph: Graph) -> Graph:
    """Without nodes that nothing reads."""
    wanted = set(graph.outputs)
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if wanted & set(node.outputs):
            kept.append(node)
            wanted |= set(node.inputs)
    return replace(graph, nodes=tuple(reversed(kept)))


def _gathers_after_dequantize(graph: Graph) -> Graph:
    """``Dq(Gather(table, i))`` with a stored table becomes ``Gather(Dq(table), i)``: one rule for all weights."""
    readers = graph.consumers()
    nodes: list[Node] = []
    skipped: set[str] = set()
    shapes, types = dict(graph.shapes), dict(graph.types)
    for node in graph.nodes:
        if node.name in skipped:
            continue
        after = readers.get(node.outputs[0], [])
        table = graph.constants.get(node.input(0))
        if (
            node.operator == "Gather"
            and table is not None
            and table.dtype in (np.int8, np.uint8)
            and len(after) == 1
            and after[0].operator == DEQUANTIZE
            and graph.constants[after[0].input(1)].size == 1
        ):
            inside = f"{node.outputs[0]}/table"
            shapes[inside], types[inside] = tuple(table.shape), graph.types[after[0].outputs[0]]
            nodes.append(Node(DEQUANTIZE, after[0].name, (node.input(0), *after[0].inputs[1:]), (inside,)))
            nodes.append(Node("Gather", node.name, (inside, node.input(1)), after[0].outputs, node.attributes))
            skipped.add(after[0].name)
        else:
            nodes.append(node)
    return replace(graph, nodes=tuple(nodes), shapes=shapes, types=types)
