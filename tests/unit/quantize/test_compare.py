"""Two files of one model: the layer that was broken is found, through quantize-dequantize pairs and fused ReLUs."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from compressor.errors import StageError
from compressor.profile import QuantizationRules
from compressor.quantize import Variant, quantize
from compressor.quantize.compare import compare, match
from tests import onnx_models

CPU = QuantizationRules()
PER_CHANNEL = Variant("q", "onnxruntime", "static")


def batches():
    return iter([onnx_models.images(8), onnx_models.images(8, 8)])


@pytest.fixture(scope="module")
def cnn(tmp_path_factory):
    return onnx_models.artifact(onnx_models.cnn(tmp_path_factory.mktemp("cnn") / "m.onnx"))


def test_a_file_equals_itself(cnn):
    model = onnx.load(cnn.path)
    found = compare(model, model, batches)
    assert {layer.sqnr_db for layer in found.layers} == {200}
    assert (found.first_bad, found.same_class, found.unmatched, found.samples) == (None, 1.0, 0, 16)
    assert [sample.error for sample in found.worst] == [0.0] * 5


def test_the_broken_layer_is_the_first_bad_one(cnn):
    model = onnx.load(cnn.path)
    for tensor in model.graph.initializer:
        if tensor.name == "w1":
            rng = np.random.default_rng(0)
            tensor.CopyFrom(numpy_helper.from_array(rng.standard_normal((16, 16, 3, 3)).astype(np.float32), "w1"))
    found = compare(onnx.load(cnn.path), model, batches)
    assert found.first_bad is not None
    assert found.first_bad.layer == "c1_Conv"
    assert found.dearest == found.first_bad
    before = [layer for layer in found.layers if layer.tensor in ("c0", "n0", "r0")]
    assert all(layer.sqnr_db == 200 for layer in before)
    worst = found.worst[0]
    assert worst.error == max(sample.error for sample in found.worst)
    assert len(worst.first) == 10


def test_an_int8_file_is_matched_through_its_pairs(cnn, tmp_path):
    made = quantize(cnn, PER_CHANNEL, CPU, batches, tmp_path / "q.onnx")
    first, second = onnx.load(cnn.path), onnx.load(made.path)
    pairs = match(first, second)
    assert pairs["logits"].startswith("logits")
    found = compare(first, second, batches)
    assert found.first_bad is None
    assert {"c0_Conv", "c1_Conv", "c2_Conv"} & {layer.layer for layer in found.layers}
    assert all(layer.added > 0 for layer in found.layers if layer.operator == "Conv")
    assert all(20 < layer.sqnr_db < 70 for layer in found.layers), [(x.layer, x.sqnr_db) for x in found.layers]


def test_a_dynamic_transformer_is_matched_by_name(tmp_path):
    source = onnx_models.artifact(onnx_models.transformer(tmp_path / "m.onnx"))

    def data():
        return iter([onnx_models.tokens(8)])

    variant = Variant("q", "onnxruntime", "dynamic", True, ("Gather", "Gemm", "MatMul"))
    made = quantize(source, variant, CPU, data, tmp_path / "q.onnx")
    found = compare(onnx.load(source.path), onnx.load(made.path), data)
    assert {"o1_MatMul", "f1_MatMul", "f2_MatMul"} <= {layer.layer for layer in found.layers}
    assert all(layer.sqnr_db > 20 for layer in found.layers)


def test_strangers_share_no_output(cnn, tmp_path):
    b = onnx_models.Builder()
    b.op("Relu", ["image"], "other")
    model = b.model([("image", 1, ["batch", 3, 16, 16])], [("other", 1, ["batch", 3, 16, 16])])
    with pytest.raises(StageError, match="share no output"):
        compare(onnx.load(cnn.path), model, batches)


def test_the_command_prints_json_and_writes_a_page_without_torch(cnn, tmp_path):
    made = quantize(cnn, PER_CHANNEL, CPU, batches, tmp_path / "q.onnx")
    images = np.concatenate([onnx_models.images(80, seed)["image"] for seed in (1, 2)])
    np.savez(tmp_path / "d.npz", image=images)
    page = tmp_path / "d.html"
    words = ["diff", str(cnn.path), str(made.path), "--data", str(tmp_path / "d.npz"), "--samples", "8"]
    program = "import sys; from compressor.cli import main; sys.modules['torch'] = None; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *words, "--page", str(page), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["samples"] == 8
    assert "Outputs: `logits`" in told["verdict"]
    text = page.read_text()
    assert "<svg" in text
    assert "c1_Conv" in text
    assert "http" not in text.replace("http-equiv", "")
