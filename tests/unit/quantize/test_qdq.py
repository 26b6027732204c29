"""Files of students trained with fake quantization compute what was trained, in every container, for every rule."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from compressor.errors import StageError  # noqa: E402
from compressor.models import fakequant  # noqa: E402
from compressor.models.fakequant import Scheme, settled, trained_layers  # noqa: E402
from compressor.models.onnx_graph import save_model  # noqa: E402
from compressor.profile import QuantizationRules  # noqa: E402
from compressor.quantize.checks.lint import lint  # noqa: E402
from compressor.quantize.containers import pack  # noqa: E402
from compressor.quantize.qdq import information, misfit, write_pairs  # noqa: E402

pytestmark = pytest.mark.train
PLAIN = QuantizationRules()
TENSORRT = QuantizationRules(
    activation="int8", symmetric_activation=True, quantize_bias=False, weighted_only=True, dynamic=False
)
BROWSER = QuantizationRules(weight="uint8", per_channel=False)
LEVELS = [onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL]


class Net(nn.Module):
    """Convolution, ReLU, convolution, head: reads (N, 2, 6, 6)."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2)
        self.head = nn.Linear(16, 3)

    def forward(self, image):
        return self.head(torch.relu(self.b(torch.relu(self.a(image)))).flatten(1))


def onnx_of(module):
    """The fp32 graph of ``Net`` as the exporter writes it, without running the exporter."""
    from onnx import TensorProto, helper, numpy_helper

    state = {name: numpy_helper.from_array(t.detach().numpy(), name) for name, t in module.state_dict().items()}
    make = helper.make_node
    nodes = [
        make("Conv", ["image", "a.weight", "a.bias"], ["a"], name="conv_a", pads=[1, 1, 1, 1]),
        make("Relu", ["a"], ["ra"], name="relu_a"),
        make("Conv", ["ra", "b.weight", "b.bias"], ["b"], name="conv_b", strides=[2, 2]),
        make("Relu", ["b"], ["rb"], name="relu_b"),
        make("Flatten", ["rb"], ["flat"], name="flat", axis=1),
        make("Gemm", ["flat", "head.weight", "head.bias"], ["logits"], name="head", transB=1),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("image", ["batch", 2, 6, 6]), ("logits", ["batch", 3]))
    ]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], list(state.values()))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def trained(rules=PLAIN, **keys):
    """A rounding ``Net`` whose scales are powers of two, so that float32 sums are exact in any order."""
    torch.manual_seed(0)
    module = Net().eval()
    bits = 0 if keys.pop("activations", "rules") == "float" else 16 if rules.activation.endswith("16") else 8
    for name, positive in (("a", False), ("b", True), ("head", True)):
        per = str(keys["group"]) if "group" in keys and name == "head" else "channel" if rules.per_channel else "tensor"
        scheme = Scheme(
            precision=keys.get("precision", "int8"), method=keys.get("method", "lsq"), per=per, activation_bits=bits,
            symmetric=rules.symmetric_activation, positive=positive, output="both" if name == "b" and bits else "",
            bias=bool(bits) and rules.quantize_bias,
        )  # fmt: skip
        layer = fakequant.change(module, name, scheme)
        fakequant.start(layer, (0.0 if positive else -3.0, 3.0), (-2.0, 2.0))
        with torch.no_grad():
            for key in ("weight_log_scale", "input_log_scale", "output_log_scale"):
                if hasattr(layer, key):  # log2 to a whole number; exp of it is that power of two or its neighbour
                    value = getattr(layer, key)
                    value.copy_((value / np.log(2)).round() * float(np.log(2)))
    return module


def run(model, folder, images, level):
    save_model(model, folder / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 3
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"image": images})[0]


IMAGES = np.random.default_rng(0).normal(size=(16, 2, 6, 6)).astype(np.float32)
CASES = [
    ({}, PLAIN, False, "int8"),
    ({}, TENSORRT, False, "int8"),
    ({}, BROWSER, False, "uint8"),
    ({}, QuantizationRules(activation="uint16"), False, "int8"),
    ({"precision": "int4"}, PLAIN, False, "int8"),
    ({"precision": "int4"}, PLAIN, True, "int4"),
    ({"precision": "int3", "method": "minmax"}, PLAIN, False, "int8"),
    ({"precision": "int3", "method": "minmax"}, PLAIN, True, "uint4"),
    ({"precision": "ternary", "method": "twn"}, PLAIN, True, "int4"),
    ({"precision": "ternary", "method": "dlt"}, PLAIN, True, "int8"),
    ({"precision": "ternary", "method": "lsq", "activations": "float"}, PLAIN, True, "int2"),
    ({"precision": "int4", "activations": "float", "method": "minmax", "group": 16}, PLAIN, True, "uint4"),
    ({"precision": "int4", "activations": "float", "group": 16}, PLAIN, False, "int8"),
]


@pytest.mark.parametrize(("keys", "rules", "packed", "container"), CASES)
def test_the_file_computes_what_was_trained(tmp_path, keys, rules, packed, container):
    module = trained(rules, **keys)
    layers = trained_layers(module)
    assert misfit(layers, rules) == ""
    model, stored = write_pairs(onnx_of(settled(module)), layers, rules, packed=packed)
    onnx.checker.check_model(model)
    assert lint(model, rules) == ()
    assert stored[0].container.shown == container
    with torch.no_grad():
        want = module(torch.from_numpy(IMAGES)).numpy()
    for level in LEVELS:
        got = run(model, tmp_path, IMAGES, level)
        assert np.abs(got - want).max() <= 2e-6 * np.abs(want).max()


def test_every_code_and_scale_in_the_file_is_a_trained_one():
    module = trained(precision="int4")
    layers = {layer.name: layer for layer in trained_layers(module)}
    model, _ = write_pairs(onnx_of(settled(module)), tuple(layers.values()), PLAIN, packed=True)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for name, layer in layers.items():
        assert np.array_equal(stored[f"{name}.weight_quantized"].astype(np.int16), layer.codes)
        assert np.array_equal(stored[f"{name}.weight_scale"], layer.scale)
        assert np.array_equal(stored[f"{name}.weight_quantized"].astype(np.float32).reshape(len(layer.scale), -1)
                              * layer.scale[:, None], layer.value.reshape(len(layer.scale), -1))  # fmt: skip
    scales = [float(stored[name]) for name in stored if name.endswith("_scale") and stored[name].shape == ()]
    assert {float(np.float32(layer.reads.scale)) for layer in layers.values()} <= set(scales)
    # 4 bits a weight in the file, none elsewhere
    assert len(next(t for t in model.graph.initializer if t.name == "head.weight_quantized").raw_data) == 3 * 16 // 2
    bits = information(tuple(layers.values()), 0)
    assert bits["weights"] == 4 * sum(layer.codes.size for layer in layers.values())


def test_targets_that_cannot_take_what_was_trained_say_why():
    layers = trained_layers(trained())
    assert "asymmetric activations" in misfit(layers, TENSORRT)
    assert "one per tensor" in misfit(layers, BROWSER)
    assert "takes uint16" in misfit(layers, QuantizationRules(activation="uint16"))
    assert "seven" in misfit(layers, QuantizationRules(reduce_range=True))
    assert misfit(layers, QuantizationRules(int8=False)) == "the target takes no int8"
    assert misfit(trained_layers(trained(TENSORRT)), PLAIN) == ""  # a symmetric grid has an unsigned form


def test_a_weight_that_the_exporter_changed_is_named():
    module = trained()
    model = onnx_of(settled(module))
    head = next(tensor for tensor in model.graph.initializer if tensor.name == "head.weight")
    head.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(head), "head.weight"))
    with pytest.raises(StageError, match="weights of head are not in the exported file"):
        write_pairs(model, trained_layers(module), PLAIN, packed=False)


def test_codes_are_packed_with_the_first_in_the_lowest_bits():
    values = np.random.default_rng(1).integers(0, 4, (3, 8)).astype(np.uint8)
    made = pack(values, 2)
    assert made.shape == (3, 2)
    assert np.array_equal(np.stack([(made >> shift) & 3 for shift in (0, 2, 4, 6)], -1).reshape(3, 8), values)


def test_a_transformer_as_the_exporter_writes_it_keeps_every_output(tmp_path):
    from compressor.distil.rounding import install
    from compressor.export.onnx import export_onnx
    from compressor.export.optimise import optimise
    from compressor.models.onnx_graph import read_model
    from compressor.qat import Qat
    from compressor.types import TensorSpec
    from tests.unit.distil.toy import Sentences, transformer

    sentences, module = Sentences("train", 24, 1).batch(range(24)), transformer(1, 3)
    tensors = {name: torch.from_numpy(array) for name, array in sentences.items()}
    install(module, Qat(weights="int4", int8=("head",)), PLAIN, tensors, lambda: [tensors])
    specs = [TensorSpec(name, "int64", ("batch", "sequence")) for name in sentences]
    output = [TensorSpec("logits", "float32", ("batch", 2))]
    export_onnx(settled(module), sentences, specs, output, tmp_path / "raw.onnx", name="text", metadata={})
    optimise(tmp_path / "raw.onnx", tmp_path / "fp32.onnx")
    layers = trained_layers(module)
    assert len(layers) == 6
    model, stored = write_pairs(read_model(tmp_path / "fp32.onnx"), layers, PLAIN, packed=False)
    assert lint(model, PLAIN) == ()
    assert [item.layer.name for item in stored if item.layer.name.endswith("key")] == ["layers.0.attention.key"]
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    read = {node.input[0] for node in products if node.input[1].endswith(node.name)}
    assert len(read) == 3  # query, key and value read one pair
    save_model(model, tmp_path / "model.onnx")
    with torch.no_grad():
        want = module(**tensors).numpy()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = LEVELS[0]
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    gap = np.abs(session.run(None, dict(sentences))[0] - want)
    assert np.mean(gap < 1e-5) >= 0.9  # a sum in another order may cross a rounding boundary
    assert gap.max() < 0.05


def test_a_file_that_computes_something_else_is_not_handed_on(tmp_path):
    from types import SimpleNamespace

    from compressor.stages.qat import check_parity

    module = trained()
    model, _ = write_pairs(onnx_of(settled(module)), trained_layers(module), PLAIN, packed=False)
    split = type("Split", (), {"batch": lambda _, index: {"image": IMAGES[index]}, "__len__": lambda _: 16})()

    def runner(part):
        return lambda inputs: {"logits": part(torch.from_numpy(inputs["image"])).detach().numpy()}

    run_ = SimpleNamespace(data=SimpleNamespace(splits={"validation": split}), runner=runner)
    save_model(model, tmp_path / "model.onnx")
    assert check_parity(run_, module, tmp_path / "model.onnx").startswith("logits: 100.00% within")
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == "head.weight_scale")
    scale.CopyFrom(onnx.numpy_helper.from_array(np.roll(onnx.numpy_helper.to_array(scale), 1) * 2, scale.name))
    save_model(model, tmp_path / "model.onnx")
    with pytest.raises(StageError, match="differs from the trained student"):
        check_parity(run_, module, tmp_path / "model.onnx")
