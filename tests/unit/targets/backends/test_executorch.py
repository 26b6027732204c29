"""executorch: torch forms of operators that make pictures larger, and moves of int8 values, against ONNX Runtime."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from compressor.errors import CompileError
from targets.static_graph import read_static

pytestmark = pytest.mark.train
torch = pytest.importorskip("torch")

from targets.backends.executorch.module import OnnxModule  # noqa: E402  it needs torch

SHAPE = (1, 4, 5, 6)
Stored = dict[str, np.ndarray]


def write(path: Path, nodes: list[onnx.NodeProto], stored: Stored) -> Path:
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)]
    ends.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, None))
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def both(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """What the module and ONNX Runtime answer."""
    x = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    module = OnnxModule(read_static(path, {"x": SHAPE})).eval()
    with torch.no_grad():
        found = module(torch.from_numpy(x))[0].numpy()
    return found, onnxruntime.InferenceSession(str(path)).run(None, {"x": x})[0]


def resized(path: Path, scales: tuple[float, float], **attributes: object) -> Path:
    node = helper.make_node("Resize", ["x", "", "s"], ["y"], "grow", **attributes)
    return write(path, [node], {"s": np.float32([1, 1, *scales])})


PLACES = ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners")
ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")


@pytest.mark.parametrize("where", PLACES)
def test_nearest_takes_the_places_of_the_standard(where, tmp_path):
    for rounding, scales in product(ROUNDINGS, [(2.0, 3.0), (1.4, 2.5), (0.6, 1.0)]):
        attributes = {"mode": "nearest", "coordinate_transformation_mode": where, "nearest_mode": rounding}
        found, expected = both(resized(tmp_path / "m.onnx", scales, **attributes))
        np.testing.assert_array_equal(found, expected, err_msg=f"{rounding} {scales}")


@pytest.mark.parametrize("where", PLACES)
def test_linear_by_whole_pictures(where, tmp_path):
    path = resized(tmp_path / "m.onnx", (2.0, 1.5), mode="linear", coordinate_transformation_mode=where)
    if where == "asymmetric":
        with pytest.raises(CompileError, match="`grow`: Resize"):
            both(path)
        return
    found, expected = both(path)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_resize_that_torch_would_shift_is_refused(tmp_path):
    """ONNX keeps the factor it was given, torch the ratio of the sizes: 5 x 1.5 is 7 rows."""
    with pytest.raises(CompileError, match="linear, half_pixel"):
        both(resized(tmp_path / "m.onnx", (1.5, 1.5), mode="linear"))


@pytest.mark.parametrize(
    "attributes",
    [
        {"strides": [2, 2]},
        {"strides": [2, 1], "pads": [1, 0, 1, 2], "group": 2},
        {"strides": [2, 2], "pads": [0, 1, 1, 1], "output_padding": [1, 1]},
        {"dilations": [2, 1], "pads": [1, 1, 0, 0]},
    ],
)
def test_a_transposed_convolution_with_any_padding(attributes, tmp_path):
    random = np.random.default_rng(1)
    wide = 6 // attributes.get("group", 1)
    stored = {"w": random.normal(size=(4, wide, 3, 3)).astype(np.float32), "b": np.linspace(-1, 1, 6, dtype=np.float32)}
    node = helper.make_node("ConvTranspose", ["x", "w", "b"], ["y"], "grow", **attributes)
    found, expected = both(write(tmp_path / "m.onnx", [node], stored))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def quantized(operator: str, operands: int, **attributes: object) -> tuple[list[onnx.NodeProto], Stored]:
    """Q and DQ of the one input with a scale for each operand, the operator, Q and DQ with a scale of its own."""
    stored: Stored = {"z": np.uint8(128), "out_z": np.uint8(100), "out": np.float32(0.03)}
    nodes = []
    for place in range(operands):
        stored[f"s{place}"] = np.float32(0.02 + 0.01 * place)
        nodes.append(helper.make_node("QuantizeLinear", ["x", f"s{place}", "z"], [f"q{place}"], f"q{place}"))
        nodes.append(helper.make_node("DequantizeLinear", [f"q{place}", f"s{place}", "z"], [f"d{place}"], f"d{place}"))
    nodes.append(helper.make_node(operator, [f"d{place}" for place in range(operands)], ["m"], "move", **attributes))
    nodes.append(helper.make_node("QuantizeLinear", ["m", "out", "out_z"], ["qo"], "qo"))
    nodes.append(helper.make_node("DequantizeLinear", ["qo", "out", "out_z"], ["y"], "do"))
    return nodes, stored


@pytest.mark.parametrize(
    ("operator", "operands", "attributes"),
    [("Concat", 3, {"axis": 1}), ("MaxPool", 1, {"kernel_shape": [2, 2]}), ("Transpose", 1, {"perm": [0, 2, 3, 1]})],
)
def test_moved_int8_values_have_one_scale_and_stay_what_they_were(operator, operands, attributes, tmp_path):
    """XNNPACK does not load a concatenation of several scales ("Failed to create cat2 node")."""
    path = write(tmp_path / "m.onnx", *quantized(operator, operands, **attributes))
    found, expected = both(path)
    np.testing.assert_array_equal(found, expected)
    exported = torch.export.export(OnnxModule(read_static(path, {"x": SHAPE})).eval(), (torch.zeros(SHAPE),))
    name = {"Concat": "cat", "MaxPool": "max_pool2d", "Transpose": "permute"}[operator]
    (move,) = (node for node in exported.graph.nodes if node.op == "call_function" and node.target._opname == name)
    before = [node.args[1:3] for node in move.all_input_nodes]
    after = [node.args[1:3] for node in move.users]
    assert before == after * operands
