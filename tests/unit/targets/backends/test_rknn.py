"""rknn: what the toolkit reads, what its log says, both ways to int8, refusals by name, the runner for the board."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from compressor.errors import CompileError
from compressor.profile import load_profile
from compressor.types import Artifact, Format, Origin, TensorSpec, file_digest
from targets import registry
from targets.backends.rknn.backend import BOARD, Rknn
from targets.backends.rknn.log import read_build
from targets.backends.rknn.model import OPSET, source_opset, write_onnx
from targets.backends.rknn.options import options_of
from targets.backends.rknn.watch import circle_of
from targets.backends.rknn.worker import changes_of
from targets.base import Missing
from targets.static_graph import read_static
from tests.unit.targets.conftest import artifact, images

PROFILE = "rockchip-rk3588"
LOG = """
D RKNN: [23:57:31.935] 0    InputOperator      INT8     CPU    \\                   (1,3,96,96)     0/0/0             0    InputOperator:x
D RKNN: [23:57:31.935] 1    ConvClip           INT8     NPU    (1,3,96,96),(16)    (1,16,48,48)    2836/20736/20736  29   Conv:/f/f.0/Conv
D RKNN: [23:57:31.935] 0    InputOperator      INT8     CPU    \\                   (1,3,96,96)     0/0/0             0    InputOperator:x
D RKNN: [23:57:31.935] 1    ConvClip           INT8     NPU    (1,3,96,96),(16)    (1,16,48,48)    2836/20736/20736  29   Conv:/f/f.0/Conv
D RKNN: [23:57:31.935] 2    exNorm             FLOAT16  NPU    (1,16,48,48),(16)   (1,16,48,48)    0/0/0             36   exNorm:/norm
D RKNN: [23:57:31.935] 3    Reshape            INT8     CPU    (1,10,1,1),(2)      (1,10)          0/0/0             0    Reshape:out_rs
D RKNN: [23:57:31.935] 4    OutputOperator     INT8     CPU    (1,10)              \\               0/0/0             0    OutputOperator:out
D RKNN: [23:57:31.940] Total Internal Memory Size: 8.5KB
D RKNN: [23:57:31.940] Total Weight Memory Size: 0.375KB
"""  # noqa: E501  lines of version 2.5.0


def ready() -> Rknn:
    state = registry.probe("rknn")
    if isinstance(state, Missing):
        pytest.skip(f"rknn is missing: {state.reason}")
    return Rknn()


def test_the_last_table_of_the_log_counts():
    build = read_build(LOG)
    assert [(item.operator, item.type, item.target, item.cycles, item.name) for item in build.operations] == [
        ("ConvClip", "INT8", "NPU", 20736, "/f/f.0/Conv"),
        ("exNorm", "FLOAT16", "NPU", 0, "/norm"),
        ("Reshape", "INT8", "CPU", 0, "out_rs"),
    ]
    assert build.left == ("Reshape out_rs",)
    assert [item.operator for item in build.counted] == ["ConvClip"]
    assert build.memory_kib == {"internal": 8.5, "weight": 0.375}


def test_an_unknown_chip_is_refused_before_compiling(models):
    profile = load_profile(PROFILE)
    wrong = profile.model_copy(update={"options": {**options_of(profile).model_dump(), "chip": "rk3589"}})
    (problem,) = Rknn().check(artifact(models["fp32"], "student/fp32"), wrong)
    assert "rk3589" in problem
    assert "did you mean" in problem


def gelu_model(path: Path, opset: int = 20) -> Path:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Gelu", ["x"], ["y"], "gelu")], "g", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)
    return path


def test_what_the_toolkit_reads_is_older_and_answers_the_same(tmp_path):
    path = gelu_model(tmp_path / "new.onnx")
    assert source_opset(path) == 20
    write_onnx(read_static(path, {"x": (1, 4)}), tmp_path / "old.onnx")
    assert source_opset(tmp_path / "old.onnx") == OPSET
    x = {"x": np.float32([[-2, -0.5, 0.5, 3]])}
    new, old = (onnxruntime.InferenceSession(str(file)).run(None, x)[0] for file in (path, tmp_path / "old.onnx"))
    np.testing.assert_allclose(old, new, atol=1e-6)


def test_a_file_that_is_too_new_is_refused(tmp_path):
    with pytest.raises(CompileError, match="opset 21") as caught:
        source_opset(gelu_model(tmp_path / "m.onnx", 21))
    assert "opset 20" in caught.value.hint


def reduced(path: Path, opset: int) -> Path:
    """Mean over the last axis, as opsets before 18 say it: by an attribute."""
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", [1, 4]), ("y", [1]))
    ]
    node = helper.make_node("ReduceMean", ["x"], ["y"], "mean", axes=[1], keepdims=0)
    graph = helper.make_graph([node], "g", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9), path)
    return path


def test_an_older_file_keeps_the_opset_that_its_nodes_are_written_in(tmp_path):
    path = reduced(tmp_path / "m.onnx", 17)
    write_onnx(read_static(path, {"x": (1, 4)}), tmp_path / "n.onnx", source_opset(path))
    onnx.checker.check_model(str(tmp_path / "n.onnx"), full_check=True)
    answer = onnxruntime.InferenceSession(str(tmp_path / "n.onnx")).run(None, {"x": np.float32([[1, 2, 3, 6]])})[0]
    assert answer.tolist() == [3.0]


CIRCLE = """D     unsqueeze_to_4d_transpose: remove node = [], add node = ['rs#1', 'rs_sw']
D     swap_reshape_transpose_v2: remove node = ['rs#1', 'tp'], add node = ['tp', 'rs']
D     bypass_two_reshape: remove node = ['rs', 'rs_sw']
"""


def test_rules_that_undo_each_other_are_seen_in_the_log():
    progress = "".join(f"D     fold_constant: remove node = ['n{number}']\n" for number in range(400))
    assert circle_of(progress) is None
    assert circle_of(progress + CIRCLE * 50) is None  # not long enough to be sure
    stuck = circle_of(progress + CIRCLE * 200)
    assert stuck is not None
    assert stuck.rules == (
        "swap_reshape_transpose_v2",
        "unsqueeze_to_4d_transpose",
    )  # what only removes is not to blame
    assert "around rs, rs#1, rs_sw, tp" in stuck.said


BUILD = """
import sys, tempfile, time
from targets.backends.rknn.watch import Stuck, watched

with tempfile.TemporaryFile() as log:
    log.write(sys.stdin.buffer.read())
    log.flush()
    try:
        with watched(log.fileno(), time.monotonic()):
            while True:
                time.sleep(0.01)
    except Stuck as stuck:
        print(stuck.said)
"""


@pytest.mark.parametrize(
    ("said", "reason"), [(CIRCLE * 200, "undo each other"), ("D fuse_ops ...\n", "D fuse_ops ...")]
)
def test_a_build_that_does_not_end_is_left(said, reason):
    """In a process of its own, as in the tool chain: alarms do not go well with the threads of other runtimes."""
    call = subprocess.run([sys.executable, "-c", BUILD], input=said.encode(), capture_output=True, timeout=60)
    assert reason in call.stdout.decode()


def test_a_quantized_input_of_three_dimensions_compiles(tmp_path):
    """RKNN-Toolkit2 2.5.0 rewrites such a graph for ever: a rule is switched off, and the notes say so."""
    target = ready()
    stored = {"s": np.float32(0.03), "z": np.uint8(128), "w": np.ones((8, 8), np.int8), "ws": np.float32(0.01)}
    stored["wz"] = np.int8(0)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "d"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], "wd"),
        helper.make_node("MatMul", ["d", "wd"], ["m"], "product"),
        helper.make_node("QuantizeLinear", ["m", "s", "z"], ["mq"], "mq"),
        helper.make_node("DequantizeLinear", ["mq", "s", "z"], ["y"], "y"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 6, 8]) for name in ("x", "y")]
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    specs = tuple((TensorSpec(name, "float32", ("batch", 6, 8)),) for name in ("x", "y"))
    given = Artifact("student/int8", "student", path, Format.ONNX, "int8", *specs, file_digest(path), 0)
    compiled = target.compile(given, load_profile("rockchip-rk3566"), tmp_path / "out")
    assert compiled.notes[-1].endswith("were switched off: swap_reshape_transpose_v2")
    assert json.loads((compiled.path.parent / "request.json").read_text())["off"] == ["swap_reshape_transpose_v2"]


def test_what_level_3_changes_in_a_quantized_file_is_read_from_the_log():
    line = "D RKNN: [21:01:27.298] 4    ConvAdd    INT8     NPU    (1,22,8,8)   (1,22,8,8)   5/6/6   10  Conv:c_ConvAdd"
    log = f"W load_onnx: The QAT model is loaded, but\nD     adjust_avgpool: ['pool']\n{line}\n{line}\n"
    assert changes_of(log) == [("adjust_avgpool", "'pool'"), ("ConvAdd", "c_ConvAdd")]
    assert changes_of(log.partition("\n")[2]) == []  # a float file: nothing is rounded


def test_a_quantized_file_is_computed_as_it_says(models, tmp_path):
    """A Conv with its Add in one operation would lose the ReLU in between; level 2 keeps them apart."""
    target, profile = ready(), load_profile(PROFILE)
    compiled = target.compile(artifact(models["static"], "student/int8", precision="int8-static"), profile, tmp_path)
    assert "level of optimisation 2: the next one changes what the file computes (" in compiled.notes[-1]
    assert json.loads((compiled.path.parent / "request.json").read_text())["optimisation"] == 2


def test_rockchips_quantizer_takes_our_samples_and_the_simulator_runs_the_plan(models, tmp_path):
    target, profile = ready(), load_profile(PROFILE)
    np.savez(tmp_path / "calibration.npz", image=images(8, seed=1))
    source = tmp_path / "model.onnx"
    source.write_bytes(models["fp32"].read_bytes())
    scheme = {"engine": "target", "calibration file": "calibration.npz"}
    given = replace(artifact(source, "student/int8-by-target", precision="int8-static"), scheme=scheme)
    compiled = target.compile(given, profile, tmp_path / "out")
    assert compiled.coverage is not None
    assert compiled.coverage.total >= 4
    assert compiled.coverage.quantized == compiled.coverage.total
    assert {figure.origin for figure in compiled.estimates} == {Origin.ESTIMATED}
    time_ms, cycles = compiled.estimates[:2]
    assert (time_ms.unit, cycles.unit) == ("ms", "cycles")
    assert time_ms.value == pytest.approx(cycles.value / 1e6)  # 1 GHz
    assert "lower bound" in str(time_ms.detail["counted"])
    assert {path.name for path in compiled.source_files} == {"board.json", "run_on_board.py"}
    inputs = {"image": images(3)}
    with target.open(compiled, profile) as session:
        found = session.run(inputs)["logits"]
    expected = onnxruntime.InferenceSession(str(models["fp32"])).run(None, inputs)[0]
    assert 0 < abs(found - expected).max() < 0.05 * abs(expected).max()


def test_an_operator_without_a_kernel_is_refused_by_name(tmp_path):
    target = ready()
    nodes = [helper.make_node("Relu", ["x"], ["r"], "relu"), helper.make_node("Det", ["r"], ["y"], "the_det")]
    ends = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 4, 4]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3]),
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:])
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    specs = (TensorSpec("x", "float32", ("batch", 3, 4, 4)),), (TensorSpec("y", "float32", ("batch", 3)),)
    given = Artifact("student/fp32", "student", path, Format.ONNX, "fp32", *specs, file_digest(path), 0)
    with pytest.raises(CompileError, match=r"Det \(`the_det`\)"):
        target.compile(given, load_profile(PROFILE), tmp_path / "out")


STAND_IN = """
import onnxruntime
class RKNNLite:
    NPU_CORE_0_1 = 3
    def load_rknn(self, path):
        self.session = onnxruntime.InferenceSession(path)
        return 0
    def init_runtime(self, core_mask=0):
        assert core_mask == 3
        return 0
    def inference(self, inputs, data_format):
        assert data_format == ["nchw"]
        return self.session.run(None, {"image": inputs[0]})
"""


def test_the_runner_for_the_board_repeats_stored_answers(models, tmp_path):
    """rknn-toolkit-lite2 exists for Arm only: its place takes ONNX Runtime behind the same four calls."""
    device = tmp_path / "package" / "device"
    device.mkdir(parents=True)
    (device / "model.rknn").write_bytes(models["fp32"].read_bytes())
    (device / "run.py").write_text(BOARD.read_text())
    item = {"name": "image", "dtype": "float32", "shape": [1, 3, 12, 12]}
    (device / "board.json").write_text(json.dumps({"cores": "0_1", "inputs": [item], "outputs": ["logits"]}))
    x = images(1)
    answer = onnxruntime.InferenceSession(str(models["fp32"])).run(None, {"image": x})[0]
    np.savez(
        device.parent / "samples.npz",
        **{"0.input.image": x, "0.output.logits": answer, "1.input.image": x, "1.output.logits": -answer},
    )
    (tmp_path / "rknnlite").mkdir()
    (tmp_path / "rknnlite" / "api.py").write_text(STAND_IN)
    done = subprocess.run(
        [sys.executable, str(device / "run.py"), "--self-check"],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr  # one answer was falsified
    assert done.stdout.startswith("1 of 2 stored answers agree; worst difference 2 of")
