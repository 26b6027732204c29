"""The working copy that quantizers get: the same function, in a form that stays in int8."""

from __future__ import annotations

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from compressor.models.onnx_graph import read_model
from compressor.profile import QuantizationRules
from compressor.quantize.prepare import gelu_chains, prepare
from tools.operator_groups import write_group
from tools.target_rules import emitted


def norms(second_reader: bool) -> object:
    """Conv (no bias), batch norm, relu; the norm's scale is a stored tensor behind a Cast."""
    random = np.random.default_rng(0)
    stored = {
        "w": random.normal(size=(4, 3, 3, 3)).astype(np.float32),
        "scale": random.normal(size=4),
        "shift": random.normal(size=4).astype(np.float32),
        "mean": random.normal(size=4).astype(np.float32),
        "variance": random.uniform(0.2, 3, 4).astype(np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["scale"], ["scale32"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Conv", ["x", "w"], ["c"], "conv", pads=[1] * 4),
        helper.make_node(
            "BatchNormalization", ["c", "scale32", "shift", "mean", "variance"], ["n"], "norm", epsilon=0.01
        ),
        helper.make_node("Relu", ["c" if second_reader else "n"], ["r"], "relu"),
        helper.make_node("Add", ["n", "r"], ["y"], "add"),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size, 5, 5]) for name, size in (("x", 3), ("y", 4))
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in stored.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def answer(model, x):
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]


def test_batch_norms_go_into_their_convolution_unless_something_else_reads_it():
    x = np.random.default_rng(1).normal(size=(1, 3, 5, 5)).astype(np.float32)
    for shared in (False, True):
        source = norms(shared)
        made = prepare(source)
        operators = [node.op_type for node in made.graph.node]
        assert operators == (["Conv", "BatchNormalization", "Relu", "Add"] if shared else ["Conv", "Relu", "Add"])
        np.testing.assert_allclose(answer(made, x), answer(source, x), rtol=1e-5, atol=1e-5)


def test_a_gelu_is_left_whole_and_its_ends_are_quantized(tmp_path):
    chain = gelu_chains(prepare(read_model(write_group("cnn", tmp_path / "m.onnx").path)).graph)
    assert sorted(name.split("_")[0] for name in chain) == ["add", "div", "erf", "mul", "mul"]
    made = read_model(emitted("cnn", QuantizationRules(), tmp_path).path)
    by = {node.name: node for node in made.graph.node}
    sources = {name: node.op_type for node in made.graph.node for name in node.output}
    for name in chain:
        before = [sources.get(read, "stored") for read in by[name].input]
        assert "QuantizeLinear" not in before
        if name.startswith("div"):
            assert before == ["DequantizeLinear", "stored"]
    rounded = {
        node.name.removesuffix("_QuantizeLinear") for node in made.graph.node if node.op_type == "QuantizeLinear"
    }
    assert {name.split("_")[0] for name in chain & rounded} <= {"mul"}, "only the end of the chain is"
