"""OpenVINO, LiteRT and the race on a small residual CNN and a masked attention block: answers, kernels, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from compressor.errors import CompileError, ConfigError, RunError
from compressor.profile import Compute, HardwareProfile, Runtime
from compressor.types import Artifact, Format, TensorSpec, file_digest
from targets import registry
from targets.backends.auto import BASELINE, Auto, options_of
from targets.backends.openvino import cpu, npu
from targets.base import Missing, Ready
from targets.static_graph import DEQUANTIZE, fixed_shapes, read_static
from targets.static_session import StaticSession

SIDE, WIDTH = 12, 16
IMAGE = (TensorSpec("image", "float32", ("batch", 3, SIDE, SIDE)),)


def picture(path: Path, precision: str = "fp32") -> Artifact:
    outputs = (TensorSpec("logits", "float32", ("batch", 5)),)
    return Artifact("student/x", "student", path, Format.ONNX, precision, IMAGE, outputs, file_digest(path), 0)


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, SIDE, SIDE)).astype(np.float32)


def make_profile(target: str, **options: object) -> HardwareProfile:
    return HardwareProfile(
        name="here",
        title="Here",
        target=target,
        here="this-machine",
        compute=Compute(processor="this", architecture="x86_64"),
        runtime=Runtime(threads=1),
        options=options,
    )


def reference(path: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, inputs)[0]


def backend(name: str):
    state = registry.probe(name)
    if isinstance(state, Missing):
        pytest.skip(f"{name} is missing: {state.reason}")
    return registry.get(name)


def write_attention(path: Path) -> Path:
    """Embedding, masked single-head attention, LayerNormalization, Gelu, mean, Gemm; (batch, sequence) tokens."""
    random = np.random.default_rng(1)
    stored = {
        name: random.normal(size=shape).astype(np.float32) * 0.3
        for name, shape in {
            "table": (50, WIDTH), "q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH), "qb": (WIDTH,), "gain": (WIDTH,),
            "shift": (WIDTH,), "head": (3, WIDTH), "headb": (3,),
        }.items()
    } | {"low": np.float32(-1e4), "zero": np.float32(0), "axes": np.array([1]), "middle": np.array([1])}  # fmt: skip
    node = helper.make_node
    nodes = [
        node("Gather", ["table", "ids"], ["e"], "embed"),
        node("MatMul", ["e", "q"], ["m"], "mq"),
        node("Add", ["m", "qb"], ["qq"], "bias"),
        node("MatMul", ["e", "k"], ["kk"], "mk"),
        node("Transpose", ["kk"], ["kt"], "turn", perm=[0, 2, 1]),
        node("MatMul", ["qq", "kt"], ["s"], "scores"),
        node("Cast", ["mask"], ["keep"], "cast", to=TensorProto.BOOL),
        node("Unsqueeze", ["keep", "middle"], ["keep3"], "wide"),
        node("Where", ["keep3", "zero", "low"], ["bias3"], "where"),
        node("Add", ["s", "bias3"], ["masked"], "add"),
        node("Softmax", ["masked"], ["p"], "softmax", axis=-1),
        node("MatMul", ["p", "e"], ["c"], "context"),
        node("LayerNormalization", ["c", "gain", "shift"], ["n"], "norm", axis=-1),
        node("Gelu", ["n"], ["g"], "gelu"),
        node("Slice", ["g", "start", "stop", "axes"], ["f"], "first"),
        node("Gather", ["f", "at"], ["v"], "pick", axis=1),
        node("Gemm", ["v", "head", "headb"], ["logits"], "head_", transB=1),
    ]
    stored |= {"start": np.array([0]), "stop": np.array([1]), "at": np.array(0)}  # a scalar index drops its axis
    tokens = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"]) for name in ("ids", "mask")]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])]
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()]
    graph = helper.make_graph(nodes, "attention", tokens, outputs, initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def text(path: Path, precision: str = "fp32") -> Artifact:
    inputs = tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in ("ids", "mask"))
    outputs = (TensorSpec("logits", "float32", ("batch", 3)),)
    return Artifact("student/t", "student", path, Format.ONNX, precision, inputs, outputs, file_digest(path), 0)


def tokens(count: int, length: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(2)
    mask = np.ones((count, length), np.int64)
    mask[:, -1] = 0
    return {"ids": random.integers(0, 50, (count, length)), "mask": mask}


@pytest.mark.parametrize("name", ["openvino", "litert"])
def test_fp32_is_equal_and_int8_uses_int8_kernels(name, models, tmp_path):
    target, profile, inputs = backend(name), make_profile(name), {"image": images(5)}
    for which, precision, tolerance in (("fp32", "fp32", 1e-4), ("static", "int8-static", 0.05)):
        compiled = target.compile(picture(models[which], precision), profile, tmp_path / which)
        assert compiled.coverage.total == 4
        assert compiled.coverage.quantized == (0 if precision == "fp32" else 4)
        expected = reference(models[which], inputs)
        with target.open(compiled, profile) as session:
            found = session.run(inputs)["logits"]
            one = session.run({"image": inputs["image"][:1]})["logits"]
        np.testing.assert_allclose(found, expected, atol=tolerance * abs(expected).max())
        np.testing.assert_allclose(one, found[:1], atol=1e-5)


@pytest.mark.parametrize("name", ["openvino", "litert"])
def test_masked_attention_of_any_length(name, tmp_path):
    path = write_attention(tmp_path / "attention.onnx")
    options = {"max_sequence": 12} if name == "litert" else {}
    target, profile = backend(name), make_profile(name, **options)
    compiled = target.compile(text(path), profile, tmp_path / "out")
    with target.open(compiled, profile) as session:
        for length in (12, 7):
            inputs = tokens(3, length)
            np.testing.assert_allclose(session.run(inputs)["logits"], reference(path, inputs), atol=1e-4)


def test_litert_refuses_more_than_its_sequence(tmp_path):
    target, profile = backend("litert"), make_profile("litert", max_sequence=6)
    compiled = target.compile(text(write_attention(tmp_path / "a.onnx")), profile, tmp_path / "out")
    with target.open(compiled, profile) as session, pytest.raises(RunError, match="the compiled model takes") as caught:
        session.run(tokens(1, 7))
    assert "max_sequence" in caught.value.hint


def test_fixed_shapes_are_no_longer_than_the_recipe_s_texts(tmp_path):
    target, profile = backend("litert"), make_profile("litert", max_sequence=12)
    short = profile.model_copy(update={"runtime": profile.runtime.model_copy(update={"max_sequence": 7})})
    path, inputs = write_attention(tmp_path / "a.onnx"), tokens(2, 7)
    found = {}
    for name, chosen in (("long", profile), ("short", short)):
        compiled = target.compile(text(path), chosen, tmp_path / name)
        with target.open(compiled, chosen) as session:
            found[name] = session.run(inputs)["logits"]
            if name == "short":
                with pytest.raises(RunError, match="the compiled model takes"):
                    session.run(tokens(1, 8))
        assert target.deciding_options(compiled, chosen).get("longest") == (7 if name == "short" else None)
    np.testing.assert_allclose(found["short"], found["long"], atol=1e-5)


def test_dynamic_quantization_becomes_hybrid_products(tmp_path):
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target, profile = backend("litert"), make_profile("litert", max_sequence=9)
    fp32, int8 = write_attention(tmp_path / "a.onnx"), tmp_path / "dynamic.onnx"
    quantize_dynamic(
        fp32,
        int8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["MatMul"],
        extra_options={"MatMulConstBOnly": True},
    )
    graph = read_static(int8, fixed_shapes(text(int8).inputs, 1, 9))
    operators = [node.operator for node in graph.nodes]
    assert not {"MatMulInteger", "DynamicQuantizeLinear"} & set(operators)
    assert operators.count(DEQUANTIZE) == 3  # two matrices and the head
    compiled = target.compile(text(int8, "int8-dynamic"), profile, tmp_path / "out")
    inputs = tokens(2, 9)
    with target.open(compiled, profile) as session:
        found = session.run(inputs)["logits"]
    np.testing.assert_allclose(found, reference(fp32, inputs), atol=0.1)


def test_an_operator_without_a_form_is_named(models, tmp_path):
    target = backend("litert")
    with pytest.raises(CompileError, match="ConvInteger"):
        target.compile(picture(models["dynamic"], "int8-dynamic"), make_profile("litert"), tmp_path)


def test_options_of_a_profile_are_checked(models):
    for name in ("openvino", "litert", "executorch", "auto"):
        if name in registry.names() and isinstance(registry.probe(name), Ready):
            problems = registry.get(name).check(picture(models["fp32"]), make_profile(name, sequenze=3))
            assert "sequenze" in problems[0]
            assert "unknown key" in problems[0]


def test_static_session_cuts_fills_and_pads():
    seen = []

    def call(inputs):
        seen.append(inputs["ids"].shape)
        return {"same": inputs["ids"].astype(np.float32)}

    specs = (TensorSpec("ids", "int64", ("batch", "sequence")),)
    outputs = (TensorSpec("same", "float32", ("batch", "sequence")),)
    artifact = Artifact("a", "student", Path("x"), Format.ONNX, "fp32", specs, outputs, "", 0)
    session = StaticSession(artifact, {"ids": (2, 6)}, call)
    ids = np.arange(15).reshape(5, 3)
    np.testing.assert_array_equal(session.run({"ids": ids})["same"], ids)
    assert seen == [(2, 6)] * 3


def test_openvino_compiles_the_measured_shape_static():
    assert cpu.static_shapes(IMAGE, 1) == {"image": (1, 3, SIDE, SIDE)}
    assert cpu.static_shapes((TensorSpec("x", "float32", (4, 3)),), 1) == {}


def test_the_npu_says_which_file_of_its_compiler_is_missing(tmp_path):
    files = npu.missing_compiler(tmp_path)
    assert len(files) == 2
    for file in files:
        (tmp_path / file).touch()
    assert npu.missing_compiler(tmp_path) == ()
    state = registry.probe("openvino-npu")
    assert isinstance(state, Ready) or "npu_compiler" in state.reason or "not installed" in state.reason


def test_a_race_enters_students_everywhere_and_the_teacher_once(models):
    race, profile = Auto(), make_profile("auto", runtimes=("litert", "numpy-reference"))
    student = picture(models["fp32"])
    entrants = race.entrants(student, profile)
    assert [item.runtime for item in entrants] == [BASELINE, "litert", "numpy-reference"]
    assert len({item.name for item in entrants}) == 3
    teacher = race.entrants(Artifact(**{**vars(student), "role": "teacher"}), profile)
    assert [(item.name, item.runtime) for item in teacher] == [("student/x", BASELINE)]


def test_what_only_simulates_does_not_race(models, tmp_path):
    profile = make_profile("auto", runtimes=("numpy-reference",))
    with pytest.raises(CompileError, match="does not race"):
        Auto().compile(Auto().entrants(picture(models["fp32"]), profile)[1], profile, tmp_path)


def test_a_race_knows_its_runtimes():
    with pytest.raises(ConfigError, match="`fastest` cannot race"):
        options_of(make_profile("auto", runtimes=("fastest",)))


@pytest.mark.train
@pytest.mark.parametrize("which", ["fp32", "static", "attention", "dynamic"])
def test_the_torch_form_for_executorch_answers_like_onnx(which, models, tmp_path):
    """The module that is lowered, before lowering: the same graph, quantized operations included."""
    torch = pytest.importorskip("torch")
    from onnxruntime.quantization import quantize_dynamic

    from targets.backends.executorch.module import OnnxModule

    if which in ("fp32", "static"):
        path, inputs, specs = models[which], {"image": images(2)}, IMAGE
    else:
        path, inputs = write_attention(tmp_path / "a.onnx"), tokens(2, 9)
        specs = text(path).inputs
    expected = reference(path, inputs)
    if which == "dynamic":
        path = tmp_path / "dynamic.onnx"
        options = {"MatMulConstBOnly": True}
        quantize_dynamic(tmp_path / "a.onnx", path, op_types_to_quantize=["MatMul"], extra_options=options)
    module = OnnxModule(read_static(path, fixed_shapes(specs, 2, 9))).eval()
    with torch.no_grad():
        found = module(*(torch.from_numpy(inputs[spec.name]) for spec in specs))[0].numpy()
    assert found.shape == expected.shape
    np.testing.assert_allclose(
        found, expected, atol=(1e-4 if which in ("fp32", "attention") else 0.05) * abs(expected).max()
    )
