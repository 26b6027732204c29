"""torch modules to ONNX files: dynamic axes, parity, determinism, clean errors."""

import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from compressor.errors import StageError
from compressor.types import TensorSpec
from tests import onnx_models

pytestmark = pytest.mark.train

IMAGE = [TensorSpec("image", "float32", ("batch", 3, 16, 16))]
LOGITS = [TensorSpec("logits", "float32", ("batch", 10))]
SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from tests.unit.export.test_onnx import resnet, export
torch.manual_seed(7)
export(resnet(), Path(sys.argv[1]))
"""


def resnet():
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return x + self.drop(self.conv(x))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
            self.blocks = nn.Sequential(Block(), Block())
            self.head = nn.Linear(8, 10)

        def forward(self, image):
            return self.head(self.blocks(self.stem(image)).mean((2, 3)))

    return Net()


def export(module, path, outputs=LOGITS, count=1):
    from compressor.export.onnx import export_onnx

    meta = {"role": "student", "licence": "MIT"}
    export_onnx(module, onnx_models.images(count), IMAGE, outputs, path, name="net", metadata=meta)


def test_a_cnn_keeps_names_modes_and_numbers_at_any_batch_size(tmp_path):
    import torch

    from compressor.export.facts import describe
    from compressor.export.verify import verify

    module = resnet()
    module.head.eval()
    export(module, tmp_path / "m.onnx")
    assert module.training
    assert not module.head.training
    module.eval()

    def reference(inputs):
        with torch.no_grad():
            return {"logits": module(torch.from_numpy(inputs["image"])).numpy()}

    rows = verify(reference, tmp_path / "m.onnx", [onnx_models.images(n) for n in (1, 2, 7)])
    assert rows[0].passed
    facts = describe(tmp_path / "m.onnx")
    assert facts.inputs == tuple(IMAGE)
    assert facts.outputs == tuple(LOGITS)
    assert facts.metadata == {"name": "net", "role": "student", "licence": "MIT"}
    assert "BatchNormalization" not in facts.operators
    assert list(tmp_path.iterdir()) == [tmp_path / "m.onnx"]
    model = onnx.load(tmp_path / "m.onnx")
    assert not model.graph.value_info
    assert all(not node.metadata_props and not node.doc_string for node in model.graph.node)


def test_two_processes_write_the_same_bytes_and_no_private_text(tmp_path):
    root = str(Path(__file__).parents[3])
    import torch

    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "a.onnx"), root], check=True, cwd=root, timeout=240)
    torch.manual_seed(7)
    export(resnet(), tmp_path / "b.onnx")
    data = (tmp_path / "a.onnx").read_bytes()
    assert data == (tmp_path / "b.onnx").read_bytes()
    assert b"pkg.torch" not in data
    assert b"/" + b"tests" not in data
    assert root.encode() not in data


def test_a_hugging_face_bert_keeps_dynamic_batch_and_sequence(tmp_path):
    import torch
    from torch import nn
    from transformers import BertConfig, BertForSequenceClassification

    from compressor.export.facts import describe
    from compressor.export.onnx import export_onnx
    from compressor.export.verify import verify

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1000, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=4
    )

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = BertForSequenceClassification(config)

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

    module = Wrapped().eval()
    before = module.model.config._attn_implementation
    inputs = [TensorSpec(name, "int64", ("batch", "sequence")) for name in ("input_ids", "attention_mask")]
    outputs = [TensorSpec("logits", "float32", ("batch", 4))]
    path = tmp_path / "m.onnx"
    export_onnx(module, onnx_models.tokens(3), inputs, outputs, path, name="bert", metadata={})
    assert module.model.config._attn_implementation == before

    def reference(batch):
        with torch.no_grad():
            return {"logits": module(**{name: torch.from_numpy(array) for name, array in batch.items()}).numpy()}

    assert verify(reference, path, [onnx_models.tokens(5, 40), onnx_models.tokens(1, 7)])[0].passed
    facts = describe(path)
    assert facts.has_masked_attention
    assert "IsNaN" not in facts.operators


def test_auxiliary_heads_fixed_batches_and_python_branches_give_clean_errors(tmp_path):
    import torch
    from torch import nn

    class Auxiliary(nn.Module):
        def forward(self, image):
            return image.mean((2, 3)), image.sum((2, 3))

    class Fixed(nn.Module):
        def forward(self, image):
            return image.reshape(2, -1)[:, :10]

    class Branch(nn.Module):
        def forward(self, image):
            flat = image.flatten(1)[:, :10]
            return flat if float(image.sum()) > 0 else -flat

    class Broken(nn.Module):
        def forward(self, picture):
            return picture

    with pytest.raises(StageError, match="returns 2 tensors") as caught:
        export(Auxiliary(), tmp_path / "a.onnx")
    assert "auxiliary" in caught.value.hint
    for module in (Fixed(), Branch(), Broken()):
        with pytest.raises(StageError) as caught:
            export(module, tmp_path / "b.onnx", count=2)
        assert caught.value.hint
        assert "Traceback" not in str(caught.value)
        assert torch.is_grad_enabled()
    assert not list(tmp_path.iterdir())


def test_an_operator_without_an_onnx_form_is_named(tmp_path):
    import torch
    from torch import nn

    class Exotic(nn.Module):
        def forward(self, image):
            return torch.linalg.eigvalsh(image[:, 0, :10, :10])

    with pytest.raises(StageError, match="eigh"):
        export(Exotic(), tmp_path / "m.onnx")
