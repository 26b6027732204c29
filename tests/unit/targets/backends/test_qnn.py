"""qnn: what was compiled is what is simulated, what stays on the CPU is named, chips are checked by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from compressor.errors import CompileError
from compressor.profile import load_profile
from compressor.types import Artifact, Format, TensorSpec, file_digest
from targets import registry
from targets.backends.qnn.options import SOCS, options_of
from targets.base import Missing

PROFILE = "snapdragon-8-gen-3"


class Pictures(CalibrationDataReader):
    def __init__(self) -> None:
        self.left = iter(images(8))

    def get_next(self):
        one = next(self.left, None)
        return None if one is None else {"image": one[None]}


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 3, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def int8(tmp_path_factory) -> Artifact:
    folder, random = tmp_path_factory.mktemp("qnn"), np.random.default_rng(7)
    stored = {"a": random.normal(size=(8, 3, 3, 3)), "b": random.normal(size=8), "c": random.normal(size=(5, 8))}
    nodes = [
        helper.make_node("Conv", ["image", "a", "b"], ["u"], "first", pads=[1] * 4),
        helper.make_node("Relu", ["u"], ["r"], "relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["m"], "mean"),
        helper.make_node("Flatten", ["m"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", "c"], ["logits"], "head", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "cnn",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 5])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in stored.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), folder / "f.onnx")
    path = folder / "int8.onnx"
    quantize_static(
        folder / "f.onnx",
        path,
        Pictures(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    inputs = (TensorSpec("image", "float32", ("batch", 3, 8, 8)),)
    outputs = (TensorSpec("logits", "float32", ("batch", 5)),)
    return Artifact("student/int8", "student", path, Format.ONNX, "int8", inputs, outputs, file_digest(path), 0)


def ready():
    state = registry.probe("qnn")
    if isinstance(state, Missing):
        pytest.skip(f"qnn is missing: {state.reason}")
    return registry.get("qnn")


def test_an_unknown_chip_is_refused_before_compiling(int8):
    profile = load_profile(PROFILE)
    assert options_of(profile).chip == SOCS["SM8650"]
    wrong = profile.model_copy(update={"options": {**profile.options, "soc": "SM8560"}})
    problems = registry.get("qnn").check(int8, wrong)
    assert len(problems) == 1
    assert "SM8560" in problems[0]
    assert "did you mean" in problems[0]
    with pytest.raises(CompileError, match="SM8560"):
        registry.get("qnn").compile(int8, wrong, Path("unused"))


@pytest.mark.parametrize("soc", ["SM8650", "QCM6490"])
def test_the_compiled_context_answers_like_the_int8_file(int8, tmp_path, soc):
    target, profile, inputs = ready(), load_profile(PROFILE), images(5)
    profile = profile.model_copy(update={"options": {**profile.options, "soc": soc}})
    compiled = target.compile(int8, profile, tmp_path)
    assert [path.suffix for path in compiled.extra_files] == [".bin"]
    assert compiled.coverage is not None
    assert (compiled.coverage.quantized, compiled.coverage.total) == (2, 2)
    assert all(item.split()[0] in {"QuantizeLinear", "DequantizeLinear"} for item in compiled.fallback)
    context = onnx.load(str(compiled.path))
    assert "EPContext" in {node.op_type for node in context.graph.node}
    with target.open(compiled, profile) as session:
        found = session.run({"image": inputs})["logits"]
    expected = onnxruntime.InferenceSession(str(int8.path)).run(None, {"image": inputs})[0]
    assert found.shape == expected.shape
    assert abs(found - expected).max() < 0.03 * abs(expected).max()
