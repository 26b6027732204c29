"""A trimmed tokenizer.json gives the same tokens for text whose tokens were kept, and some tokens for any other."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest

tokenizers = pytest.importorskip("tokenizers")

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

from compressor.errors import PlanError  # noqa: E402
from compressor.students.tokenizer import trim_tokenizer  # noqa: E402

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
STEMS = ["walk", "talk", "jump", "sing", "paint", "film", "story", "actor", "scene", "light", "dark", "sweet", "bitter"]
ENDS = ["", "s", "ed", "ing", "er", "ers", "ingly", "less", "ness", "able"]


def texts(count: int, seed: int, stems: list[str] = STEMS) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choice(stems) + draw.choice(ENDS) for _ in range(8)) + " !" for _ in range(count)]


def wordpiece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(texts(400, 0), trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL))
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return made


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts(400, 0),
        trainers.BpeTrainer(vocab_size=520, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet),
    )
    made.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
    return made


def suffixed() -> Tokenizer:
    """BPE as OpenAI's first GPT and CLIP have it: the end of a word is part of its last symbol."""
    made = Tokenizer(models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(
        texts(400, 0), trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, end_of_word_suffix="</w>")
    )
    return made


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=SPECIAL, unk_token="[UNK]")
    made.train_from_iterator(texts(400, 0), trainer)
    return made


KINDS = {"WordPiece": wordpiece, "byte-level BPE": byte_level, "BPE with suffix": suffixed, "Unigram": unigram}


@pytest.fixture(params=list(KINDS))
def full(request: pytest.FixtureRequest) -> Tokenizer:
    return KINDS[request.param]()


def counted(tokenizer: Tokenizer, corpus: list[str]) -> Counter[int]:
    return Counter(number for one in tokenizer.encode_batch(corpus) for number in one.ids)


def test_same_tokens_for_the_corpus(full: Tokenizer) -> None:
    corpus = texts(60, 1, STEMS[:6])
    made = trim_tokenizer(full.to_str().encode(), counted(full, corpus))
    small = Tokenizer.from_str(made.content.decode())
    assert small.get_vocab_size() == len(made.keep) < full.get_vocab_size()
    for text in corpus:
        one, other = full.encode(text), small.encode(text)
        assert other.tokens == one.tokens
        assert made.keep[other.ids].tolist() == one.ids
        assert small.decode(other.ids) == full.decode(one.ids)
    assert {token: made.keep[number] for token, number in small.get_vocab().items()} == {
        token: number for token, number in full.get_vocab().items() if number in made.keep
    }


def test_other_text_still_has_tokens(full: Tokenizer) -> None:
    made = trim_tokenizer(full.to_str().encode(), counted(full, texts(60, 1, STEMS[:4])))
    small = Tokenizer.from_str(made.content.decode())
    found = small.encode("bittersweetness darkest")
    assert len(found.ids) > len(full.encode("bittersweetness darkest").ids)
    assert "[UNK]" not in found.tokens
    assert small.encode("\u732b \U0001f600").ids  # unknown to most, bytes to some: never an error


def test_the_limit_keeps_what_is_frequent(full: Tokenizer) -> None:
    corpus = texts(200, 1)
    counts = counted(full, corpus)
    everything = trim_tokenizer(full.to_str().encode(), counts)
    limit = (everything.needed + len(everything.keep)) // 2
    made = trim_tokenizer(full.to_str().encode(), counts, limit)
    assert everything.needed < len(made.keep) <= limit
    small = Tokenizer.from_str(made.content.decode())
    same = [text for text in corpus if set(full.encode(text).ids) <= set(made.keep.tolist())]
    assert all(small.encode(text).tokens == full.encode(text).tokens for text in same)
    gone = set(counts) - set(made.keep.tolist())
    stayed = [counts[number] for number in made.keep.tolist() if number in counts]
    assert gone
    assert np.mean([counts[number] for number in gone]) < np.mean(stayed)


def test_too_small_a_limit_is_refused(full: Tokenizer) -> None:
    with pytest.raises(PlanError, match="must stay"):
        trim_tokenizer(full.to_str().encode(), {}, 3)


def test_merges_of_kept_tokens_only() -> None:
    full = byte_level()
    made = trim_tokenizer(full.to_str().encode(), counted(full, ["walking walks"]))
    data: dict[str, Any] = json.loads(made.content)
    vocabulary = data["model"]["vocab"]
    assert len(made.keep) < 290
    for left, right in data["model"]["merges"]:
        assert {left, right, left + right} <= set(vocabulary)
    assert data["post_processor"]["sep"] == ["</s>", vocabulary["</s>"]]


def test_added_tokens_outside_the_model_follow_the_vocabulary() -> None:
    full = byte_level()
    full.add_tokens(["<user>", "<system>"])
    made = trim_tokenizer(full.to_str().encode(), counted(full, ["walking <user>"]))
    small = Tokenizer.from_str(made.content.decode())
    assert small.encode("<user>walking<system>").tokens == full.encode("<user>walking<system>").tokens
    assert made.keep[small.token_to_id("<system>")] == full.token_to_id("<system>")


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(PlanError, match="cannot be trimmed"):
        trim_tokenizer(json.dumps({"model": {"type": "Braille", "vocab": {}}}).encode(), {})
