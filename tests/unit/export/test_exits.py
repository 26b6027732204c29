"""Files that leave early: the exits' own answers, whatever the batch, and less work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from compressor.errors import StageError
from compressor.export.exits import EXIT, chosen, confidence, early_exit
from compressor.models.onnx_graph import subgraphs

EXITS = ["exit_0", "exit_1"]


def three_exits(width: int = 8, classes: int = 5) -> onnx.ModelProto:
    """x (batch, 8) through three layers; exits after the first two, logits after the last. All share one bias."""
    random = np.random.default_rng(0)
    nodes, weights = [], [numpy_helper.from_array(random.normal(size=classes).astype(np.float32), "bias")]
    value = "x"
    for number in range(3):
        name = EXITS[number] if number < 2 else "logits"
        inner = random.normal(size=(width, width)).astype(np.float32) / width**0.5
        weights.append(numpy_helper.from_array(inner, f"w{number}"))
        nodes.append(helper.make_node("MatMul", [value, f"w{number}"], [f"m{number}"], name=f"matmul{number}"))
        nodes.append(helper.make_node("Tanh", [f"m{number}"], [f"h{number}"], name=f"tanh{number}"))
        value = f"h{number}"
        head = random.normal(size=(width, classes)).astype(np.float32)
        weights.append(numpy_helper.from_array(head, f"head{number}"))
        nodes.append(helper.make_node("Gemm", [value, f"head{number}", "bias"], [name], name=f"gemm{number}"))
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", classes]) for n in ("logits", *EXITS)]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", width])], outputs, weights
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def run(model: onnx.ModelProto, x: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"x": x}), strict=True))


@pytest.fixture(scope="module")
def samples() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(64, 8)).astype(np.float32)


@pytest.mark.parametrize("threshold", [0.01, 0.5, 0.7, 0.9, 1.0])
def test_answers_are_the_exits_own(threshold: float, samples: np.ndarray) -> None:
    model = three_exits()
    whole = run(model, samples)
    answer, number = chosen([whole[name] for name in EXITS], whole["logits"], threshold)
    early = early_exit(model, EXITS, threshold)
    assert [value.name for value in early.graph.output] == ["logits", EXIT]
    found = run(early, samples)
    assert np.array_equal(found["logits"], answer)
    assert np.array_equal(found[EXIT], number)
    session = onnxruntime.InferenceSession(early.SerializeToString(), providers=["CPUExecutionProvider"])
    for row in range(16):  # one by one as in a batch
        logits, exit_taken = session.run(None, {"x": samples[row : row + 1]})
        assert np.allclose(logits, answer[row], atol=1e-6)
        assert exit_taken.tolist() == [number[row]]
    assert set(number) == ({0} if threshold == 0.01 else {0, 1, 2} if threshold < 1 else {2})


def test_confidence_is_softmax() -> None:
    logits = np.array([[1.0, 2.0, 3.0], [100.0, 0.0, 0.0]], np.float32)
    wanted = np.exp(3) / (np.exp(1) + np.exp(2) + np.exp(3))
    assert confidence(logits) == pytest.approx([wanted, 1.0], abs=1e-6)


def test_weights_stand_where_they_are_first_read() -> None:
    early = early_exit(three_exits(), EXITS, 0.5)
    top = {tensor.name for tensor in early.graph.initializer}
    assert {"w0", "head0", "bias"} <= top
    assert not top & {"w1", "w2", "head1", "head2"}
    branch = next(a.g for n in early.graph.node if n.op_type == "If" for a in n.attribute if a.name == "else_branch")
    assert {"w1", "head1"} <= {tensor.name for tensor in branch.initializer}
    assert any(node.op_type == "If" for node in branch.node)


def test_leaving_early_skips_the_rest(tmp_path: Path) -> None:
    """The profiler lists the kernels that ran."""
    early = early_exit(three_exits(), EXITS, 0.7)
    samples = np.random.default_rng(2).normal(size=(1024, 8)).astype(np.float32)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    ran = {}
    number = run(early, samples)[EXIT]
    for wanted in (0, 1, 2):
        options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "trace")
        session = onnxruntime.InferenceSession(early.SerializeToString(), options, providers=["CPUExecutionProvider"])
        row = int(np.flatnonzero(number == wanted)[0])
        session.run(None, {"x": samples[row : row + 1]})
        trace = Path(session.end_profiling())
        text = trace.read_text()
        ran[wanted] = text.count("_kernel_time")
        assert ("matmul1_kernel_time" in text) == (wanted > 0)
        assert ("matmul2_kernel_time" in text) == (wanted > 1)
    assert ran[0] < ran[1] < ran[2]


def test_quantized_files_leave_early_too(tmp_path: Path, samples: np.ndarray) -> None:
    from onnxruntime import quantization

    onnx.save(three_exits(), tmp_path / "in.onnx")
    quantization.quantize_dynamic(tmp_path / "in.onnx", tmp_path / "out.onnx", op_types_to_quantize=["MatMul", "Gemm"])
    model = onnx.load(tmp_path / "out.onnx")
    whole = run(model, samples[:1])
    answer, number = chosen([whole[name] for name in EXITS], whole["logits"], 0.7)
    found = run(early_exit(model, EXITS, 0.7), samples[:1])
    assert np.allclose(found["logits"], answer, atol=1e-6)
    assert np.array_equal(found[EXIT], number)


def test_pairs_stand_on_the_side_of_an_exit_that_reads_them(samples: np.ndarray) -> None:
    model = three_exits()
    model.graph.initializer.append(numpy_helper.from_array(np.array(0.01, np.float32), "scale"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(128, np.uint8), "zero"))
    nodes = list(model.graph.node)
    model.graph.ClearField("node")
    for node in nodes:
        model.graph.node.append(node)
        if node.op_type == "Tanh":
            name = node.output[0]
            model.graph.node[-1].output[0] = f"{name}_float"
            pair = [([f"{name}_float", "scale", "zero"], f"{name}_codes"), ([f"{name}_codes", "scale", "zero"], name)]
            for kind, (reads, makes) in zip(("QuantizeLinear", "DequantizeLinear"), pair, strict=True):
                model.graph.node.append(helper.make_node(kind, reads, [makes], name=f"{makes}_{kind}"))
    whole = run(model, samples)
    made = early_exit(model, EXITS, 0.7)
    assert np.allclose(run(made, samples)["logits"], chosen([whole[n] for n in EXITS], whole["logits"], 0.7)[0])
    graphs = [made.graph, *(graph for node in made.graph.node for graph in subgraphs(node))]
    graphs += [inner for graph in graphs[1:] for node in graph.node for inner in subgraphs(node)]
    for graph in graphs:
        readers = [name for node in graph.node for name in node.input]
        for node in graph.node:
            if node.op_type == "DequantizeLinear":
                assert readers.count(node.output[0]) == 1  # read here, and by nobody in another graph
    assert sum(node.op_type == "DequantizeLinear" for graph in graphs for node in graph.node) == 5


def test_what_has_no_exits_is_refused() -> None:
    with pytest.raises(StageError, match="no exits `exit_7`"):
        early_exit(three_exits(), ["exit_0", "exit_7"], 0.5)
    old = three_exits()
    old.opset_import[0].version = 13
    with pytest.raises(StageError, match="opset 18"):
        early_exit(old, EXITS, 0.5)
