"""The static graph as a file: what goes to workers of tool chains is what was read."""

from __future__ import annotations

import numpy as np
import pytest

from compressor.errors import CompileError
from targets.graph_file import load_graph, save_graph
from targets.static_graph import Graph, Node, read_static


def test_a_quantized_net_comes_back_equal(models, tmp_path):
    graph = read_static(models["static"], {"image": (1, 3, 12, 12)})
    save_graph(graph, tmp_path / "graph.npz")
    again = load_graph(tmp_path / "graph.npz")
    assert again.nodes == graph.nodes
    assert (again.inputs, again.outputs, again.shapes, again.types) == (
        graph.inputs,
        graph.outputs,
        graph.shapes,
        graph.types,
    )
    assert set(again.constants) == set(graph.constants)
    for name, array in graph.constants.items():
        assert again.constants[name].dtype == array.dtype
        np.testing.assert_array_equal(again.constants[name], array)


def test_attributes_of_every_kind_and_scalars(tmp_path):
    attributes = {"axis": -1, "alpha": 0.5, "mode": "linear", "pads": [0, 1], "value": np.arange(3, dtype=np.int64)}
    node = Node("Foo", "foo", ("x", ""), ("y",), attributes)
    graph = Graph((node,), {"c": np.float32(2.5)}, {"y": ()}, {"y": np.dtype("bool")}, ("x",), ("y",))
    save_graph(graph, tmp_path / "graph.npz")
    again = load_graph(tmp_path / "graph.npz")
    found = dict(again.nodes[0].attributes)
    np.testing.assert_array_equal(found.pop("value"), np.arange(3))
    assert found == {"axis": -1, "alpha": 0.5, "mode": "linear", "pads": [0, 1]}
    assert again.constants["c"].shape == ()


def test_a_nested_graph_is_refused_by_its_node(tmp_path):
    graph = Graph((Node("If", "choice", ("x",), ("y",), {"then_branch": object()}),), {}, {}, {}, ("x",), ("y",))
    with pytest.raises(CompileError, match="`choice`: If"):
        save_graph(graph, tmp_path / "graph.npz")
