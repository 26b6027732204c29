"""What is refused before the vendor's library is asked. Nothing here needs TensorRT."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compressor.config import validate
from compressor.errors import CompileError, ConfigError
from compressor.profile import HardwareProfile, load_profile, profile_names
from compressor.types import Artifact
from targets.backends.tensorrt import TensorRt, lint, options

MakeArtifact = Callable[..., Artifact]
MakeProfile = Callable[..., HardwareProfile]


def save(
    path: Path, nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], kind: int = TensorProto.FLOAT
) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, ["batch", 8])],
        [helper.make_tensor_value_info("y", kind, ["batch", 8])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def qdq(path: Path, zero_point: np.ndarray | None) -> Path:
    third = [] if zero_point is None else ["z"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", *third], ["q"], "quantize"),
        helper.make_node("DequantizeLinear", ["q", "s", *third], ["d"], "dequantize"),
        helper.make_node("Relu", ["d"], ["y"], "relu"),
    ]
    constants = {"s": np.array(0.02, np.float32)} | ({} if zero_point is None else {"z": zero_point})
    return save(path, nodes, constants)


def check(path: Path, capability: int = 89, flavour: str = "rtx") -> str:
    return "\n".join(lint.problems(lint.load_graph(path), capability=capability, flavour=flavour))


@pytest.mark.parametrize("name", ["fp32", "all-operators", "weighted-only"])
def test_accepted_files_have_no_findings(
    name: str, models: Mapping[str, Path], make_artifact: MakeArtifact, make_profile: MakeProfile
) -> None:
    assert TensorRt().check(make_artifact(models[name]), make_profile()) == ()


@pytest.mark.parametrize(
    ("name", "node", "words"),
    [
        ("default", "b0_DequantizeLinear", "int32 input (a quantized bias)"),
        ("default", "x_QuantizeLinear", "zero point is not 0"),
        ("uint8", "x_QuantizeLinear", "uint8 is unsupported"),
        ("int16", "x_QuantizeLinear", "int16 is refused"),
        ("qoperator", "conv0_quant", "integer and dynamic quantization operators"),
        ("dynamic", "conv1_quant", "integer and dynamic quantization operators"),
        ("dynamic", "fc_MatMul_quant", "integer and dynamic quantization operators"),
    ],
)
def test_refused_files_name_the_node(
    name: str,
    node: str,
    words: str,
    models: Mapping[str, Path],
    make_artifact: MakeArtifact,
    make_profile: MakeProfile,
    tmp_path: Path,
) -> None:
    found = TensorRt().check(make_artifact(models[name]), make_profile())
    assert any(f"`{node}`" in each and words in each for each in found), found
    with pytest.raises(CompileError, match="TensorRT would refuse"):
        TensorRt().compile(make_artifact(models[name]), make_profile(), tmp_path / "never")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("zero_point", [np.array(0, np.uint8), None])
def test_uint8_that_would_silently_clip_is_refused(zero_point: np.ndarray | None, tmp_path: Path) -> None:
    assert "QuantizeLinear `quantize`: uint8 is unsupported" in check(qdq(tmp_path / "m.onnx", zero_point))


def test_int8_without_zero_is_refused_and_with_zero_accepted(tmp_path: Path) -> None:
    assert "QuantizeLinear `quantize`: zero point is not 0" in check(qdq(tmp_path / "a.onnx", np.array(3, np.int8)))
    assert check(qdq(tmp_path / "b.onnx", np.array(0, np.int8))) == ""


def test_matrix_in_fp32_is_refused_for_sm75_only(tmp_path: Path) -> None:
    weight = np.ones((8, 8), np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "product")]
    fp32 = save(tmp_path / "a.onnx", nodes, {"w": weight})
    assert "MatMul `product`: TensorRT-RTX has no fp32 matrix" in check(fp32, 75)
    assert check(fp32, 80) == ""
    assert check(fp32, 75, "enterprise") == ""
    assert check(save(tmp_path / "b.onnx", nodes, {"w": weight.astype(np.float16)}, TensorProto.FLOAT16), 75) == ""


def test_types_that_the_gpu_does_not_have(tmp_path: Path) -> None:
    nodes = [helper.make_node("Cast", ["x"], ["c"], "down", to=TensorProto.BFLOAT16)]
    nodes += [helper.make_node("Cast", ["c"], ["y"], "up", to=TensorProto.FLOAT)]
    path = save(tmp_path / "m.onnx", nodes, {})
    assert "Cast `down`, `up`: bfloat16 needs compute capability 8.0, this GPU has 7.5" in check(path, 75)
    assert check(path, 80) == ""


def test_foreign_operators_and_missing_kernels(tmp_path: Path) -> None:
    foreign = helper.make_node("FusedGelu", ["x"], ["y"], "gelu", domain="com.microsoft")
    assert "domain `com.microsoft` is unknown" in check(save(tmp_path / "a.onnx", [foreign], {}))
    unique = helper.make_node("Unique", ["x"], ["y"], "distinct")
    assert "Unique `distinct`: no kernel" in check(save(tmp_path / "b.onnx", [unique], {}))


def test_names_are_shortened_but_counted(tmp_path: Path) -> None:
    names = ["x", *(f"v{index}" for index in range(6)), "y"]
    nodes = [helper.make_node("Gelu", [a], [b], f"n{b}", domain="com.microsoft") for a, b in itertools.pairwise(names)]
    assert "`nv0`, `nv1`, `nv2`, `nv3` and 3 more" in check(save(tmp_path / "m.onnx", nodes, {}))


@pytest.mark.parametrize("damage", ["garbage", "truncated", "absent"])
def test_damaged_files_end_as_a_compile_error(
    damage: str, models: Mapping[str, Path], make_artifact: MakeArtifact, make_profile: MakeProfile, tmp_path: Path
) -> None:
    path = tmp_path / "broken.onnx"
    if damage == "garbage":
        path.write_bytes(np.random.default_rng(0).bytes(300))
    elif damage == "truncated":
        path.write_bytes(models["fp32"].read_bytes()[:2000])
    with pytest.raises(CompileError, match=r"could not read `broken\.onnx` as an ONNX model"):
        TensorRt().compile(make_artifact(path), make_profile(), tmp_path / "out")
    assert "could not read" in TensorRt().check(make_artifact(path), make_profile())[0]


def test_sm87_is_sent_to_the_enterprise_flavour(
    models: Mapping[str, Path], make_artifact: MakeArtifact, make_profile: MakeProfile, tmp_path: Path
) -> None:
    with pytest.raises(CompileError) as caught:
        TensorRt().compile(make_artifact(models["fp32"]), make_profile("8.7"), tmp_path)
    assert str(caught.value) == "TensorRT-RTX has no SM87; use flavour `enterprise` on the device"
    assert TensorRt().check(make_artifact(models["fp32"]), make_profile("8.7", flavour="enterprise")) == ()


@pytest.mark.parametrize(("capability", "number"), [("7.5", 75), ("8.9", 89), ("12.0", 120)])
def test_capability_as_a_number(capability: str, number: int, make_profile: MakeProfile) -> None:
    assert options.capability_number(make_profile(capability)) == number
    assert options.rtx_capability(make_profile(capability)) == f"SM{number}"


@pytest.mark.parametrize("capability", [None, "89", "8.x", "8.95", ""])
def test_capability_that_is_none(capability: str | None, make_profile: MakeProfile) -> None:
    with pytest.raises(CompileError):
        options.capability_number(make_profile(capability))


@pytest.mark.parametrize(
    ("capability", "nearest"), [("8.7", "SM86"), ("9.0", "SM89"), ("10.0", "SM89"), ("7.2", "SM75")]
)
def test_kits_are_validated_with_the_nearest_older_gpu(
    capability: str, nearest: str, make_profile: MakeProfile
) -> None:
    assert options.nearest_rtx_capability(make_profile(capability)) == nearest


def test_options_list_every_problem(make_profile: MakeProfile) -> None:
    profile = make_profile(flavor="rtx", max_batch=0, shapes={"frames": [4, 2, 8]})
    with pytest.raises(ConfigError) as caught:
        options.read_options(profile)
    text = str(caught.value)
    assert "options.flavor: unknown key; did you mean `flavour`?" in text
    assert "options.max_batch: must be at least 1" in text
    with pytest.raises(ConfigError, match="minimum <= optimum <= maximum"):
        options.read_options(make_profile(shapes={"frames": [4, 2, 8]}))


def test_ranges_come_from_the_options(make_profile: MakeProfile, make_artifact: MakeArtifact, tmp_path: Path) -> None:
    profile = make_profile(max_batch=16, max_sequence=64, shapes={"frames": 5, "sequence": [1, 8, 32]})
    ranges = options.dimension_ranges(options.read_options(profile), profile)
    assert ranges == {"batch": (1, 1, 16), "sequence": (1, 8, 32), "frames": (5, 5, 5)}
    artifact = make_artifact(tmp_path / "none.onnx", ("batch", "sequence", 7))
    assert options.input_shapes(artifact.inputs, ranges) == {"x": [[1, 1, 7], [1, 8, 7], [16, 32, 7]]}


def test_dimension_without_a_range_is_named(
    models: Mapping[str, Path], make_artifact: MakeArtifact, make_profile: MakeProfile
) -> None:
    artifact = make_artifact(models["fp32"], ("images", 3, 32, 32))
    found = TensorRt().check(artifact, make_profile())
    assert found == ("input `x`: dynamic dimension `images` (axis 0) has no range; give `options.shapes.images`",)
    assert TensorRt().check(artifact, make_profile(shapes={"images": [1, 4, 8]})) == ()


def test_profile_of_the_documentation_is_valid() -> None:
    page = Path(__file__).parents[4] / "docs" / "targets" / "tensorrt.md"
    block = page.read_text(encoding="utf-8").split("```toml\n")[1].split("```")[0]
    profile = validate(HardwareProfile, tomllib.loads(block), "docs/targets/tensorrt.md")
    assert options.read_options(profile).shapes == {"frames": (1, 8, 16)}


def test_built_in_profiles_have_valid_options() -> None:
    ours = [profile for profile in map(load_profile, profile_names()) if profile.target == "tensorrt"]
    assert ours
    for profile in ours:
        assert options.rtx_capability(profile) in options.RTX_CAPABILITIES
        options.read_options(profile)
