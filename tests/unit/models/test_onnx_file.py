"""ONNX files nobody vouches for."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compressor.errors import ConfigError, PlanError
from compressor.models import ImageInput, RawInput, inspect_model, load_model
from compressor.models.onnx_file import read_onnx
from compressor.models.onnx_load import load_onnx
from compressor.models.source import Source
from compressor.recipe import DataConfig, ImagePreprocess, TeacherConfig
from compressor.types import TensorSpec, file_digest
from tests.unit.models.conftest import conv_net


def load(path: Path, **data: object):
    return load_model(TeacherConfig(model=str(path)), data=DataConfig(**data))


def test_a_good_file_is_described_and_left_alone(onnx_file: Path) -> None:
    before = file_digest(onnx_file)
    facts = read_onnx(onnx_file)
    assert facts.inputs == (TensorSpec("image", "float32", ("batch", 1, 8, 8)),)
    assert facts.outputs == (TensorSpec("logits", "float32", ("batch", 10)),)
    assert facts.parameters == 4 * 9 + 4 * 10 + 10  # the bias stands in a Constant node
    assert facts.nodes == 6
    assert facts.quantized == ()
    assert file_digest(onnx_file) == before


def test_a_picture_model_is_recognised_by_its_shapes(onnx_file: Path) -> None:
    model = load(onnx_file)
    assert (model.kind, model.task, model.module) == ("onnx", "image-classification", None)
    assert model.labels == tuple("0123456789")
    assert isinstance(model.preprocess, ImageInput)
    assert model.preprocess.settings.size == (8, 8)
    assert model.preprocess.settings.channels == 1
    assert any("no data.preprocess" in note for note in model.provenance.notes)


def test_preprocess_labels_and_task_of_the_recipe_win(onnx_file: Path) -> None:
    settings = ImagePreprocess(mean=(0.1,), std=(0.3,))
    labels = tuple("abcdefghij")
    model = load(onnx_file, preprocess=settings, labels=labels)
    assert model.preprocess.settings.mean == (0.1,)
    assert model.labels == labels
    generic = load_model(TeacherConfig(model=str(onnx_file), task="generic"), sample=np.zeros((1, 8, 8), np.float32))
    assert generic.task == "generic"
    assert isinstance(generic.preprocess, RawInput)
    with pytest.raises(PlanError, match="names 2 classes but the model has 10 outputs"):
        load(onnx_file, labels=("a", "b"))


@pytest.mark.parametrize("keep", [0, 1, 20, 200, -40])
def test_truncated_files_are_refused(onnx_file: Path, keep: int) -> None:
    data = onnx_file.read_bytes()
    onnx_file.write_bytes(data[:keep])
    with pytest.raises(ConfigError, match=r"empty|truncated|not a valid") as caught:
        load(onnx_file)
    assert caught.value.exit_code == 2


def test_random_damage_never_escapes_as_another_error(onnx_file: Path) -> None:
    data = bytearray(onnx_file.read_bytes())
    random = np.random.default_rng(3)
    for _ in range(6):
        hurt = bytearray(data)
        for place in random.integers(0, len(data), 12):
            hurt[place] = int(random.integers(256))
        onnx_file.write_bytes(hurt)
        with suppress(ConfigError, PlanError):  # a harmless change may still load
            read_onnx(onnx_file)


def test_text_that_is_not_a_model(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    path.write_text("<html>404</html>")
    with pytest.raises(ConfigError, match="not an ONNX file"):
        load(path)


def external(path: Path, location: str, *, offset: str = "0", length: str = "144") -> None:
    model = conv_net()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    "location", ["/etc/passwd", "../secret.bin", "a/../../secret.bin", "C:\\x.bin", "..\\secret.bin"]
)
def test_external_data_outside_the_folder(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(144))
    external(folder / "net.onnx", location)
    with pytest.raises(ConfigError, match="points outside the model's folder"):
        load(folder / "net.onnx")


def test_external_data_through_a_link(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(144))
    (folder / "w.bin").symlink_to(tmp_path / "secret.bin")
    external(folder / "net.onnx", "w.bin")
    with pytest.raises(ConfigError, match="points outside"):
        load(folder / "net.onnx")


def test_external_data_missing_truncated_or_malformed(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    external(path, "w.bin")
    with pytest.raises(ConfigError, match="is missing"):
        load(path)
    (tmp_path / "w.bin").write_bytes(bytes(100))
    with pytest.raises(ConfigError, match=r"truncated \(100 of 144 bytes\)"):
        load(path)
    external(path, "w.bin", offset="-4", length="100")
    with pytest.raises(ConfigError, match="negative"):
        load(path)
    external(path, "w.bin", offset="many")
    with pytest.raises(ConfigError, match="malformed"):
        load(path)


def test_external_data_beside_the_model_is_fine_and_counts(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    external(path, "w.bin")
    (tmp_path / "w.bin").write_bytes(bytes(144))
    facts = read_onnx(path)
    assert facts.file_bytes == path.stat().st_size + 144
    (tmp_path / "w.bin").write_bytes(bytes(143) + b"\1")
    assert read_onnx(path).digest != facts.digest


def test_unknown_domain_and_operator_are_named(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(conv_net(domain="acme.npu", op="FancyRelu"), path)
    with pytest.raises(PlanError, match=r"unknown operator `acme\.npu::FancyRelu`") as caught:
        load(path)
    assert "act" in str(caught.value)
    onnx.save(conv_net(op="NoSuchOperator"), path)
    with pytest.raises(PlanError, match="NoSuchOperator"):
        load(path)


def test_unnamed_axes_get_names(tmp_path: Path) -> None:
    model = conv_net()
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].ClearField("dim_param")
    path = tmp_path / "net.onnx"
    onnx.save(model, path)
    facts = read_onnx(path)
    assert facts.inputs[0].shape == ("dim0", 1, 8, 8)
    assert facts.outputs[0].shape == ("dim0", 10)


def test_weights_in_subgraphs_are_counted_and_checked(tmp_path: Path) -> None:
    branches = []
    for name in ("then", "else"):
        tensor = numpy_helper.from_array(np.ones((2, 3), np.float32))
        node = helper.make_node("Constant", [], [f"{name}_out"], value=tensor)
        output = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, [2, 3])
        branches.append(helper.make_graph([node], name, [], [output]))
    node = helper.make_node("If", ["flag"], ["y"], then_branch=branches[0], else_branch=branches[1])
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("flag", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "if.onnx"
    onnx.save(model, path)
    assert read_onnx(path).parameters == 12
    inner = model.graph.node[0].attribute[0].g.node[0].attribute[0].t
    inner.ClearField("raw_data")
    inner.data_location = TensorProto.EXTERNAL
    inner.external_data.add(key="location", value="/etc/passwd")
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ConfigError, match="outside"):
        read_onnx(path)


def test_an_input_without_a_shape_is_refused(tmp_path: Path) -> None:
    model = conv_net()
    model.graph.input[0].type.tensor_type.ClearField("shape")
    path = tmp_path / "net.onnx"
    onnx.save(model, path)
    with pytest.raises(PlanError, match="has no shape"):
        load(path)


def test_a_quantized_file_is_noted(onnx_file: Path) -> None:
    model = onnx.load(onnx_file)
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.1), "scale"))
    model.graph.initializer.append(numpy_helper.from_array(np.uint8(0), "zero"))
    model.graph.node.insert(0, helper.make_node("QuantizeLinear", ["image", "scale", "zero"], ["q"]))
    model.graph.node.insert(1, helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"]))
    model.graph.node[2].input[0] = "dq"
    onnx.save(model, onnx_file)
    assert "already quantized: QuantizeLinear" in load(onnx_file).provenance.notes


def test_inspection_lists_problems_instead_of_raising(onnx_file: Path) -> None:
    good = inspect_model(TeacherConfig(model=str(onnx_file)))
    assert (good.kind, good.task, good.parameters, good.problems) == ("onnx", "image-classification", 86, ())
    onnx_file.write_bytes(onnx_file.read_bytes()[:50])
    bad = inspect_model(TeacherConfig(model=str(onnx_file)))
    assert len(bad.problems) == 1
    assert "net.onnx" in str(bad.problems[0])


def test_loading_needs_no_training_packages(onnx_file: Path) -> None:
    code = (
        "import sys; from compressor.models import load_model, inspect_model\n"
        "from compressor.recipe import TeacherConfig\n"
        "load_model(TeacherConfig(model=sys.argv[1])); inspect_model(TeacherConfig(model=sys.argv[1]))\n"
        "heavy = {'torch', 'transformers', 'datasets', 'nncf', 'PIL', 'optimum'} & set(sys.modules)\n"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(onnx_file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_text_model_without_tokenizer_takes_raw_ids(tmp_path: Path) -> None:
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "sequence"])
    graph = helper.make_graph([helper.make_node("Cast", ["input_ids"], ["y"], to=TensorProto.FLOAT)], "g", [ids], [out])
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    model = load_onnx(Source("onnx", path, "m.onnx"), TeacherConfig())
    assert isinstance(model.preprocess, RawInput)
    assert model.task == "generic"
