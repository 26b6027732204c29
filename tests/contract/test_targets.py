"""What every registered target must do; a new back end is tested for free."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from compressor.errors import CompileError, RunError
from compressor.profile import HardwareProfile, load_profile, profile_names
from compressor.types import Artifact, Format, TensorSpec, file_digest
from targets import registry
from targets.base import Compiled, Missing, Ready, SelfTimed, SelfWeighed, Session, TargetBackend

NAMES = registry.names()


def profile_for(target: str) -> HardwareProfile:
    """The first built-in profile of a target; profiles of this machine first."""
    found = [profile for name in profile_names() if (profile := load_profile(name)).target == target]
    if not found:
        pytest.skip(f"no built-in profile uses {target}")
    return min(found, key=lambda profile: profile.here != "this-machine")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Artifact:
    """Conv, Relu, pool, Gemm on 1x8x8 pictures."""
    random = np.random.default_rng(3)
    stored = {
        "w": random.normal(size=(8, 1, 3, 3)),
        "b": random.normal(size=8),
        "v": random.normal(size=(4, 8)),
        "c": random.normal(size=4),
    }
    nodes = [
        helper.make_node("Conv", ["image", "w", "b"], ["conv"], "conv", kernel_shape=[3, 3], pads=[1] * 4),
        helper.make_node("Relu", ["conv"], ["relu"], "relu"),
        helper.make_node("GlobalAveragePool", ["relu"], ["pool"], "pool"),
        helper.make_node("Flatten", ["pool"], ["flat"], "flat"),
        helper.make_node("Gemm", ["flat", "v", "c"], ["logits"], "head", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in stored.items()],
    )
    path = tmp_path_factory.mktemp("contract") / "small.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return Artifact(
        name="student/fp32",
        role="student",
        path=path,
        format=Format.ONNX,
        precision="fp32",
        inputs=(TensorSpec("image", "float32", ("batch", 1, 8, 8)),),
        outputs=(TensorSpec("logits", "float32", ("batch", 4)),),
        digest=file_digest(path),
        parameters=sum(value.size for value in stored.values()),
    )


def ready(name: str) -> tuple[TargetBackend, Ready]:
    state = registry.probe(name)
    if isinstance(state, Missing):
        pytest.skip(f"{name} is missing: {state.reason}")
    return registry.get(name), state


@pytest.mark.parametrize("name", NAMES)
def test_probe_never_raises_and_says_what_is_what(name):
    state = registry.probe(name)
    if isinstance(state, Missing):
        assert state.reason
        assert state.hint
        return
    assert state.device
    assert state.versions
    assert state.runs is not None or state.why_not


@pytest.mark.parametrize("name", NAMES)
def test_a_target_declares_itself(name):
    backend, _ = ready(name)
    assert backend.name == name
    assert backend.accepts
    assert backend.summary


@pytest.mark.parametrize("name", NAMES)
def test_compiles_and_answers_like_the_standard_says(name, small, tmp_path, exercised):
    backend, state = ready(name)
    profile = profile_for(name)
    digest = file_digest(small.path)
    assert backend.check(small, profile) == ()
    compiled = backend.compile(small, profile, tmp_path / "out")
    exercised.add(name)
    assert compiled.path.is_file()
    assert compiled.placed > 0 or compiled.over, "a file of which nothing runs on the device is over a limit"
    assert all(path.is_file() for path in compiled.extra_files)
    assert file_digest(small.path) == digest, "the input file is never touched"
    if state.runs is None:
        with pytest.raises(RunError), backend.open(compiled, profile):
            pass
        return
    inputs = {"image": np.random.default_rng(0).normal(size=(3, 1, 8, 8)).astype(np.float32)}
    before = inputs["image"].copy()
    with backend.open(compiled, profile) as session:
        first = session.run(inputs)
        again = session.run(inputs)
        check_of_itself(session, {"image": inputs["image"][:1]})
    expected = ReferenceEvaluator(str(small.path)).run(None, inputs)[0]
    error = backend.float_error
    np.testing.assert_allclose(first["logits"], expected, rtol=error, atol=error * abs(expected).max() / 10)
    np.testing.assert_array_equal(first["logits"], again["logits"])
    np.testing.assert_array_equal(inputs["image"], before)


def check_of_itself(session: Session, sample: dict[str, np.ndarray]) -> None:
    """A model that does not live in this process: its own times and memory."""
    if isinstance(session, SelfTimed):
        times = session.times_ns(sample, 3)
        assert len(times) == 3
        assert min(times) >= 0
    if isinstance(session, SelfWeighed):
        before, peak = session.resident_mib()
        assert 0 < before <= peak


@pytest.mark.parametrize("name", NAMES)
def test_garbage_is_a_compile_error(name, small, tmp_path):
    backend, _ = ready(name)
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"\x08\x07garbage" + bytes(range(64)))
    broken = Artifact(**{**vars(small), "path": bad, "digest": file_digest(bad)})
    with pytest.raises(CompileError):
        backend.compile(broken, profile_for(name), tmp_path / "out")


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_exist_does_not_open(name, small, tmp_path):
    backend, _ = ready(name)
    gone = Compiled(Path(tmp_path / "gone.bin"), small, placed=0)
    with pytest.raises(RunError), backend.open(gone, profile_for(name)):
        pass
