"""GPTQ, AWQ and the fit of scales: against textbook forms, against each other's loss, and as files under a limit."""

import subprocess
import sys

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import StageError
from compressor.profile import QuantizationRules
from compressor.quantize import Variant, quantize
from compressor.quantize.watch import sqnr_db, watch
from compressor.quantize.weights import Inputs, dequantized, quantize_weights, round_to_nearest
from compressor.quantize.weights.files import Store, read_tensor
from compressor.quantize.weights.fold import Folder
from compressor.quantize.weights.grid import grouped, spans
from compressor.quantize.weights.methods import awq_factor, fit_scales, inverse_factor, output_error, quantized
from compressor.quantize.weights.stream import Stream
from tests import onnx_models


def correlated(channels, seed=0, rows=400):
    """Inputs with outlier channels that move together, as behind a norm."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((rows, 6)) @ rng.standard_normal((6, channels)) + 0.2 * rng.standard_normal(channels)
    made = mixed + 0.3 * rng.standard_normal((rows, channels))
    made[:, :: channels // 4] *= 8
    return made.astype(np.float32)


def inputs_of(x):
    return Inputs(x.T @ x, np.abs(x).mean(axis=0))


def weight_of(inputs, outputs, seed=1):
    return np.random.default_rng(seed).standard_normal((inputs, outputs)).astype(np.float32)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 150), st.integers(1, 9), st.sampled_from([4, 8]), st.sampled_from([16, 32]), st.floats(0.01, 1e3))
def test_gptq_with_an_identity_hessian_rounds_to_nearest(inputs, outputs, bits, block, level):
    weight = weight_of(inputs, outputs)
    flat = Inputs((np.eye(inputs) * level).astype(np.float32), np.ones(inputs, np.float32))
    for made, wanted in zip(
        quantized(weight, flat, "gptq", bits, block), round_to_nearest(weight, bits, block), strict=True
    ):
        np.testing.assert_array_equal(made, wanted)


def test_gptq_equals_the_textbook_elimination():
    """Optimal brain quantization in a fixed order: after each weight, the inverse Hessian of what remains."""
    x, weight = correlated(40), weight_of(40, 5)
    gram = x.T @ x
    order = np.argsort(-np.diag(gram), kind="stable")
    hessian = gram.astype(np.float64) + 0.01 * np.mean(np.diag(gram)) * np.eye(40)
    scale, zero = spans(grouped(weight, 16), 4)
    rows, wanted = weight.astype(np.float64), np.zeros((40, 5))
    for place, row in enumerate(order):
        rest = order[place:]
        inverse = np.linalg.inv(hessian[np.ix_(rest, rest)])
        step, shift = scale[:, row // 16], zero[:, row // 16].astype(np.float64)
        wanted[row] = np.clip(np.round(rows[row] / step) + shift, 0, 15)
        error = (rows[row] - (wanted[row] - shift) * step) / inverse[0, 0]
        rows[rest[1:]] -= inverse[1:, :1] * error
    made = quantized(weight, inputs_of(x), "gptq", 4, 16).codes.reshape(5, -1)[:, :40].T
    assert np.mean(made != wanted) <= 0.01  # ties of float32 and float64
    assert np.abs(made - wanted).max() <= 1


def test_the_factor_is_the_inverse_hessians():
    gram = correlated(24).T @ correlated(24)
    upper, order = inverse_factor(gram)
    hessian = (gram + 0.01 * np.mean(np.diag(gram)) * np.eye(24))[np.ix_(order, order)]
    assert np.array_equal(upper, np.triu(upper))
    np.testing.assert_allclose(upper.T @ upper @ hessian, np.eye(24), atol=1e-3)


def test_a_channel_that_is_always_zero_is_rounded_to_nearest():
    x = correlated(32)
    x[:, [3, 20]] = 0
    made = quantized(weight_of(32, 4), inputs_of(x), "gptq", 4, 16).codes.reshape(4, 32)
    nearest = round_to_nearest(weight_of(32, 4), 4, 16).codes.reshape(4, 32)
    np.testing.assert_array_equal(made[:, [3, 20]], nearest[:, [3, 20]])
    nothing = Inputs(np.zeros((32, 32), np.float32), np.zeros(32, np.float32))
    np.testing.assert_array_equal(quantized(weight_of(32, 4), nothing, "gptq", 4, 16).codes.reshape(4, 32), nearest)


@pytest.mark.parametrize("bits", [4, 8])
def test_losses_on_correlated_inputs_are_ordered(bits):
    """The error of the output, in full and from H alone, is the same; no method loses more than rounding to nearest."""
    x, weight = correlated(96), weight_of(96, 20)
    known, loss = inputs_of(x), {}
    for method in ("rtn", "scale-estimation", "gptq"):
        codes = quantized(weight, known, method, bits, 32)
        loss[method] = output_error(weight, codes, known.gram)
        direct = np.sum((x.astype(np.float64) @ (weight - dequantized(*codes, 96))) ** 2)
        assert loss[method] == pytest.approx(direct, rel=2e-2)
    factor = awq_factor([weight], known, bits, 32)
    assert not np.all(factor == 1)
    awq = output_error(weight, round_to_nearest(weight * factor[:, None], bits, 32), known.gram, factor)
    assert loss["gptq"] < 0.7 * loss["rtn"]
    assert loss["scale-estimation"] < loss["rtn"]
    assert awq < loss["rtn"]


def test_fitted_scales_are_the_least_squares_ones():
    """One group: the closed form. Several: every sweep loses less."""
    x, weight = correlated(32), weight_of(32, 6)
    gram = x.T @ x
    nearest = round_to_nearest(weight, 4, 32)
    points = (nearest.codes.astype(np.float64) - nearest.zero[..., None]).reshape(6, 32)
    wanted = [(p @ gram @ weight[:, n]) / (p @ gram @ p) for n, p in enumerate(points)]
    np.testing.assert_allclose(fit_scales(weight, nearest, gram).scale[:, 0], wanted, rtol=1e-4)
    start = round_to_nearest(weight, 4, 16)
    losses = [output_error(weight, start, gram)]
    losses += [output_error(weight, fit_scales(weight, start, gram, sweeps), gram) for sweeps in (1, 2, 4)]
    assert losses == sorted(losses, reverse=True)


def llama(path, width=64, hidden=160, seed=0):
    """A block as exporters write it: RMS norm in parts, a gated unit, residuals; x (batch, n, width)."""
    b = onnx_models.Builder(seed)
    name = "x"
    for layer in range(2):
        power = b.op("Pow", [name, b.weight(f"two{layer}", np.array(2, np.float32))], f"sq{layer}")
        mean = b.op("ReduceMean", [power], f"mean{layer}", axes=[-1])
        safe = b.op("Add", [mean, b.weight(f"eps{layer}", np.array(1e-5, np.float32))], f"safe{layer}")
        unit = b.op("Div", [name, b.op("Sqrt", [safe], f"root{layer}")], f"unit{layer}")
        gain = np.abs(b.rng.standard_normal(width)).astype(np.float32) * 3
        normed = b.op("Mul", [b.weight(f"g{layer}", gain), unit], f"norm{layer}")
        gate = b.op("MatMul", [normed, b.normal(f"wg{layer}", width, hidden)], f"gate{layer}")
        silu = b.op("Mul", [gate, b.op("Sigmoid", [gate], f"sg{layer}")], f"silu{layer}")
        up = b.op("MatMul", [normed, b.normal(f"wu{layer}", width, hidden)], f"up{layer}")
        both = b.op("Mul", [silu, up], f"both{layer}")
        down = b.op("MatMul", [both, b.normal(f"wd{layer}", hidden, width)], f"down{layer}")
        name = b.op("Add", [name, down], f"res{layer}")
    onnx.save(b.model([("x", 1, ["batch", "n", width])], [(name, 1, ["batch", "n", width])]), path)
    return path


def data(count=6, width=64):
    made = correlated(width, rows=count * 10).reshape(count, 10, width)
    return lambda: iter([{"x": made[:4]}, {"x": made[4:]}])


def test_pieces_give_what_the_whole_model_gives(tmp_path):
    model = onnx.load(llama(tmp_path / "m.onnx"))
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    run = watch(model)
    (tmp_path / "work").mkdir()
    stream = Stream(model, stored.__contains__, lambda n: read_tensor(stored[n], tmp_path), data(), tmp_path / "work")
    for name in ("norm0", "both0", "norm1", "both1"):
        wanted = np.concatenate([dict(run(batch))[name].reshape(-1, stored[f"w{'g' if 'n' in name else 'd'}0"].dims[0])
                                 for batch in data()()])  # fmt: skip
        made = stream.inputs(name)
        wanted /= np.sqrt(np.mean(wanted**2, axis=1, keepdims=True))  # positions count equally
        np.testing.assert_allclose(made.gram, wanted.T @ wanted, rtol=1e-3, atol=1e-2)
        np.testing.assert_allclose(made.mean, np.abs(wanted).mean(axis=0), rtol=1e-4)
    assert len(list((tmp_path / "work").iterdir())) <= 4  # the rest was forgotten


def test_folding_a_factor_leaves_the_output_unchanged(tmp_path):
    path = llama(tmp_path / "m.onnx")
    model = onnx.load(path)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    rng = np.random.default_rng(5)
    with (tmp_path / "q.onnx.data").open("w+b") as stream:
        store = Store(stream, stored, path, tmp_path / "q.onnx")
        for name, readers in {"norm0": ("wg0", "wu0"), "both0": ("wd0",), "both1": ("wd1",)}.items():
            channels = stored[readers[0]].dims[0]
            site = Folder(model, store).site(name, len(readers), channels)
            factor = np.exp(rng.standard_normal(channels)).astype(np.float32)
            site.divide(store, factor)
            for weight in readers:
                store.change(weight, store.read(weight) * factor[:, None])
        assert Folder(model, store).site("norm0", 1, 64) is None  # another reader would see the divided tensor
        assert Folder(model, store).site("x", 1, 64) is None
        del model.graph.initializer[:]
        model.graph.initializer.extend(store.finish())
    onnx.save(model, tmp_path / "q.onnx")
    batch = next(data()())
    wanted = onnx_models.run(path, batch)
    np.testing.assert_allclose(onnx_models.run(tmp_path / "q.onnx", batch), wanted, atol=1e-5 * np.abs(wanted).max())


def unpacked(path):
    """The file with its few-bit weights written out as float MatMuls: the reference of the kernel."""
    model = onnx.load(path)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        known = {item.name: item.i for item in node.attribute}
        codes, scale, zeros = (stored[name] for name in node.input[1:])
        if known["bits"] == 4:
            codes, zeros = (np.stack([part & 15, part >> 4], axis=-1).reshape(*part.shape[:-1], -1)
                            for part in (codes, zeros))  # fmt: skip
        weight = dequantized(codes, scale, zeros[:, : scale.shape[1]], known["K"])
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(weight), f"{node.name}_w"))
        plain = onnx.helper.make_node("MatMul", [node.input[0], f"{node.name}_w"], list(node.output), name=node.name)
        node.CopyFrom(plain)
    onnx.save(model, path.with_suffix(".plain.onnx"))
    return path.with_suffix(".plain.onnx")


def float_sums(path):
    """The same file, asking the kernel for float32 sums."""
    model = onnx.load(path)
    for node in model.graph.node:
        for item in node.attribute:
            if item.name == "accuracy_level":
                item.i = 1
    onnx.save(model, path.with_suffix(".float.onnx"))
    return path.with_suffix(".float.onnx")


def test_files_of_all_methods_compute_what_their_codes_say(tmp_path):
    path = llama(tmp_path / "m.onnx")
    batch = next(data()())
    wanted, error = onnx_models.run(path, batch), {}
    for method in ("rtn", "scale-estimation", "gptq", "awq", "awq-gptq"):
        out = tmp_path / f"{method}.onnx"
        facts = quantize_weights(path, out, bits=4, block=32, method=method, calibration=data())
        assert [fact.action for fact in facts] == ["quantized"] * 6
        said, got = onnx_models.run(unpacked(out), batch), onnx_models.run(float_sums(out), batch)
        np.testing.assert_allclose(got, said, atol=1e-4 * np.abs(wanted).max())
        assert sqnr_db(said, onnx_models.run(out, batch)) > 30  # the kernel rounds activations to int8
        error[method] = float(np.sum((got - wanted) ** 2))
    assert error["gptq"] < error["rtn"]
    assert error["awq"] < error["rtn"]
    folded = [
        fact.reason for fact in quantize_weights(path, out, method="awq", calibration=data()) if "AWQ" in fact.reason
    ]
    assert len(folded) >= 4
    assert not list(tmp_path.glob("stream-*"))


def test_what_is_missing_is_said(tmp_path):
    path = llama(tmp_path / "m.onnx")
    with pytest.raises(StageError, match="needs calibration data"):
        quantize_weights(path, tmp_path / "q.onnx", method="gptq")
    with pytest.raises(StageError, match="no calibration data"):
        quantize_weights(path, tmp_path / "q.onnx", method="gptq", calibration=lambda: iter([]))
    broken = np.full((1, 2, 64), np.inf, np.float32)
    with pytest.raises(StageError, match="not finite"):
        quantize_weights(path, tmp_path / "q.onnx", method="gptq", calibration=lambda: iter([{"x": broken}]))


PROGRAM = """
import resource, sys
from pathlib import Path
import numpy as np
import onnxruntime
from compressor.quantize.weights import quantize_weights
source, out = Path(sys.argv[1]), Path(sys.argv[2])
x = np.random.default_rng(0).standard_normal((8, 256)).astype(np.float32)
np.linalg.inv(x.T @ x + np.eye(256))  # OpenBLAS takes its buffers here, once
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
limit = used + 32 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    print("the whole model fits")
except Exception as error:
    print("whole:", type(error).__name__)
facts = quantize_weights(source, out, method="gptq", calibration=lambda: iter([{"x": x}]))
print(sum(fact.action == "quantized" for fact in facts))
"""


def test_a_model_larger_than_the_limit_is_quantized(tmp_path):
    """48 MiB of weights in 24 layers under a limit on the address space of 32 MiB more than an idle process has."""
    b = onnx_models.Builder(1)
    ends = [b.weight(n, np.array([v], np.int64)) for n, v in (("from", 0), ("to", 256), ("axis", 1))]
    name, weight = "x", np.random.default_rng(0).standard_normal((256, 2048)).astype(np.float32) / 16
    for layer in range(24):
        wide = b.op("MatMul", [name, b.weight(f"w{layer}", weight)], f"y{layer}")
        name = b.op("Slice", [wide, *ends], f"x{layer}")
    model = b.model([("x", 1, ["batch", 256])], [(name, 1, ["batch", 256])])
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=1024)
    words = [sys.executable, "-c", PROGRAM, str(tmp_path / "m.onnx"), str(tmp_path / "q.onnx")]
    environment = {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "the whole model fits" not in done.stdout
    assert done.stdout.strip().endswith("24")


@pytest.fixture
def masked(tmp_path):
    return onnx_models.artifact(onnx_models.transformer(tmp_path / "m.onnx", width=128))


def few_bits(engine, method):
    given = {"operators": ("MatMul",), "bits": 4, "group": 32, "method": method}
    return Variant(f"int4-weights-{method}-{engine}", engine, "weights", **given)


ENGINES = [("onnxruntime", "gptq"), ("onnxruntime", "awq-gptq"), ("nncf", "awq"), ("nncf", "scale-estimation")]


@pytest.mark.parametrize(("engine", "method"), ENGINES)
def test_a_candidate_of_each_engine_runs_and_says_how_it_was_made(tmp_path, masked, engine, method):
    if engine == "nncf":
        pytest.importorskip("nncf")
    inputs = onnx_models.tokens(8)
    variant = few_bits(engine, method)
    made = quantize(masked, variant, QuantizationRules(), lambda: iter([inputs]), tmp_path / "q.onnx")
    assert (made.precision, made.scheme["method"], made.scheme["engine"]) == ("int4-weights", method, engine)
    state = {fact.layer: fact.action for fact in made.facts}
    assert [name for name, action in state.items() if action == "quantized"] == [
        f"{name}_MatMul" for name in ("q", "k", "v", "o1", "f1", "f2")
    ]
    assert (state["e_Gather"], state["logits_Gemm"]) == ("left-float", "left-float")
    operators = [node.op_type for node in onnx.load(made.path).graph.node]
    assert operators.count("MatMulNBits") == 6
    wanted, got = onnx_models.run(masked.path, inputs), onnx_models.run(made.path, inputs)
    assert np.abs(got - wanted).max() < 0.3 * np.abs(wanted).max()
    told = [fact.reason for fact in made.facts if fact.action == method]
    assert len(told) == (6 if engine == "onnxruntime" else 0)
    assert all("of nearest rounding's" in reason for reason in told)
