"""Few-bit weights: what is packed is what ONNX Runtime's kernel computes with, and memory stays near one layer."""

import subprocess
import sys

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import StageError
from compressor.quantize.weights import dequantized, packed, quantize_weights, round_to_nearest
from tests import onnx_models


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 9), st.sampled_from([4, 8]), st.sampled_from([16, 32]), st.integers(0, 99))
def test_rounding_is_within_half_a_step(inputs, outputs, bits, block, seed):
    weight = np.random.default_rng(seed).standard_normal((inputs, outputs)).astype(np.float32)
    codes, scale, zero = round_to_nearest(weight, bits, block)
    assert codes.max() < 2**bits
    made = dequantized(codes, scale, zero, inputs)
    step = np.repeat(scale, block, axis=1)[:, :inputs].T
    assert (np.abs(made - weight) <= step * 1.001).all()
    assert np.quantile(np.abs(made - weight) / step, 0.5) <= 0.5


def test_nibbles_are_packed_low_first():
    assert packed(np.array([[1, 2, 15]], np.uint8), 4).tolist() == [[0x21, 0x0F]]
    assert packed(np.array([[1, 2]], np.uint8), 8).tolist() == [[1, 2]]


@pytest.mark.parametrize("bits", [4, 8])
def test_the_kernel_computes_with_the_same_weights(tmp_path, bits):
    b = onnx_models.Builder(2)
    b.op("MatMul", ["x", b.normal("w", 80, 24)], "y")
    model = b.model([("x", 1, ["batch", 80])], [("y", 1, ["batch", 24])])
    onnx.save(model, tmp_path / "m.onnx")
    facts = quantize_weights(tmp_path / "m.onnx", tmp_path / "q.onnx", bits=bits, block=32)
    assert [(fact.layer, fact.action, fact.after) for fact in facts] == [("y_MatMul", "quantized", f"int{bits}")]
    x = np.random.default_rng(0).standard_normal((5, 80)).astype(np.float32)
    weight = onnx.numpy_helper.to_array(model.graph.initializer[0])
    wanted = x @ dequantized(*round_to_nearest(weight, bits, 32), 80)
    got = onnx_models.run(tmp_path / "q.onnx", {"x": x})
    # the kernel may round activations to 8 bits per block for speed
    np.testing.assert_allclose(got, wanted, atol=0.02 * np.abs(wanted).max())


def test_a_transformer_shrinks_and_says_what_stays_float(tmp_path):
    path = onnx_models.transformer(tmp_path / "m.onnx", width=128)
    facts = quantize_weights(path, tmp_path / "q.onnx", bits=8, block=32)
    state = {fact.layer: fact.action for fact in facts}
    assert state["qk_MatMul"] == "left-float"
    assert sum(action == "quantized" for action in state.values()) == 6
    inputs = onnx_models.tokens(8)
    wanted, got = onnx_models.run(path, inputs), onnx_models.run(tmp_path / "q.onnx", inputs)
    assert np.abs(got - wanted).max() < 0.05 * np.abs(wanted).max()


def test_bad_blocks_are_refused(tmp_path):
    with pytest.raises(StageError, match="impossible"):
        quantize_weights(tmp_path / "m.onnx", tmp_path / "q.onnx", block=48)


def test_memory_stays_near_the_largest_layer(tmp_path):
    """96 MiB of weights in 24 layers: the peak grows by far less than the model."""
    b = onnx_models.Builder(1)
    name = "x"
    for layer in range(24):
        name = b.op("MatMul", [name, b.weight(f"w{layer}", np.zeros((1024, 1024), np.float32))], f"y{layer}")
    model = b.model([("x", 1, ["batch", 1024])], [(name, 1, ["batch", 1024])])
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=1024)
    program = (
        "import resource, sys; from pathlib import Path; import compressor.quantize.weights as w;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        f"w.quantize_weights(Path({str(tmp_path / 'm.onnx')!r}), Path({str(tmp_path / 'q.onnx')!r}));"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 48  # MiB; one layer is 4, its float and integer copies come on top
    assert (tmp_path / "q.onnx.data").stat().st_size < 96 * 2**20 / 6
