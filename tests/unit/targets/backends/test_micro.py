"""ethos-u and tflite-micro: the int8 file without float tensors, Vela's settings and estimates, the board's limits."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from compressor.errors import CompileError, RunError
from compressor.profile import HardwareProfile, load_profile
from compressor.types import Artifact, Format, Origin, TensorSpec, file_digest
from targets import registry
from targets.backends.ethos_u.compiler import read_summary
from targets.backends.ethos_u.options import configuration
from targets.backends.tflite_micro.sources import RESOLVER, unresolved, write_sources
from targets.base import Missing, OverLimit, Ready
from targets.gate import misses_of
from targets.outcome import Promise, Row, State
from targets.site import find_site
from targets.tflite.export import export_int8, float_operations
from targets.tflite.interface import Port, operators, read_interface
from targets.tflite.reference import ReferenceCall

pytest.importorskip("ai_edge_litert")
SIDE = 12


class Pictures(CalibrationDataReader):
    def __init__(self) -> None:
        self.left = iter(images(16))

    def get_next(self):
        one = next(self.left, None)
        return None if one is None else {"image": one[None]}


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, SIDE, SIDE)).astype(np.float32)


def write_cnn(path: Path) -> None:
    random = np.random.default_rng(7)
    shapes = {"a": (8, 3, 3, 3), "ab": (8,), "b": (16, 8, 3, 3), "bb": (16,), "c": (5, 16), "cb": (5,)}
    stored = {name: random.normal(size=shape) * 0.3 for name, shape in shapes.items()}
    node = helper.make_node
    nodes = [
        node("Conv", ["image", "a", "ab"], ["u"], "first", pads=[1] * 4),
        node("Relu", ["u"], ["ur"], "r1"),
        node("MaxPool", ["ur"], ["p"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["p", "b", "bb"], ["v"], "second", pads=[1] * 4),
        node("Relu", ["v"], ["vr"], "r2"),
        node("GlobalAveragePool", ["vr"], ["m"], "mean"),
        node("Flatten", ["m"], ["f"], "flat"),
        node("Gemm", ["f", "c", "cb"], ["logits"], "head", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "cnn",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 5])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in stored.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("micro")
    write_cnn(folder / "fp32.onnx")
    quantize_static(
        folder / "fp32.onnx",
        folder / "int8-static.onnx",
        Pictures(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )
    return {name: artifact(folder / f"{name}.onnx", name) for name in ("fp32", "int8-static")}


def artifact(path: Path, precision: str) -> Artifact:
    inputs = (TensorSpec("image", "float32", ("batch", 3, SIDE, SIDE)),)
    outputs = (TensorSpec("logits", "float32", ("batch", 5)),)
    name = f"student/{precision}"
    return Artifact(name, "student", path, Format.ONNX, precision, inputs, outputs, file_digest(path), 0)


def reference(path: Path, inputs: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"image": inputs})[0]


def backend(name: str):
    state = registry.probe(name)
    if isinstance(state, Missing):
        pytest.skip(f"{name} is missing: {state.reason}")
    return registry.get(name)


def changed(name: str, **options: object) -> HardwareProfile:
    profile = load_profile(name)
    return profile.model_copy(update={"options": {**profile.options, **options}})


def test_the_int8_file_has_no_float_tensor_and_is_channels_last(files, tmp_path):
    path, converted = export_int8(files["int8-static"], tmp_path, batch=1, sequence=1)
    assert float_operations(converted) == ()
    names = [operation.operator for operation in converted.operations]
    assert "TRANSPOSE" not in names
    assert "QUANTIZE" not in names
    interface = read_interface(path)
    assert [(port.name, port.shape, port.dtype) for port in interface.inputs] == [("image", (1, SIDE, SIDE, 3), "int8")]
    assert [(port.name, port.shape, port.dtype) for port in interface.outputs] == [("logits", (1, 5), "int8")]
    assert [operator for operator, _ in operators(path)] == names


def test_a_float_file_keeps_its_float_interface(files, tmp_path):
    path, converted = export_int8(files["fp32"], tmp_path, batch=1, sequence=1)
    assert len(float_operations(converted)) == len(converted.operations)
    found = ReferenceCall(path)({"image": images(1)})["logits"]
    np.testing.assert_allclose(found, reference(files["fp32"].path, images(1)), atol=1e-5)


def test_ports_round_as_quantize_linear_does():
    port = Port("x", (1, 4), "int8", 0.5, 3)
    given = np.array([[0.25, 0.75, -1e3, 1e3]], np.float32)
    np.testing.assert_array_equal(port.encode(given), [[3, 5, -128, 127]])  # 0.5 and 1.5 go to the even neighbour
    np.testing.assert_array_equal(port.decode(port.encode(given)), [[0, 1, -65.5, 62]])
    picture = np.arange(12, dtype=np.float32).reshape(1, 3, 2, 2)
    assert Port("p", (1, 2, 2, 3), "int8", 1.0).encode(picture).shape == (1, 2, 2, 3)


def test_reference_kernels_agree_with_onnx_runtime_to_two_steps(files, tmp_path):
    path, _ = export_int8(files["int8-static"], tmp_path, batch=1, sequence=1)
    call, inputs = ReferenceCall(path), images(20, seed=1)
    found = np.concatenate([call({"image": one[None]})["logits"] for one in inputs])
    step = read_interface(path).outputs[0].scale
    steps = np.rint((found - reference(files["int8-static"].path, inputs)) / step)
    assert abs(steps).max() <= 2  # TFLite multiplies in fixed point, ONNX Runtime in float: roundings add up
    assert (abs(steps) <= 1).mean() > 0.95


def test_velas_settings_are_the_profiles():
    text = configuration(load_profile("ethos-u65-256"))
    assert "[System_Config.ethos_u65_256]\ncore_clock=500000000\naxi0_port=Sram\naxi1_port=Dram\n" in text
    assert "Dram_clock_scale=0.46875\n" in text
    assert text.endswith(
        "[Memory_Mode.ethos_u65_256]\nconst_mem_area=Axi1\narena_mem_area=Axi1\ncache_mem_area=Axi0\n"
        "arena_cache_size=393216\n"
    )


def test_a_summary_without_an_estimate_is_an_error(tmp_path):
    (tmp_path / "x.csv").write_text("experiment,network\ndefault,x\n")
    for path in (tmp_path / "x.csv", None):
        with pytest.raises(CompileError, match="estimate"):
            read_summary(path)


def test_ethos_u_places_everything_estimates_and_answers(files, tmp_path):
    target, inputs = backend("ethos-u"), images(70, seed=2)
    profile = load_profile("ethos-u55-128")
    compiled = target.compile(files["int8-static"], profile, tmp_path)
    assert compiled.path.name.endswith("_vela.tflite")
    assert compiled.fallback == ()
    assert compiled.placed == 7
    assert compiled.over == ()
    first = compiled.estimates[0]
    assert first.unit == "ms"
    assert all(figure.origin is Origin.ESTIMATED for figure in compiled.estimates)
    cycles = next(figure.value for figure in compiled.estimates if figure.detail["name"] == "all cycles")
    assert first.value == pytest.approx(cycles / 500e6 * 1e3, rel=1e-3)
    with target.open(compiled, profile) as session:
        found = session.run({"image": inputs})["logits"]
    expected = reference(files["int8-static"].path, inputs)
    assert found.shape == expected.shape
    assert abs(found - expected).max() < 0.05 * abs(expected).max()
    small = target.compile(files["int8-static"], changed("ethos-u55-128", sram_kib=0.5, flash_kib=0.5), tmp_path / "s")
    assert [item.what.split(" of ")[1].split(",")[0] for item in small.over] == ["SRAM", "flash"]


def test_answers_are_shared_by_what_decides_them(files, tmp_path):
    target = backend("ethos-u")
    made = {
        name: target.deciding_options(target.compile(files["int8-static"], profile, tmp_path / name), profile)
        for name, profile in (
            ("first", load_profile("ethos-u55-128")),
            ("second", load_profile("ethos-u65-256")),
            ("shorter", changed("ethos-u55-128", max_sequence=7)),
        )
    }
    assert made["first"] == made["second"] != made["shorter"]
    assert load_profile("ethos-u55-128").options != load_profile("ethos-u65-256").options


def test_a_float_file_is_scored_but_never_ships_to_an_npu(files, tmp_path):
    target, profile = backend("ethos-u"), load_profile("ethos-u55-128")
    compiled = target.compile(files["fp32"], profile, tmp_path)
    assert compiled.placed == 0
    assert "int8 only" in compiled.over[0].what
    with target.open(compiled, profile) as session:
        found = session.run({"image": images(2)})["logits"]
    np.testing.assert_allclose(found, reference(files["fp32"].path, images(2)), atol=1e-5)


def test_a_float_file_too_large_for_the_board_is_still_the_baseline(files, tmp_path):
    target, profile = backend("tflite-micro"), changed("stm32f746g-disco", ram_kib=1, flash_kib=1)
    compiled = target.compile(files["fp32"], profile, tmp_path)
    assert compiled.over
    assert "LiteRT's optimised float kernels" in " ".join(compiled.notes)
    with target.open(compiled, profile) as session:
        found = session.run({"image": images(2)})["logits"]
    np.testing.assert_allclose(found, reference(files["fp32"].path, images(2)), atol=1e-5)


def test_the_gate_names_the_memory_that_is_missing(files):
    from compressor.types import Unavailable
    from targets.base import Compiled

    gone = Unavailable("not here")
    compiled = Compiled(
        Path("x"), files["fp32"], 1, over=(OverLimit("it needs 9.0 KiB of RAM, the board has 8", 0.125),)
    )
    row = Row(files["fp32"], State.PROXY, gone, gone, gone, gone, gone, gone, compiled=compiled)
    misses = misses_of(row, None, None, Promise(max_drop=None))
    assert [(miss.what, miss.gap) for miss in misses] == [("it needs 9.0 KiB of RAM, the board has 8", 0.125)]


def test_a_simulator_of_a_device_elsewhere_gives_simulated_figures():
    target = registry.get("ethos-u")
    site = find_site(load_profile("ethos-u55-128"), target, Ready("kernels", {}, Origin.SIMULATED))
    assert site is not None
    assert site.origin is Origin.SIMULATED
    assert "simulator" in site.no_latency


def test_tflite_micro_answers_like_the_reference_kernels(files, tmp_path):
    target, profile, inputs = backend("tflite-micro"), load_profile("stm32f746g-disco"), images(9, seed=3)
    compiled = target.compile(files["int8-static"], profile, tmp_path)
    names = {figure.detail["name"]: figure.value for figure in compiled.estimates}
    assert 0 < names["of it tensors"] < names["arena (RAM)"] < 340
    assert names["model (flash)"] == pytest.approx(compiled.path.stat().st_size / 1024)
    assert compiled.over == ()
    with target.open(compiled, profile) as session:
        found = session.run({"image": inputs})["logits"]
    call = ReferenceCall(compiled.path)
    expected = np.concatenate([call({"image": one[None]})["logits"] for one in inputs])
    step = read_interface(compiled.path).outputs[0].scale
    assert abs(found - expected).max() <= 1.01 * step
    tight = target.compile(files["int8-static"], changed("stm32f746g-disco", ram_kib=1, flash_kib=1), tmp_path / "t")
    assert [item.what.split(" of ")[1].split(",")[0] for item in tight.over] == ["RAM", "flash"]
    assert tight.source_files == ()  # no array of a model that no board of the profile holds


def test_a_model_that_the_interpreter_refuses_is_an_error_with_its_words(files, tmp_path):
    target, profile = backend("tflite-micro"), load_profile("stm32f746g-disco")
    compiled = target.compile(files["int8-static"], profile, tmp_path)
    compiled.path.write_bytes(compiled.path.read_bytes()[:200])
    with pytest.raises((RunError, CompileError)), target.open(compiled, profile):
        pass


def test_the_sources_hold_the_model_and_just_the_operators_it_uses(files, tmp_path):
    path, converted = export_int8(files["int8-static"], tmp_path, batch=1, sequence=1)
    names = [operation.operator for operation in converted.operations]
    written = write_sources(tmp_path / "src", converted.content, names, read_interface(path), 4096)
    header, data, program = (item.read_text() for item in written)
    values = bytes(
        int(word, 16) for word in data.split("{")[1].split("}")[0].replace("\n", "").split(",") if word.strip()
    )
    assert values == converted.content
    assert f"kModelSize = {len(converted.content)};" in header
    assert f"MicroMutableOpResolver<{len(set(names))}>" in program
    assert {line.split(".")[1].split("(")[0] for line in program.splitlines() if "resolver.Add" in line} == {
        RESOLVER[name] for name in names
    }
    assert unresolved(["CONV_2D", "GELU"]) == ("GELU",)
    with pytest.raises(CompileError, match="GELU"):
        write_sources(tmp_path / "src", b"", ["GELU"], read_interface(path), 16)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
def test_the_array_and_its_header_compile_and_hold_the_model(files, tmp_path):
    path, converted = export_int8(files["int8-static"], tmp_path, batch=1, sequence=1)
    names = [operation.operator for operation in converted.operations]
    folder = write_sources(tmp_path / "src", converted.content, names, read_interface(path), 4096)[0].parent
    (folder / "dump.cc").write_text(
        '#include <cstdio>\n#include "model_data.h"\n'
        "int main() { return std::fwrite(kModel, 1, kModelSize, stdout) == kModelSize ? 0 : 1; }\n"
    )
    command = ["g++", "-std=c++17", "-Wall", "-Werror", "-o", "dump", "dump.cc", "model_data.cc"]
    subprocess.run(command, cwd=folder, check=True)
    assert subprocess.run(["./dump"], cwd=folder, check=True, capture_output=True).stdout == converted.content
