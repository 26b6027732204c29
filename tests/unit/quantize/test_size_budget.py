"""A precision for each layer under a size budget: the allocation, the 4-bit form, files on both bases."""

import itertools

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from compressor.errors import StageError
from compressor.profile import QuantizationRules
from compressor.quantize import Variant, quantize
from compressor.quantize.promise import FloatBase, IntegerBase, Prospect, TooSmall, fit_size
from compressor.quantize.promise.knapsack import UNITS, Option, allocate
from compressor.quantize.promise.noise import answers, put_first, replaced
from compressor.quantize.promise.packing import block_of, pack, written
from compressor.quantize.promise.size import compose
from compressor.quantize.promise.stored import eight_bit_weights, grams
from tests import onnx_models

CPU = QuantizationRules()
ALL = ("int4", "int8", "fp16", "fp32")
STATIC = Variant("int8-static-per-channel-ort", "onnxruntime", "static", True)
DYNAMIC = Variant("int8-dynamic-ort", "onnxruntime", "dynamic", True, ("Gather", "Gemm", "MatMul"))
WEIGHTED = Variant("int8-static-weighted-ort", "onnxruntime", "static", True, ("Gather", "Gemm", "MatMul"))


def images():
    return iter([onnx_models.images(16)])


def texts():
    return iter([onnx_models.tokens(16)])


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A convolutional net and its int8 file."""
    folder = tmp_path_factory.mktemp("picture")
    source = onnx_models.artifact(onnx_models.cnn(folder / "m.onnx"))
    return source, quantize(source, STATIC, CPU, images, folder / "eight.onnx")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A transformer whose table has most of the bytes, and its dynamic int8 file."""
    folder = tmp_path_factory.mktemp("text")
    source = onnx_models.artifact(onnx_models.transformer(folder / "m.onnx"))
    return source, quantize(source, DYNAMIC, CPU, texts, folder / "eight.onnx")


def closeness(source, inputs):
    wanted = onnx_models.run(source.path, inputs)

    def score(artifact):
        return 1 - float(np.linalg.norm(onnx_models.run(artifact.path, inputs) - wanted) / np.linalg.norm(wanted))

    return score


def brute_force(items, budget):
    best = None
    for choice in itertools.product(*(range(len(options)) for options in items)):
        taken = [options[at] for options, at in zip(items, choice, strict=True)]
        if sum(option.cost for option in taken) <= budget:
            noise = sum(option.noise for option in taken)
            best = noise if best is None else min(best, noise)
    return best


def test_the_allocation_is_that_of_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(30):
        items = []
        for _ in range(5):
            costs, noises = np.sort(rng.integers(1, 60, 4)), np.sort(rng.uniform(0, 1, 4))[::-1]
            items.append([Option(name, int(c), float(n)) for name, c, n in zip(ALL, costs, noises, strict=True)])
        budget = int(rng.integers(20, 200))
        found, wanted = allocate(items, budget), brute_force(items, budget)
        if wanted is None:
            assert found is None
            continue
        taken = [options[at] for options, at in zip(items, found, strict=True)]
        assert sum(option.cost for option in taken) <= budget
        assert sum(option.noise for option in taken) == pytest.approx(wanted, abs=1e-12)


def test_a_large_budget_is_kept_and_spent():
    rng = np.random.default_rng(1)
    items = [
        [Option("int4", 50_000 * n, 1 / n), Option("int8", 100_000 * n, 1e-2 / n), Option("fp32", 400_000 * n, 0.0)]
        for n in rng.integers(1, 40, 40)
    ]
    budget = sum(item[0].cost for item in items) + 37 * UNITS + 12345
    found = allocate(items, budget)
    left = budget - sum(options[at].cost for options, at in zip(items, found, strict=True))
    assert left >= 0
    cheapest = min(o[1].cost - o[0].cost for o, at in zip(items, found, strict=True) if at == 0)
    assert left < cheapest


@pytest.mark.parametrize(("shape", "inputs_first"), [((6, 5, 3, 3), False), ((64, 12), True), ((40, 97), False)])
@pytest.mark.parametrize(("kind", "zero"), [(np.int8, 0), (np.uint8, 120)])
def test_the_operators_in_the_file_give_what_numpy_gives(shape, inputs_first, kind, zero):
    rng = np.random.default_rng(2)
    low, high = (-127, 128) if kind == np.int8 else (0, 256)
    tensor = rng.integers(low, high, shape).astype(kind)
    packed = pack(tensor, zero, inputs_first=inputs_first)
    part = written(packed, "w", "p.")
    dims = [onnx.helper.make_tensor_value_info("w", onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind)), shape)]
    graph = onnx.helper.make_graph(list(part.node), "g", [], dims, list(part.initializer))
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    np.testing.assert_array_equal(onnx_models.run_model(model)({}), packed.values)
    assert packed.values.dtype == kind
    assert np.abs(packed.codes + 0.5).max() <= 7.5
    step = int(np.abs(packed.factor).max())
    assert np.abs(packed.values.astype(int) - tensor).max() <= 2 * step  # what is clipped loses more than half a step


def test_what_four_bits_can_hold_is_held_exactly():
    rng = np.random.default_rng(3)
    codes, factor = rng.integers(-8, 8, (4, 2, 32)), np.array([3, -5, 1, 14, -2, 9, 7, 4]).reshape(4, 2, 1)
    codes[:, :, 0] = -8  # the grid's end is taken in every group
    tensor = (codes * factor).reshape(4, 64).astype(np.int8)
    np.testing.assert_array_equal(pack(tensor, 0).values, tensor)
    assert block_of(64) == 32


def test_spread_errors_lose_less_of_the_output():
    rng = np.random.default_rng(4)
    mixed = rng.standard_normal((64, 64))
    rows = rng.standard_normal((400, 64)) @ mixed
    tensor = rng.integers(-127, 128, (10, 64)).astype(np.int8)
    lost = [
        float(np.square(rows @ (pack(tensor, 0, gram=gram).values.astype(float) - tensor).T).sum())
        for gram in (None, (rows.T @ rows).astype(np.float32))
    ]
    assert lost[1] < 0.8 * lost[0]


def test_patches_are_what_the_convolution_multiplies(picture):
    source, _ = picture
    model = FloatBase(source).eight_bits({})
    weights = {weight.layer: weight for weight in eight_bit_weights(model, {"c2_Conv"})}
    weight = weights["c2_Conv"]
    found = grams(model, [weight], lambda: iter([onnx_models.images(1)]))
    inner = onnx.ModelProto()
    inner.CopyFrom(model)
    inner.graph.output.extend(onnx.ValueInfoProto(name=name) for name in (weight.reads, "c2"))
    reads, gives = list(answers(inner, [onnx_models.images(1)])[0].values())[1:]
    assert reads.shape[1:] == (16, 8, 8)
    patches = np.lib.stride_tricks.sliding_window_view(np.pad(reads, [(0, 0), (0, 0), (1, 1), (1, 1)]), (3, 3), (2, 3))
    rows = patches.transpose(0, 2, 3, 1, 4, 5).reshape(64, 144)
    np.testing.assert_allclose(found[weight.name], rows.T @ rows, rtol=1e-4, atol=1e-4)
    assert gives.shape[1:] == (32, 8, 8)


def test_a_packed_int8_file_computes_what_the_rounded_int8_file_computes(picture):
    source, made = picture
    prospect = Prospect(IntegerBase(source, STATIC, made, CPU, images, None), ALL, images)
    choice = dict.fromkeys((weight.layer for weight in prospect.weights), "int4")
    assert set(choice) == {"c0_Conv", "c1_Conv", "c2_Conv", "logits_Gemm"}
    model, pieces = compose(prospect, choice)
    by_hand = onnx.load(made.path)
    for weight in prospect.weights:
        tensor = next(t for t in by_hand.graph.initializer if t.name == weight.name)
        by_hand = replaced(by_hand, weight.name, prospect.packed(weight, numpy_helper.to_array(tensor)).values)
    inputs = onnx_models.images(8, seed=9)
    np.testing.assert_array_equal(answers(model, [inputs])[0]["logits"], answers(by_hand, [inputs])[0]["logits"])
    codes = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT4}
    assert sum(int(np.prod(tensor.dims)) for tensor in codes.values()) == 16 * 27 + 16 * 144 + 32 * 144 + 320
    assert pieces["c2_Conv"] >= 32 * 144 / 2 + 32 * 144 / 24


def test_the_kernels_are_those_of_the_int8_file(picture, tmp_path):
    import onnxruntime

    source, made = picture
    prospect = Prospect(IntegerBase(source, STATIC, made, CPU, images, None), ALL, images)
    model, _ = compose(prospect, dict.fromkeys((weight.layer for weight in prospect.weights), "int4"))
    onnx.save(model, tmp_path / "four.onnx")
    kernels = []
    for path in (made.path, tmp_path / "four.onnx"):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(tmp_path / "run.onnx")
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        kernels.append(sorted(node.op_type for node in onnx.load(tmp_path / "run.onnx").graph.node))
    assert kernels[0] == kernels[1]
    assert kernels[0].count("QLinearConv") == 3


@pytest.mark.parametrize("share", [0.6, 0.45])
def test_the_file_keeps_the_budget_and_its_facts_add_up(picture, tmp_path, share):
    source, made = picture
    budget = int(share * source.file_bytes)
    score = closeness(source, onnx_models.images(32, seed=5))
    base = IntegerBase(source, STATIC, made, CPU, images, None)
    found = fit_size([Prospect(base, ALL, images)], score, -1.0, budget, tmp_path / "sized.onnx")
    assert found.artifact.file_bytes <= budget
    assert found.artifact.name == "student/mixed-size-ort"
    rows = [fact for fact in found.artifact.facts if fact.stage == "size"]
    assert sum(int(fact.reason.split(" bytes")[0].replace(",", "")) for fact in rows) == found.artifact.file_bytes
    assert {fact.layer: fact.after for fact in rows[:-1]} == dict(found.choice)
    assert found.score == score(found.artifact)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sized.onnx"]
    onnx.checker.check_model(onnx.load(found.artifact.path))
    four = {layer for layer, kind in found.choice.items() if kind == "int4"}
    told = {fact.layer: fact.after for fact in found.artifact.facts if fact.stage == "quantize"}
    assert {layer for layer, kind in told.items() if kind == "int4"} == four


def test_more_bytes_never_mean_more_predicted_noise(picture, tmp_path):
    source, _ = picture
    score = closeness(source, onnx_models.images(8, seed=5))
    floats, noises = Prospect(FloatBase(source), ALL, images), []
    for share in (0.35, 0.45, 0.6):
        budget = int(share * source.file_bytes)
        found = fit_size([floats], score, -1.0, budget, tmp_path / "sized.onnx")
        assert found.artifact.file_bytes <= budget
        noises.append(found.trials[-1][2])
    assert noises == sorted(noises, reverse=True)
    assert noises[-1] < noises[0]


def test_layers_stay_in_int8_kernels_unless_the_promise_needs_float(picture, tmp_path):
    source, made = picture
    score = closeness(source, onnx_models.images(32, seed=5))
    base = IntegerBase(source, STATIC, made, CPU, images, None)
    budget = int(0.5 * source.file_bytes)
    loose = fit_size([Prospect(base, ALL, images)], score, 0.0, budget, tmp_path / "loose.onnx")
    assert set(loose.choice.values()) <= {"int4", "int8"}
    both = [Prospect(base, ALL, images), Prospect(FloatBase(source), ALL, images)]
    tight = fit_size(both, score, 2.0, budget, tmp_path / "tight.onnx", trials=5)
    assert not tight.holds
    assert len(tight.trials) <= 5
    assert {name for name, *_ in tight.trials} == {"int8-static-per-channel-ort", "float32"}
    assert tight.score >= loose.score


def test_the_smallest_file_is_scored_where_the_promise_is_missed(picture, tmp_path):
    source, made = picture
    prospect = Prospect(IntegerBase(source, STATIC, made, CPU, images, None), ALL, images)

    def fewest_bytes(artifact):
        return -float(artifact.file_bytes)

    found = fit_size([prospect], fewest_bytes, 0.0, int(0.5 * source.file_bytes), tmp_path / "sized.onnx", trials=2)
    assert set(found.choice.values()) == {"int4"}
    assert len(found.trials) == 2


def test_tables_and_products_of_a_dynamic_file(text, tmp_path):
    source, made = text
    score = closeness(source, onnx_models.tokens(32, seed=8))
    base = IntegerBase(source, DYNAMIC, made, CPU, texts, None)
    budget = int(0.17 * source.file_bytes)
    found = fit_size([Prospect(base, ALL, texts)], score, -1.0, budget, tmp_path / "sized.onnx")
    assert found.artifact.file_bytes <= budget < made.file_bytes
    assert "e_Gather" in found.choice
    assert {"q_MatMul", "f2_MatMul"} <= set(found.choice)
    assert "int4" in found.choice.values()
    assert found.score > 0.5


def test_a_table_in_four_bits_gives_the_rows_that_numpy_gives(text):
    source, made = text
    prospect = Prospect(IntegerBase(source, DYNAMIC, made, CPU, texts, None), ALL, texts)
    weight = next(item for item in prospect.weights if item.layer == "e_Gather")
    choice = {item.layer: "int4" if item.layer == "e_Gather" else "int8" for item in prospect.weights}
    model, _ = compose(prospect, choice)
    by_hand = onnx.load(made.path)
    tensor = next(t for t in by_hand.graph.initializer if t.name == weight.name)
    assert weight.zero > 0  # tables are unsigned
    by_hand = replaced(by_hand, weight.name, prospect.packed(weight, numpy_helper.to_array(tensor)).values)
    inputs = onnx_models.tokens(8, seed=9)
    np.testing.assert_array_equal(answers(model, [inputs])[0]["logits"], answers(by_hand, [inputs])[0]["logits"])


def test_a_gemm_of_a_dynamic_file_goes_back_to_float16(text):
    source, made = text
    prospect = Prospect(IntegerBase(source, DYNAMIC, made, CPU, texts, None), ALL, texts)
    choice = {item.layer: "fp16" if item.layer == "logits_Gemm" else "int8" for item in prospect.weights}
    assert "fp16" in choice.values()
    model, pieces = compose(prospect, choice)
    halves = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT16]
    assert [sorted(tensor.dims) for tensor in halves] == [[4, 64]]
    assert 2 * 256 < pieces["logits_Gemm"] < 2 * 256 + 150
    inputs = onnx_models.tokens(8, seed=9)
    found, wanted = (answers(item, [inputs])[0]["logits"] for item in (model, onnx.load(source.path)))
    assert np.linalg.norm(found - wanted) < 0.2 * np.linalg.norm(wanted)


def test_pairs_of_a_static_text_file_are_found_as_well(text, tmp_path):
    source, _ = text
    made = quantize(source, WEIGHTED, CPU, texts, tmp_path / "eight.onnx")
    prospect = Prospect(IntegerBase(source, WEIGHTED, made, CPU, texts, None), ALL, texts)
    assert {"e_Gather", "q_MatMul", "logits_Gemm"} <= {weight.layer for weight in prospect.weights}
    firsts = {weight.layer: weight.inputs_first for weight in prospect.weights}
    assert firsts["q_MatMul"]
    assert not firsts["logits_Gemm"]
    assert not firsts["e_Gather"]


def test_nothing_fits_and_the_smallest_is_named(picture, tmp_path):
    source, made = picture
    base = IntegerBase(source, STATIC, made, CPU, images, None)
    both = [Prospect(base, ALL, images), Prospect(FloatBase(source), ALL, images)]
    with pytest.raises(TooSmall, match=r"the smallest file has .* MiB .* are allowed") as caught:
        fit_size(both, lambda _: 1.0, 0.0, 2000, tmp_path / "sized.onnx")
    assert 2000 < caught.value.smallest < made.file_bytes
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StageError, match="no int8 file"):
        fit_size([], lambda _: 1.0, 0.0, 2000, tmp_path / "sized.onnx")


def test_a_profile_without_four_bits_has_none(picture, tmp_path):
    source, made = picture
    base = IntegerBase(source, STATIC, made, CPU, images, None)
    coarse = Prospect(base, ("int8", "fp32"), images)
    budget = int(0.6 * source.file_bytes)
    found = fit_size([coarse], lambda _: 1.0, 0.0, budget, tmp_path / "sized.onnx")
    assert set(found.choice.values()) == {"int8"}
    with pytest.raises(TooSmall):
        fit_size([coarse], lambda _: 1.0, 0.0, made.file_bytes - 100, tmp_path / "sized.onnx")


def test_parts_stand_before_what_reads_them(picture):
    source, _ = picture
    model = onnx.load(source.path)
    first = model.graph.node[0].name
    part = onnx.GraphProto(node=[onnx.helper.make_node("Identity", ["w3"], ["again"], name="mine")])
    put_first(model, [part], {"b3"})
    assert [node.name for node in model.graph.node][:2] == ["mine", first]
    assert "b3" not in {tensor.name for tensor in model.graph.initializer}
