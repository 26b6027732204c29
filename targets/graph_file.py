"""A static graph as one file, for workers of tool chains that have neither onnx nor ONNX Runtime.

An ``.npz`` without pickle: the structure as JSON, stored tensors and tensor attributes as arrays. numpy only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compressor.errors import CompileError
from compressor.types import Array
from targets.static_graph import Graph, Node

_TENSOR = "tensor"  # key of an attribute that is an array: {"tensor": its number}


def save_graph(graph: Graph, path: Path) -> None:
    """Write ``graph``. Raises :class:`CompileError` for attributes without a plain form (nested graphs)."""
    arrays: list[Array] = []
    nodes = []
    for node in graph.nodes:
        attributes = {key: _plain(node, value, arrays) for key, value in node.attributes.items()}
        nodes.append([node.operator, node.name, list(node.inputs), list(node.outputs), attributes])
    facts = {
        "nodes": nodes,
        "constants": {name: _kept(array, arrays) for name, array in graph.constants.items()},
        "shapes": {name: list(shape) for name, shape in graph.shapes.items()},
        "types": {name: kind.name for name, kind in graph.types.items()},
        "inputs": list(graph.inputs),
        "outputs": list(graph.outputs),
    }
    stored: dict[str, Any] = {str(number): array for number, array in enumerate(arrays)}
    with path.open("wb") as stream:
        np.savez(stream, graph=np.frombuffer(json.dumps(facts).encode(), np.uint8), **stored)


def _kept(array: Array, arrays: list[Array]) -> int:
    arrays.append(array)
    return len(arrays) - 1


def _plain(node: Node, value: Any, arrays: list[Array]) -> Any:
    if isinstance(value, np.ndarray):
        return {_TENSOR: _kept(value, arrays)}
    if isinstance(value, (list, tuple)):
        return [_plain(node, item, arrays) for item in value]
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, (bool, int, float, str)):
        return value
    raise CompileError(f"node `{node.name}`: {node.operator} with a nested graph or unknown attribute has no form here")


def load_graph(path: Path) -> Graph:
    """What :func:`save_graph` wrote."""
    with np.load(path, allow_pickle=False) as stored:
        arrays: Mapping[str, Array] = {name: stored[name] for name in stored.files}
    facts = json.loads(arrays["graph"].tobytes())

    def attribute(value: Any) -> Any:
        return arrays[str(value[_TENSOR])] if isinstance(value, dict) else value

    return Graph(
        nodes=tuple(
            Node(operator, name, tuple(inputs), tuple(outputs), {key: attribute(item) for key, item in given.items()})
            for operator, name, inputs, outputs, given in facts["nodes"]
        ),
        constants={name: arrays[str(number)] for name, number in facts["constants"].items()},
        shapes={name: tuple(shape) for name, shape in facts["shapes"].items()},
        types={name: np.dtype(kind) for name, kind in facts["types"].items()},
        inputs=tuple(facts["inputs"]),
        outputs=tuple(facts["outputs"]),
    )
