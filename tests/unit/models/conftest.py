"""Small real checkpoints with random weights, and small ONNX files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

SENTENCES = [
    "the film is a quiet wonder", "a dull and noisy film", "the actors are wonderful", "a story without a heart",
    "it made me laugh and cry", "two hours i will never get back", "the music is wonderful", "nothing here is new",
] * 4  # fmt: skip


def _save_tokenizer(folder: Path) -> int:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import BertTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_padding(length=32)  # as many checkpoints on the hub have it
    BertTokenizerFast(tokenizer_object=tokenizer, model_max_length=48).save_pretrained(folder)
    return tokenizer.get_vocab_size()


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BertForSequenceClassification, 3 layers x 32, 4 heads, labels bad/good."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("bert")
    size = _save_tokenizer(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1},
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\ntags:\n- test\n---\n# A model\n")
    return folder


@pytest.fixture(scope="session")
def encoder_folder(bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bare BertModel of ``bert_folder``."""
    from transformers import AutoModel, AutoTokenizer

    folder = tmp_path_factory.mktemp("encoder")
    AutoModel.from_pretrained(bert_folder).save_pretrained(folder)
    AutoTokenizer.from_pretrained(bert_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ViTForImageClassification, 16x16 pictures, 2 layers, labels cat/dog/owl."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4,
        id2label={0: "cat", 1: "dog", 2: "owl"}, label2id={"cat": 0, "dog": 1, "owl": 2},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    processor = {"do_resize": True, "size": {"height": 16, "width": 16}, "resample": 3, "do_rescale": True,
                 "rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def conv_net(domain: str = "", op: str = "Relu") -> onnx.ModelProto:
    """image (batch, 1, 8, 8) -> Conv -> op -> GlobalAveragePool -> Gemm -> logits (batch, 10); bias: Constant."""
    random = np.random.default_rng(0)
    weights = random.normal(size=(4, 1, 3, 3)).astype(np.float32)
    head = random.normal(size=(4, 10)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["a"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node(op, ["a"], ["b"], name="act", domain=domain),
        helper.make_node("GlobalAveragePool", ["b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("Constant", [], ["bias"], value=numpy_helper.from_array(np.zeros(10, np.float32))),
        helper.make_node("Gemm", ["d", "head", "bias"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(head, "head")],
    )
    opsets = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    onnx.save(conv_net(), path)
    return path
