"""The packaged script on pairs of texts, several labels, tags of words and language models."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from targets.package import infer

tokenizers = pytest.importorskip("tokenizers")
WORDS = [
    "the", "quiet", "film,", "dull!", "wonderful", "actors'", "story", "naïve", "中文", "laugh-heart", "unbelievably",
]  # fmt: skip
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def wordpiece(processor: str) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.BertNormalizer()
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=60, special_tokens=SPECIAL)
    made.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    if processor == "template":
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    elif processor == "bert":
        made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return made


@pytest.mark.parametrize("processor", ["template", "bert", "none"])
def test_pairs_are_encoded_as_the_library_does(processor):
    library = wordpiece(processor)
    spec = json.loads(library.to_str())
    assert infer.is_plain(spec)
    plain, draw = infer.WordPiece(spec), random.Random(0)
    for _ in range(150):
        first, second = (" ".join(draw.choices(WORDS, k=draw.randint(0, 12))) for _ in range(2))
        longest = draw.choice([4, 5, 8, 13, 64])
        library.enable_truncation(longest)
        wanted = library.encode(first, second)
        assert plain.encode_pair(first, second, longest) == (wanted.ids, wanted.type_ids)


def test_the_longer_text_is_cut_first():
    assert infer.cut_longest([3, 10], 8) == [3, 5]
    assert infer.cut_longest([10, 3], 8) == [5, 3]
    assert infer.cut_longest([10, 10], 7) == [3, 4]
    assert infer.cut_longest([2, 3], 8) == [2, 3]


def test_several_labels_and_their_probabilities():
    manifest = {"postprocess": {"kind": "sigmoid"}, "labels": ["cat", "dog", "owl"]}
    found = infer.answer({"logits": np.array([[2.0, -1.0, 0.5]])}, manifest, 2)
    assert found["labels"] == ["cat", "owl"]
    assert list(found["scores"]) == ["cat", "owl"]
    assert found["scores"]["cat"] == pytest.approx(1 / (1 + np.exp(-2)))
    manifest["postprocess"]["kind"] = "independent-probabilities"
    assert infer.answer({"p": np.array([[0.2, 0.9, 0.1]])}, manifest, 3)["labels"] == ["dog"]


def package(folder: Path, tokenizer: tokenizers.Tokenizer, kind: str, **rules: object) -> infer.Package:
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    names = ["input_ids", "attention_mask"]
    manifest = {
        "manifest_version": "1.0", "labels": ["N", "V"], "postprocess": {"kind": kind},
        "inputs": [{"name": name, "dtype": "int64", "shape": ["batch", "sequence"]} for name in names],
        "preprocess": {"kind": "text", "tokenizer_file": "tokenizer.json", "max_length": 8, "pad_id": 0, "names": names,
                       **rules},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return infer.Package(folder)


@pytest.mark.parametrize("plain", [True, False])
def test_each_word_takes_the_tag_of_its_first_piece(tmp_path: Path, plain: bool):
    tokenizer = wordpiece("template")
    if not plain:
        tokenizer.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.BertNormalizer()])
    made = package(tmp_path, tokenizer, "tags")
    words = ["unbelievably", "quiet", "laugh-heart", "film"]
    encoding = tokenizer.encode(words, is_pretokenized=True)
    tokenizer.enable_truncation(8)
    owners = tokenizer.encode(words, is_pretokenized=True).word_ids
    wanted = [owners.index(number) for number in range(4) if number in owners]
    assert len(encoding.ids) > 8  # the last word is cut off
    assert made.first_tokens(words) == wanted
    logits = np.zeros((1, 8, 2))
    logits[0, wanted[0], 1] = 1
    found = infer.tagged(made, " ".join(words), {"logits": logits})
    assert found["tags"] == ["V", *["N"] * (len(wanted) - 1)]


def test_a_pair_wants_its_second_text(tmp_path: Path):
    made = package(tmp_path, wordpiece("template"), "softmax", pair=True)
    one, other = made.tokens("quiet\tfilm"), made.tokens("quiet", "film")
    assert one["input_ids"].tolist() == other["input_ids"].tolist()
    with pytest.raises(infer.RefusalError, match="two texts"):
        made.tokens("quiet")


def test_a_language_model_goes_on_writing(tmp_path: Path):
    """The net says: after token i comes i + 1."""
    letters = {letter: number for number, letter in enumerate("abcdefghij")}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    names = ("input_ids", "attention_mask")
    table = np.roll(np.eye(10, dtype=np.float32), 1, axis=1)
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
            helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["mask", "axis"], ["wide"]),
            helper.make_node("Mul", ["rows", "wide"], ["logits"]),
        ],
        "counter",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"]) for name in names],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", 10])],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array([2]), "axis")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    made = package(tmp_path, tokenizer, "next-token", eos_id=9)
    assert made.continued(session, "ab", 3) == {"continuation": "cde", "tokens": [2, 3, 4]}
    assert made.continued(session, "fg", 20)["tokens"] == [7, 8, 9]  # stops at its end token
    assert len(made.continued(session, "aaaaaaaaaab", 4)["tokens"]) == 4  # longer than the model's length
