"""web: messages, the page's answers in a real Chromium, times from the page's clock, the packaged page's self-check."""

from __future__ import annotations

import re
import subprocess
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from compressor.errors import CompileError, RunError
from compressor.profile import load_profile
from compressor.types import Artifact, Format, TensorSpec, file_digest
from targets import registry
from targets.backends.web.server import find_browser
from targets.base import UNQUANTIZED, Missing, SelfTimed
from targets.measure import Settings, measure
from targets.messages import decode, encode
from tests.unit.targets.conftest import artifact as described

PROFILE = "this-machine-chromium"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Artifact:
    weight = numpy_helper.from_array(np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "product")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [weight],
    )
    path = tmp_path_factory.mktemp("web") / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    ends = (TensorSpec("x", "float32", ("batch", 6)),), (TensorSpec("y", "float32", ("batch", 3)),)
    return Artifact("student/fp32", "student", path, Format.ONNX, "fp32", *ends, file_digest(path), 18)


def ready():
    state = registry.probe("web")
    if isinstance(state, Missing):
        pytest.skip(f"web is missing: {state.reason}")
    return registry.get("web")


def test_a_message_survives_the_way_there_and_back():
    arrays = {"a": np.arange(6, dtype=np.int64).reshape(2, 3), "b": np.float32([[0.5]])}
    header, found = decode(encode({"ok": True, "count": 2}, arrays))
    assert header == {"ok": True, "count": 2}
    assert {name: array.dtype for name, array in found.items()} == {"a": np.int64, "b": np.float32}
    np.testing.assert_array_equal(found["a"], arrays["a"])


def test_measuring_takes_the_times_of_a_session_that_runs_elsewhere():
    class Board:
        calls = 0

        def __call__(self, index: int) -> None:
            """Slow to reach; not what is timed."""

        def times_ns(self, index: int, count: int) -> list[int]:
            Board.calls += 1
            return [9_000_000] + [2_000_000] * (count - 1)  # the first run of a turn is cold

    found = measure({"board": Board()}, "board", 1, Settings(min_rounds=8, max_rounds=8, priority="normal"))
    assert found.timings["board"].p50_ms == 2.0
    assert found.timings["board"].p99_ms == 2.0
    assert Board.calls >= 8


@pytest.mark.browser
def test_chromium_answers_like_onnx_runtime_and_times_itself(artifact, tmp_path):
    target, profile = ready(), load_profile(PROFILE)
    compiled = target.compile(artifact, profile, tmp_path)
    inputs = {"x": np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32)}
    expected = onnxruntime.InferenceSession(str(artifact.path)).run(None, inputs)[0]
    with target.open(compiled, profile) as session:
        np.testing.assert_allclose(session.run(inputs)["y"], expected, rtol=1e-5)
        assert isinstance(session, SelfTimed)
        times = session.times_ns(inputs, 5)
        assert len(times) == 5
        assert all(value >= 0 for value in times)
        with pytest.raises(RunError, match="browser"):
            session.run({"wrong": inputs["x"]})
        np.testing.assert_allclose(session.run(inputs)["y"], expected, rtol=1e-5)  # it still serves


@pytest.mark.browser
def test_coverage_is_of_the_kernels_that_ran_in_the_browser(models, tmp_path):
    """Four weighted nodes: all of them integer kernels where activations are quantized, none where nothing is."""
    target, profile = ready(), load_profile(PROFILE)
    static = target.compile(
        described(models["static"], "student/int8", precision="int8-static"), profile, tmp_path / "a"
    )
    assert (static.coverage.quantized, static.coverage.total) == (4, 4)
    plain = target.compile(described(models["fp32"], "student/fp32"), profile, tmp_path / "b")
    assert (plain.coverage.quantized, plain.coverage.total) == (0, 4)
    assert {fact.reason for fact in plain.coverage.left_float} == {UNQUANTIZED}
    assert plain.placed > 4
    broken = described(models["fp32"], "student/broken")
    wrong = replace(broken, inputs=(TensorSpec("image", "float32", ("batch", 4, 12, 12)),))
    with pytest.raises(CompileError, match="browser"):
        target.compile(wrong, profile, tmp_path / "c")


@pytest.mark.browser
def test_the_packaged_page_repeats_the_stored_answers(artifact, tmp_path):
    """The page of the package in Chromium, over a plain HTTP server: right answers pass, a wrong one fails."""
    target, profile = ready(), load_profile(PROFILE)
    compiled = target.compile(artifact, profile, tmp_path / "out")
    folder = compiled.path.parent
    inputs = np.random.default_rng(1).normal(size=(2, 6)).astype(np.float32)
    outputs = onnxruntime.InferenceSession(str(artifact.path)).run(None, {"x": inputs})[0]
    manifest = (
        '{"name": "n", "model": {"name": "m", "file": "model.onnx"}, "runtime": {"threads": 1},'
        ' "self_check": {"samples": 1, "tolerance": 1e-4}}'
    )
    (folder / "manifest.json").write_text(manifest)
    for shift, verdict in ((0.0, "self-check passed: 1 stored samples"), (1.0, "self-check FAILED: it differs by")):
        np.savez_compressed(folder / "samples.npz", **{"0.input.x": inputs, "0.output.y": outputs + np.float32(shift)})
        assert verdict in title_of(folder)


def title_of(folder: Path) -> str:
    browser = find_browser()
    assert browser is not None
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/web/index.html"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        wait = ["--virtual-time-budget=60000", "--timeout=60000", f"--user-data-dir={folder.parent / 'profile'}"]
        done = subprocess.run(
            [browser, *flags, *wait, "--dump-dom", address], capture_output=True, text=True, timeout=120, check=True
        )
        server.shutdown()
    return re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL).group(1)
