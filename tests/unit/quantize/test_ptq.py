"""Quantized files: kernels, scales, accuracy, an untouched source."""

import importlib.util
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from compressor.errors import StageError
from compressor.export.facts import describe
from compressor.export.optimise import optimise
from compressor.profile import QuantizationRules
from compressor.quantize import Variant, quantize, variants
from compressor.quantize.ptq import cosine
from compressor.recipe import QuantizeStage
from compressor.types import file_digest
from tests import onnx_models

STAGE = QuantizeStage(kind="quantize")
CPU = QuantizationRules()
TENSORRT = QuantizationRules(
    activation="int8", symmetric_activation=True, quantize_bias=False, weighted_only=True, dynamic=False
)
PER_CHANNEL = Variant("int8-static-per-channel-ort", "onnxruntime", "static")
DYNAMIC = Variant("int8-dynamic-ort", "onnxruntime", "dynamic", True, ("Gather", "Gemm", "MatMul"))
has_nncf = pytest.mark.skipif(not importlib.util.find_spec("nncf"), reason="nncf is not installed")


@pytest.fixture(scope="module")
def cnn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cnn")
    optimise(onnx_models.cnn(folder / "raw.onnx"), folder / "m.onnx")
    return onnx_models.artifact(folder / "m.onnx")


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    return onnx_models.artifact(onnx_models.transformer(tmp_path_factory.mktemp("bert") / "m.onnx"))


def images():
    return iter([onnx_models.images(12), onnx_models.images(12, 8)])


def tokens():
    return iter([onnx_models.tokens(8), onnx_models.tokens(8, seed=9)])


def runtime_operators(path, folder):
    """Operators of the graph that ONNX Runtime really runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "runtime.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "runtime.onnx").graph.node)


def close(path, source, inputs):
    return cosine({"y": onnx_models.run(source, inputs)}, {"y": onnx_models.run(path, inputs)})


@pytest.mark.parametrize("per_channel", [True, False])
def test_every_layer_of_a_cnn_runs_in_int8_kernels(cnn, tmp_path, per_channel):
    before = file_digest(cnn.path)
    variant = Variant("int8-static", "onnxruntime", "static", per_channel)
    made = quantize(cnn, variant, CPU, images, tmp_path / "q.onnx")
    operators = runtime_operators(made.path, tmp_path)
    assert operators["QLinearConv"] == 3
    assert operators["QGemm"] == 1
    assert not {"Conv", "FusedConv", "Gemm", "Add", "Relu", "MaxPool"} & set(operators)
    assert (operators["QuantizeLinear"], operators["DequantizeLinear"]) == (1, 1)
    assert {fact.action for fact in made.facts} == {"quantized"}
    assert len(made.facts) == 4
    assert file_digest(cnn.path) == before
    assert close(made.path, cnn.path, onnx_models.images(20, 99)) > 0.99


def test_the_artifact_says_what_it_is_and_keeps_interface_and_metadata(cnn, tmp_path):
    made = quantize(cnn, PER_CHANNEL, CPU, images, tmp_path / "q.onnx", cache=tmp_path / "cache")
    assert (made.name, made.precision) == ("student/int8-static-per-channel-ort", "int8-static")
    assert made.digest == file_digest(made.path)
    assert made.scheme["activation"] == "uint8 asymmetric"
    assert made.scheme["granularity"] == "per channel"
    facts = describe(made.path)
    assert facts.quantized
    assert (facts.inputs, facts.outputs) == (cnn.inputs, cnn.outputs)
    assert facts.metadata == {"author": "someone", "labels": "a,b"}
    assert facts.custom_domains == ()
    assert variants(STAGE, CPU, facts)[0] == ()
    again = quantize(cnn, PER_CHANNEL, CPU, images, tmp_path / "again.onnx", cache=tmp_path / "cache")
    assert again.digest == made.digest


def test_a_raw_file_with_constants_and_an_old_opset_is_raised_and_quantized(tmp_path):
    raw = onnx_models.artifact(onnx_models.cnn(tmp_path / "old.onnx", as_constants=True, opset=11))
    made = quantize(raw, PER_CHANNEL, CPU, images, tmp_path / "q.onnx")
    assert describe(made.path).opset == 13
    assert describe(raw.path).opset == 11
    assert sum(fact.action == "quantized" for fact in made.facts) == 4
    assert close(made.path, raw.path, onnx_models.images(9)) > 0.99


def test_tensorrt_rules_give_symmetric_int8_without_bias_pairs(cnn, masked, tmp_path):
    for source, data in ((cnn, images), (masked, tokens)):
        for variant in variants(STAGE, TENSORRT, describe(source.path))[0]:
            made = quantize(source, variant, TENSORRT, data, tmp_path / "q.onnx")
            graph = onnx.load(made.path).graph
            weights = {tensor.name: tensor for tensor in graph.initializer}
            pairs = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
            assert pairs
            for node in pairs:
                zero = numpy_helper.to_array(weights[node.input[2]])
                assert zero.dtype == np.int8
                assert not zero.any()
                if node.input[0] in weights:
                    assert weights[node.input[0]].data_type == onnx.TensorProto.INT8
            made_by = {name: node.op_type for node in graph.node for name in node.output}
            users = {name: node.op_type for node in graph.node for name in node.input}
            quantized = {users[n.output[0]] for n in pairs if n.op_type == "DequantizeLinear"}
            assert quantized <= {"Conv", "Gemm", "MatMul", "Add"}  # Add: the residual that TensorRT fuses into Conv
            assert all(made_by.get(value.name) in ("Gemm", "Conv") for value in graph.output)
            assert file_digest(source.path) == source.digest


def test_tensorrt_really_builds_it(cnn, tmp_path):
    trt = pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    made = quantize(
        cnn,
        PER_CHANNEL.__class__("q", "onnxruntime", "static", True, ("Conv", "Gemm")),
        TENSORRT,
        images,
        tmp_path / "q.onnx",
    )
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(made.path)), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1 << 30)
    profile = builder.create_optimization_profile()
    profile.set_shape("image", (1, 3, 16, 16), (2, 3, 16, 16), (8, 3, 16, 16))
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    assert builder.build_serialized_network(network, config) is not None


def test_a_masked_transformer_keeps_its_outputs_and_its_table_shrinks(masked, tmp_path):
    chosen = [v for v in variants(STAGE, CPU, describe(masked.path))[0] if v.engine == "onnxruntime"]
    assert [variant.kind for variant in chosen] == ["static", "static", "dynamic"]
    inputs = onnx_models.tokens(16, 31, seed=77)
    for variant in chosen:
        made = quantize(masked, variant, CPU, tokens, tmp_path / f"{variant.name}.onnx")
        assert close(made.path, masked.path, inputs) > 0.99
        assert made.file_bytes * 3.4 < masked.file_bytes
        state = {fact.layer: (fact.action, fact.reason) for fact in made.facts}
        assert state["e_Gather"][0] == "quantized"
        assert state["qk_MatMul"][0] == "left-float"
        assert "computed" in state["qk_MatMul"][1]
        assert sum(action == "quantized" for action, _ in state.values()) == 8
        graph = onnx.load(made.path).graph
        made_by = {name: node for node in graph.node for name in node.output}
        residual = next(node for node in graph.node if node.name == "res_Add")
        assert made_by[residual.input[0]].op_type == "LayerNormalization"  # not its int8 image
        operators = runtime_operators(made.path, tmp_path)
        assert operators["MatMul"] + operators["FusedMatMul"] == 2


def test_dynamic_quantization_survives_stale_shapes_on_a_transposed_gemm(masked, tmp_path):
    model = onnx.load(masked.path)
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("wc", 1, [4, 64]))
    onnx.save(model, tmp_path / "stale.onnx")
    made = quantize(onnx_models.artifact(tmp_path / "stale.onnx"), DYNAMIC, CPU, tokens, tmp_path / "q.onnx")
    assert made.precision == "int8-dynamic"


def test_reduced_range_keeps_weights_in_seven_bits(cnn, tmp_path):
    made = quantize(cnn, PER_CHANNEL, QuantizationRules(reduce_range=True), images, tmp_path / "q.onnx")
    found = [
        numpy_helper.to_array(t) for t in onnx.load(made.path).graph.initializer if t.data_type == 3 and len(t.dims) > 1
    ]
    assert len(found) == 4
    assert max(int(np.abs(array.astype(int)).max()) for array in found) <= 64
    assert "reduced" in made.scheme["weight"]


def test_layers_before_a_logarithm_stay_float_with_the_reason(tmp_path):
    b = onnx_models.Builder()
    x = b.op("Conv", ["image", b.normal("f", 8, 3, 3, 3)], "spectrum")
    x = b.op("Log", [b.op("Add", [b.op("Abs", [x], "abs"), b.weight("e", np.array(1e-3, np.float32))], "sum")], "log")
    b.op("Conv", [x, b.normal("w", 4, 8, 3, 3)], "y")
    onnx.save(b.model([("image", 1, ["batch", 3, 16, 16])], [("y", 1, ["batch", 4, 12, 12])]), tmp_path / "m.onnx")
    made = quantize(onnx_models.artifact(tmp_path / "m.onnx"), PER_CHANNEL, CPU, images, tmp_path / "q.onnx")
    state = {fact.layer: (fact.action, fact.reason) for fact in made.facts}
    assert state["y_Conv"][0] == "quantized"
    assert "logarithm" in state["spectrum_Conv"][1]


@has_nncf
def test_nncf_quantizes_quietly_and_keeps_the_interface(cnn, masked, tmp_path, capfd):
    for source, data, layers in ((cnn, images, 4), (masked, tokens, 7)):
        facts = describe(source.path)
        variant = next(v for v in variants(STAGE, CPU, facts)[0] if v.engine == "nncf")
        made = quantize(source, variant, CPU, data, tmp_path / "q.onnx")
        found = describe(made.path)
        assert (found.inputs, found.outputs, found.metadata) == (facts.inputs, facts.outputs, facts.metadata)
        assert sum(fact.action == "quantized" for fact in made.facts) >= layers
        fresh = onnx_models.images(9, 5) if source is cnn else onnx_models.tokens(9, 20, seed=5)
        assert close(made.path, source.path, fresh) > 0.99
        assert file_digest(source.path) == source.digest
    out = capfd.readouterr()
    assert out.out == ""


def test_bad_requests_are_stage_errors_and_leave_nothing(cnn, tmp_path):
    with pytest.raises(StageError, match="replace its source"):
        quantize(cnn, PER_CHANNEL, CPU, images, cnn.path)
    with pytest.raises(StageError, match="no calibration data"):
        quantize(cnn, PER_CHANNEL, CPU, lambda: iter([]), tmp_path / "q.onnx")
    half = onnx.load(cnn.path)
    for tensor in half.graph.initializer:
        if tensor.data_type == 1:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    (tmp_path / "half.onnx").write_bytes(half.SerializeToString())
    with pytest.raises(StageError, match="no float32 weights"):
        quantize(onnx_models.artifact(tmp_path / "half.onnx"), PER_CHANNEL, CPU, images, tmp_path / "q.onnx")
    assert not (tmp_path / "q.onnx").exists()


@pytest.mark.train
def test_a_trained_digits_network_loses_at_most_one_point(tmp_path):
    import torch
    from sklearn.datasets import load_digits
    from torch import nn

    from compressor.export.onnx import export_onnx
    from compressor.types import TensorSpec

    torch.manual_seed(0)
    digits = load_digits()
    pictures = (digits.images[:, None] / 8 - 1).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(pictures))
    train, test = order[:1200], order[1200:]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
            self.second = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
            self.third = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2), nn.ReLU())
            self.head = nn.Linear(32, 10)

        def forward(self, image):
            x = self.first(image)
            return self.head(self.third(torch.relu(x + self.second(x))).mean((2, 3)))

    net = Net()
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    x, y = torch.from_numpy(pictures[train]), torch.from_numpy(digits.target[train])
    for _ in range(8):
        for part in torch.randperm(len(x)).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(x[part]), y[part]).backward()
            optimiser.step()
    spec = [TensorSpec("image", "float32", ("batch", 1, 8, 8))], [TensorSpec("logits", "float32", ("batch", 10))]
    export_onnx(net, {"image": pictures[:2]}, *spec, tmp_path / "raw.onnx", name="digits", metadata={})
    optimise(tmp_path / "raw.onnx", tmp_path / "m.onnx")
    source = onnx_models.artifact(tmp_path / "m.onnx")

    def accuracy(path):
        return float((onnx_models.run(path, {"image": pictures[test]}).argmax(1) == digits.target[test]).mean())

    plain = accuracy(source.path)
    assert plain > 0.95
    config = [
        STAGE,
        *(QuantizeStage(kind="quantize", engines=("onnxruntime",), calibration=m) for m in ("percentile", "entropy")),
    ]
    for stage in config:
        for variant in variants(stage, CPU, describe(source.path))[0]:
            data = {"image": pictures[train[:128]]}
            made = quantize(source, variant, CPU, lambda data=data: iter([data]), tmp_path / "q.onnx", cache=tmp_path)
            assert accuracy(made.path) >= plain - 0.01, (variant.name, variant.calibration)
