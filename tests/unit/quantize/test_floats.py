"""float16, bfloat16 and float8: what overflows is found by name, what is converted agrees, what is kept is float32."""

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from compressor.errors import StageError
from compressor.models.onnx_facts import describe
from compressor.profile import QuantizationRules
from compressor.quantize import Variant, quantize, variants
from compressor.quantize.floats.convert import convert
from compressor.quantize.floats.emulate import emulated
from compressor.quantize.floats.formats import FORMATS
from compressor.quantize.floats.fp8 import rounded
from compressor.quantize.floats.overflow import KEPT, lint_floats
from compressor.quantize.prepare import prepare
from compressor.quantize.variants import FLOAT_LAYERS
from compressor.quantize.watch import outputs_of, sqnr_db
from compressor.recipe import QuantizeStage
from compressor.types import stand_in_path
from tests import onnx_models

RULES = QuantizationRules()


def variant(name):
    return Variant(name, "onnxruntime", "float", True, FLOAT_LAYERS)


def squares(path, gain=200.0):
    """MatMul, then the root of a mean of squares in parts (a norm), a division by it, another MatMul."""
    b = onnx_models.Builder(3)
    h = b.op("MatMul", ["x", b.normal("w1", 32, 32, scale=0.2)], "h")
    big = b.op("Mul", [h, b.weight("gain", np.array(gain, np.float32))], "big")
    square = b.op("Pow", [big, b.weight("two", np.array(2, np.float32))], "square")
    mean = b.op("ReduceMean", [square], "mean", axes=[-1])
    root = b.op("Sqrt", [b.op("Add", [mean, b.weight("eps", np.array(1e-12, np.float32))], "safe")], "root")
    b.op("MatMul", [b.op("Div", [big, root], "unit"), b.normal("w2", 32, 8, scale=0.2)], "y")
    onnx.save(b.model([("x", 1, ["batch", 32])], [("y", 1, ["batch", 8])]), path)
    return path


def data():
    return iter([{"x": np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32)}])


def kept(findings):
    return {item.node for item in findings if item.fix == KEPT}


def test_an_overflowing_node_is_named_with_its_value_and_kept(tmp_path):
    source = onnx_models.artifact(squares(tmp_path / "m.onnx"))
    findings = {item.node: item for item in lint_floats(prepare(onnx.load(source.path)), data, FORMATS["fp16"])}
    square = findings["square_Pow"]
    assert square.value > 65504
    assert "makes `square` of up to" in square.what
    assert "65504" in square.what
    assert set(findings) == {"square_Pow", "mean_ReduceMean", "safe_Add", "root_Sqrt"}
    made = quantize(source, variant("fp16"), RULES, data, tmp_path / "q.onnx")
    state = {fact.layer: (fact.action, fact.reason) for fact in made.facts}
    assert state["square_Pow"][0] == "kept-fp32"
    assert state["h_MatMul"] == ("converted", "")
    assert made.precision == "fp16"
    inputs = next(data())
    wanted = onnx_models.run(source.path, inputs)
    for path in (made.path, stand_in_path(made.path)):
        got = onnx_models.run(path, inputs)
        assert got.dtype == np.float32
        assert sqnr_db(wanted, got) > 55
    careless = convert(prepare(onnx.load(source.path)), FORMATS["fp16"], {})
    got = onnx_models.run_model(emulated(careless.model, careless.half, FORMATS["fp16"]))(inputs)
    assert sqnr_db(wanted, got) < 10  # what the lint is for: divided by an infinite root


def test_small_values_under_a_root_are_kept(tmp_path):
    model = prepare(onnx.load(squares(tmp_path / "m.onnx", gain=1e-4)))
    findings = {item.node: item for item in lint_floats(model, data, FORMATS["fp16"])}
    assert "as small as" in findings["root_Sqrt"].what
    assert {"root_Sqrt", "safe_Add", "mean_ReduceMean", "square_Pow"} <= set(findings)
    assert findings["safe_Add"].what == "reads the constant `eps` of 1e-12, which is 0 in fp16"
    assert not kept(lint_floats(model, data, FORMATS["bf16"]))


def test_sums_inside_a_reduction_count():
    b = onnx_models.Builder(0)
    b.op("ReduceMean", ["x"], "y", axes=[1])
    model = prepare(b.model([("x", 1, ["batch", 400])], [("y", 1, ["batch", 1])]))
    (found,) = lint_floats(model, lambda: iter([{"x": np.full((2, 400), 100, np.float32)}]), FORMATS["fp16"])
    assert (found.node, found.value) == ("y_ReduceMean", 40_000)
    assert "adds up to 4e+04 inside" in found.what
    assert not lint_floats(model, lambda: iter([{"x": np.full((2, 400), 5, np.float32)}]), FORMATS["fp16"])


def test_angles_and_integers_that_are_not_exact():
    b = onnx_models.Builder(0)
    place = b.op("Cast", ["n"], "place", to=TensorProto.FLOAT)
    b.op("Sin", [b.op("Mul", [place, b.weight("f", np.array(0.5, np.float32))], "angle")], "y")
    model = prepare(b.model([("n", TensorProto.INT64, ["batch"])], [("y", 1, ["batch"])]))
    few, many = (lambda: iter([{"n": np.arange(20)}])), (lambda: iter([{"n": np.arange(3000)}]))
    assert not lint_floats(model, few, FORMATS["fp16"])
    assert kept(lint_floats(model, many, FORMATS["fp16"])) == {"place_Cast", "angle_Mul", "y_Sin"}


@pytest.mark.parametrize("far", [-1e9, float(np.finfo(np.float32).min)])
def test_mask_constants_become_numbers_the_format_holds(tmp_path, far):
    path = onnx_models.transformer(tmp_path / "m.onnx")
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name == "far":
            tensor.CopyFrom(numpy_helper.from_array(np.array(far, np.float32), "far"))
    onnx.save(model, path)
    inputs = onnx_models.tokens(6)
    inputs["attention_mask"][0, :] = 0  # masked everywhere: the row that becomes NaN
    made = quantize(onnx_models.artifact(path), variant("fp16"), RULES, lambda: iter([inputs]), tmp_path / "q.onnx")
    (change,) = [fact for fact in made.facts if fact.action == "changed"]
    assert change.layer == "mm_Mul"
    assert "constant set to -10000" in change.reason
    assert not [fact for fact in made.facts if fact.action == "kept-fp32"]
    wanted, got = onnx_models.run(path, inputs), onnx_models.run(tmp_path / "q.onnx", inputs)
    assert sqnr_db(wanted[1:], got[1:]) > 45
    assert np.isfinite(got).all()


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_a_cnn_in_half_precision_agrees_and_halves(tmp_path, name):
    source = onnx_models.artifact(onnx_models.cnn(tmp_path / "m.onnx"))
    inputs = onnx_models.images(8)
    made = quantize(source, variant(name), RULES, lambda: iter([inputs]), tmp_path / "q.onnx")
    model = onnx.load(made.path)
    weights = {tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) > 1}
    assert weights == {FORMATS[name].tensor}
    assert (made.inputs, made.outputs) == (source.inputs, source.outputs)
    wanted, got = onnx_models.run(source.path, inputs), onnx_models.run(stand_in_path(made.path), inputs)
    assert sqnr_db(wanted, got) > {"fp16": 50, "bf16": 32}[name]
    assert (wanted.argmax(1) == got.argmax(1)).mean() >= 0.75


def test_the_emulation_rounds_what_the_file_holds_in_bfloat16():
    b = onnx_models.Builder(0)
    b.op("Mul", [b.op("Add", ["x", b.weight("c", np.array(1.001, np.float32))], "s"), "x"], "y")
    result = convert(prepare(b.model([("x", 1, ["batch"])], [("y", 1, ["batch"])])), FORMATS["bf16"], {})
    assert onnx.shape_inference.infer_shapes(result.model, check_type=True, strict_mode=True)
    run = onnx_models.run_model(emulated(result.model, result.half, FORMATS["bf16"]))
    x = np.random.default_rng(1).standard_normal(50).astype(np.float32)

    def near(array):
        return array.astype(ml_dtypes.bfloat16).astype(np.float32)

    wanted = near(near(near(x) + near(np.float32(1.001))) * near(x))
    np.testing.assert_array_equal(run({"x": x}), wanted)


def test_a_node_without_a_half_form_gets_casts_around_it():
    b = onnx_models.Builder(0)
    h = b.op("Relu", ["x"], "h")
    sizes = b.weight("scales", np.array([1, 1, 2, 2], np.float32))
    b.op("Resize", [h, "", sizes], "y", mode="nearest")
    model = prepare(b.model([("x", 1, ["batch", 1, 4, 4])], [("y", 1, ["batch", 1, 8, 8])]))
    result = convert(model, FORMATS["fp16"], {"h_Relu": "because"})
    assert result.stay == {"h_Relu": "because"}
    stored = {tensor.name: tensor.data_type for tensor in result.model.graph.initializer}
    assert stored == {"scales": TensorProto.FLOAT}  # the schema asks for float32 there
    assert [node.op_type for node in result.model.graph.node] == ["Relu", "Cast", "Resize", "Cast"]
    x = np.arange(32, dtype=np.float32).reshape(2, 1, 4, 4) / 7
    np.testing.assert_allclose(onnx_models.run_model(result.model)({"x": x}), x.repeat(2, 2).repeat(2, 3), rtol=1e-3)


def test_float8_pairs_agree_and_round_to_e4m3(tmp_path):
    values = rounded(np.array([0.0, 1.0, 1.06, 447.0, 1e4, -1e4]), np.array(1.0))
    assert values.astype(np.float32).tolist() == [0, 1, 1, 448, 448, -448]
    source = onnx_models.artifact(onnx_models.cnn(tmp_path / "m.onnx"))
    inputs = onnx_models.images(8)
    made = quantize(source, variant("fp8"), RULES, lambda: iter([inputs]), tmp_path / "q.onnx")
    stored = [tensor for tensor in onnx.load(made.path).graph.initializer if len(tensor.dims) > 1]
    assert {tensor.data_type for tensor in stored} == {TensorProto.FLOAT8E4M3FN}
    assert made.precision == "fp8"
    emulated = onnx_models.run(stand_in_path(made.path), inputs)
    assert sqnr_db(onnx_models.run(source.path, inputs), emulated) > 18


def test_the_profile_says_which_are_built(tmp_path):
    facts = describe(onnx_models.cnn(tmp_path / "m.onnx"))
    stage = QuantizeStage(kind="quantize")
    assert [v.name for v in variants(stage, RULES, facts, ("fp32", "int8"))[0] if v.kind == "float"] == []
    chosen, _ = variants(stage, QuantizationRules(int8=False), facts, ("fp32", "fp16", "fp8"))
    assert [v.name for v in chosen] == ["fp16", "fp8"]
    chosen, why = variants(QuantizeStage(kind="quantize", floats=("bf16",)), RULES, facts, ("fp32", "fp16"))
    assert not [v for v in chosen if v.kind == "float"]
    assert "does not take bf16" in why["bf16"]


def test_float8_pairs_and_their_emulation_are_the_same_numbers(tmp_path):
    """ONNX Runtime can run the pairs themselves where it fuses nothing."""
    source = onnx_models.artifact(squares(tmp_path / "m.onnx", gain=1.0))
    quantize(source, variant("fp8"), RULES, data, tmp_path / "q.onnx")
    pairs = outputs_of(onnx.load(tmp_path / "q.onnx"))(next(data()))["y"]
    twin = onnx_models.run(stand_in_path(tmp_path / "q.onnx"), next(data()))
    np.testing.assert_allclose(twin, pairs, rtol=1e-5, atol=1e-5)


def test_nothing_to_convert_is_said(tmp_path):
    big = {"x": np.full((2, 32), 3e4, np.float32)}
    b = onnx_models.Builder(0)
    b.op("MatMul", ["x", b.normal("w", 32, 4)], "y")
    onnx.save(b.model([("x", 1, ["batch", 32])], [("y", 1, ["batch", 4])]), tmp_path / "m.onnx")
    source = onnx_models.artifact(tmp_path / "m.onnx")
    with pytest.raises(StageError, match="no layer can become fp16: reads `x` of up to"):
        quantize(source, variant("fp16"), RULES, lambda: iter([big]), tmp_path / "q.onnx")
