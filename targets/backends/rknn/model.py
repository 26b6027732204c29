"""The ONNX file as RKNN-Toolkit2 reads it: fixed shapes, shape arithmetic folded, opset 19 at most.

Nodes stay as the file has them, and so does an opset of 19 or lower. Between opsets 19 and 20 the standard changed one
operator that networks are made of: Gelu became an operator. It is written as the chain of Erf that it stands for (the
compiler fuses that again).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from compressor.errors import CompileError, sdk_errors
from targets.static_graph import Graph, Node

OPSET = 19
NEWEST = 20  # that can be written as OPSET
_SAID_OF_NODES = {"LayerNormalization": {"epsilon": 1e-5}}  # defaults that the toolkit wants to see written


def source_opset(path: Path) -> int:
    """The standard opset of an ONNX file. Raises :class:`CompileError` for one that is too new."""
    import onnx

    with sdk_errors(CompileError, f"read `{path.name}`", hint="Is the file a valid ONNX model?"):
        model = onnx.load(str(path), load_external_data=False)
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if opset > NEWEST:
        raise CompileError(
            f"`{path.name}` is of opset {opset}; RKNN-Toolkit2 reads at most {OPSET}",
            hint=f"Export the model with opset {NEWEST} or lower.",
        )
    return opset


def write_onnx(graph: Graph, path: Path, opset: int = OPSET) -> None:
    """Write a static graph, read from a file of ``opset``, as an ONNX file that the toolkit reads."""
    import onnx
    from onnx import helper, numpy_helper

    constants = dict(graph.constants)
    nodes = [
        helper.make_node(node.operator, list(node.inputs), list(node.outputs), node.name, **_attributes(node))
        for original in graph.nodes
        for node in _lowered(original, constants)
    ]
    used = {name for node in nodes for name in node.input}

    def value(name: str) -> Any:
        kind = helper.np_dtype_to_tensor_dtype(graph.types[name])
        return helper.make_tensor_value_info(name, kind, graph.shape(name))

    made = helper.make_graph(
        nodes,
        "model",
        [value(name) for name in graph.inputs],
        [value(name) for name in graph.outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items() if name in used],
        value_info=[value(name) for node in nodes for name in node.output if name in graph.types],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", min(opset, OPSET))], ir_version=9)
    onnx.save(model, str(path))


def _attributes(node: Node) -> dict[str, Any]:
    from onnx import numpy_helper

    given = {**_SAID_OF_NODES.get(node.operator, {}), **node.attributes}
    return {key: numpy_helper.from_array(item) if isinstance(item, np.ndarray) else item for key, item in given.items()}


def _lowered(node: Node, constants: dict[str, Any]) -> Iterator[Node]:
    """``node``, or what it stands for in the older opset; new constants go into ``constants``."""
    if "." in node.operator:
        raise CompileError(
            f"node `{node.name}`: {node.operator} is no operator of the ONNX standard",
            hint="Export the model without it, or use another target.",
        )
    if node.operator != "Gelu":
        yield node
        return
    if node.attributes.get("approximate", "none") != "none":
        raise CompileError(
            f"node `{node.name}`: Gelu by tanh has no form below opset 20", hint="Export the exact Gelu."
        )
    x, y, prefix = node.input(0), node.outputs[0], f"{node.name}/gelu"
    for name, number in (("root", math.sqrt(2)), ("one", 1.0), ("half", 0.5)):
        constants[f"{prefix}_{name}"] = np.float32(number)
    yield Node("Div", f"{prefix}_div", (x, f"{prefix}_root"), (f"{prefix}_d",))
    yield Node("Erf", f"{prefix}_erf", (f"{prefix}_d",), (f"{prefix}_e",))
    yield Node("Add", f"{prefix}_add", (f"{prefix}_e", f"{prefix}_one"), (f"{prefix}_p",))
    yield Node("Mul", f"{prefix}_mul", (x, f"{prefix}_p"), (f"{prefix}_m",))
    yield Node("Mul", f"{prefix}_end", (f"{prefix}_m", f"{prefix}_half"), (y,))
