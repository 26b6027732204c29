"""ONNX Runtime and the reference evaluator: parity, refusals, settings; memory of a fresh process; the registry."""

from __future__ import annotations

import importlib.metadata

import numpy as np
import onnx
import pytest
from onnx import helper

from compressor.errors import CompileError, ConfigError, RunError
from compressor.profile import load_profile
from compressor.types import Measurement, Unavailable
from targets import registry
from targets.backends.numpy_reference import NumpyReference
from targets.backends.onnxruntime_cpu import OnnxRuntimeCpu, open_session
from targets.base import Compiled, Missing
from targets.memory import peak_memory
from tests.unit.targets.conftest import artifact, images, write_cnn


def answers(backend, item, inputs, out, profile="numpy-reference"):
    settings = load_profile(profile)
    compiled = backend.compile(item, settings, out)
    with backend.open(compiled, settings) as session:
        return session.run({"image": inputs})["logits"]


@pytest.mark.parametrize("name", ["fp32", "static", "dynamic", "weights"])
def test_both_back_ends_give_the_same_answers(models, name, tmp_path):
    item, inputs = artifact(models[name], name), images(6)
    reference = answers(NumpyReference(), item, inputs, tmp_path / "numpy")
    runtime = answers(OnnxRuntimeCpu(), item, inputs, tmp_path / "ort", "this-machine")
    step = np.abs(reference).max() / 256  # one int8 step where rounding falls on the other side
    assert np.abs(reference - runtime).max() <= (1e-4 if name in {"fp32", "weights"} else 2 * step)


@pytest.mark.parametrize("form", ["none", "tanh"])
def test_reference_knows_gelu(form, tmp_path):
    value = helper.make_tensor_value_info
    node = helper.make_node("Gelu", ["image"], ["logits"], "gelu", approximate=form)
    graph = helper.make_graph([node], "g", [value("image", 1, ["n", 9])], [value("logits", 1, ["n", 9])])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), tmp_path / "m.onnx")
    inputs = np.linspace(-6, 6, 36, dtype=np.float32).reshape(4, 9)
    item = artifact(tmp_path / "m.onnx", "gelu")
    reference = answers(NumpyReference(), item, inputs, tmp_path / "numpy")
    np.testing.assert_allclose(
        reference, answers(OnnxRuntimeCpu(), item, inputs, tmp_path / "ort", "this-machine"), atol=1e-6
    )


def test_reference_names_the_node_it_does_not_know(tmp_path):
    node = helper.make_node("FusedGelu", ["x"], ["y"], "block/gelu", domain="com.example")
    value = helper.make_tensor_value_info
    graph = helper.make_graph([node], "g", [value("x", 1, ["n", 2])], [value("y", 1, ["n", 2])])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.example", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "m.onnx")
    item = artifact(tmp_path / "m.onnx", "odd")
    with pytest.raises(
        CompileError, match=r"node `block/gelu`: no reference implementation of com\.example\.FusedGelu"
    ):
        NumpyReference().compile(item, load_profile("numpy-reference"), tmp_path / "out")


def test_reference_refuses_graphs_beyond_the_node_limit(models, tmp_path):
    profile = load_profile("numpy-reference").model_copy(update={"options": {"node_limit": 3}})
    with pytest.raises(CompileError, match="the reference evaluator takes 3"):
        NumpyReference().compile(artifact(models["fp32"], "m"), profile, tmp_path)


def test_runtime_errors_are_ours(models, tmp_path):
    profile = load_profile("this-machine")
    backend = OnnxRuntimeCpu()
    compiled = backend.compile(artifact(models["fp32"], "m"), profile, tmp_path)
    with backend.open(compiled, profile) as session:
        with pytest.raises(RunError, match="could not run the model"):
            session.run({"image": np.zeros((1, 4, 12, 12), np.float32)})
        with pytest.raises(RunError):
            session.run({"wrong": images(1)})
    gone = Compiled(tmp_path / "gone.onnx", compiled.artifact, 0)
    with pytest.raises(RunError, match=r"gone\.onnx"), backend.open(gone, profile):
        pass


def test_truncated_file_is_a_compile_error(models, tmp_path):
    bad = tmp_path / "cut.onnx"
    bad.write_bytes(models["fp32"].read_bytes()[:300])
    with pytest.raises(CompileError, match="could not load `cut`"):
        OnnxRuntimeCpu().compile(artifact(bad, "cut"), load_profile("this-machine"), tmp_path / "out")


def test_weights_outside_the_folder_are_refused(models, tmp_path):
    model = onnx.load(models["fp32"])
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret.bin")
    path = tmp_path / "inner" / "m.onnx"
    path.parent.mkdir()
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CompileError, match="outside its folder"):
        OnnxRuntimeCpu().compile(artifact(path, "m"), load_profile("this-machine"), tmp_path / "out")


def test_external_weights_travel_with_the_model(models, tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(onnx.load(models["fp32"]), path, save_as_external_data=True, location="m.bin", size_threshold=0)
    compiled = OnnxRuntimeCpu().compile(artifact(path, "m"), load_profile("this-machine"), tmp_path / "out")
    assert [file.name for file in compiled.extra_files] == ["m.bin"]
    with OnnxRuntimeCpu().open(compiled, load_profile("this-machine")) as session:
        assert session.run({"image": images(1)})["logits"].shape == (1, 5)


def test_session_is_set_up_from_the_profile(models):
    profile = load_profile("this-machine-2t")
    profile = profile.model_copy(
        update={"runtime": profile.runtime.model_copy(update={"graph_level": "basic", "arena": False})}
    )
    options = open_session(models["fp32"], profile).get_session_options()
    assert options.intra_op_num_threads == 2
    assert options.inter_op_num_threads == 1
    assert options.graph_optimization_level.name == "ORT_ENABLE_BASIC"
    assert not options.enable_cpu_mem_arena
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
    assert open_session(models["fp32"], profile).get_providers() == ["CPUExecutionProvider"]


def test_peak_memory_is_of_a_process_that_did_not_inherit_ours(tmp_path):
    path = write_cnn(tmp_path / "m.onnx", width=64)
    ballast = np.ones(100_000_000, dtype=np.float64)  # 763 MiB in this process
    compiled = Compiled(path, artifact(path, "m"), 0)
    figure = peak_memory("onnxruntime-cpu", compiled, load_profile("this-machine"), [{"image": images(1)}])
    assert isinstance(figure, Measurement)
    assert figure.unit == "MiB"
    assert 10 < figure.detail["baseline"] < figure.value < 500 < ballast.nbytes / 2**20


def test_peak_memory_of_a_broken_model_is_unavailable(models, tmp_path):
    compiled = Compiled(tmp_path / "gone.onnx", artifact(models["fp32"], "m"), 0)
    figure = peak_memory("onnxruntime-cpu", compiled, load_profile("this-machine"), [{"image": images(1)}])
    assert isinstance(figure, Unavailable)
    assert "gone.onnx" in figure.reason


def test_unknown_target_suggests_a_near_one():
    with pytest.raises(ConfigError, match="did you mean `onnxruntime-cpu`"):
        registry.get("onnxruntime-cpus")


def test_a_broken_plug_in_is_missing_and_the_others_still_work(monkeypatch):
    group = registry.GROUP
    real = tuple(importlib.metadata.entry_points(group=group))
    points = (
        *real,
        importlib.metadata.EntryPoint("stranger", "no.such.module:Backend", group),
        importlib.metadata.EntryPoint("impostor", "json:JSONDecoder", group),
    )
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    found = registry.probe_all()
    assert isinstance(found["stranger"], Missing)
    assert "no.such.module" in found["stranger"].reason or "No module named" in found["stranger"].reason
    assert isinstance(found["impostor"], Missing)
    assert "not a TargetBackend" in found["impostor"].reason
    assert not isinstance(found["onnxruntime-cpu"], Missing)
