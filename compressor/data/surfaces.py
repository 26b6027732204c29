"""What a token stands for, comparable between tokenizers: its bytes, and whether it begins a word. Plain JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compressor.errors import PlanError

Surface = tuple[str, bytes, bool]  # ("text" or "special", bytes, begins a word)
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
META = "\N{LOWER ONE EIGHTH BLOCK}"  # of SentencePiece: a space
# Names under which tokenizers keep the same special token.
ROLES: dict[str, tuple[str, ...]] = {
    "pad": ("[PAD]", "<pad>", "<|padding|>", "<PAD>"),
    "eos": ("</s>", "<|im_end|>", "<|endoftext|>", "<eos>", "<|end_of_text|>", "[SEP]"),
    "mask": ("[MASK]", "<mask>"),
    "unk": ("[UNK]", "<unk>"),
}


def byte_alphabet() -> dict[str, int]:
    """The characters of byte-level tokenizers -> bytes: printable ones stand for themselves, the others follow from
    U+0100 on (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


@dataclass(frozen=True)
class Vocabulary:
    """A ``tokenizer.json`` as surfaces: ``surfaces[id]``; ``special``: content -> id."""

    surfaces: Mapping[int, Surface]
    special: Mapping[str, int]

    @property
    def size(self) -> int:
        return max(self.surfaces, default=-1) + 1

    @property
    def ids(self) -> dict[Surface, int]:
        """The lowest id of each surface."""
        found: dict[Surface, int] = {}
        for number in sorted(self.surfaces):
            found.setdefault(self.surfaces[number], number)
        return found

    def role(self, name: str) -> int | None:
        """The id of a special token by what it is for."""
        return next((self.special[content] for content in ROLES[name] if content in self.special), None)


def vocabulary_of(content: bytes, where: str = "tokenizer") -> Vocabulary:
    """Read a ``tokenizer.json``.

    Raises:
        PlanError: it is not one, or of a kind without a vocabulary of strings.
    """
    try:
        data = json.loads(content)
        model = data["model"]
        entries = model["vocab"]
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise PlanError.single(where, f"is not a tokenizer.json: {type(error).__name__}: {error}") from error
    listed = (
        {str(e[0]): n for n, e in enumerate(entries)}
        if isinstance(entries, list)
        else {str(k): int(v) for k, v in entries.items()}
    )
    special = {str(item["content"]): int(item["id"]) for item in data.get("added_tokens") or ()}
    kinds = set(_kinds(data.get("pre_tokenizer"))) | set(_kinds(data.get("decoder")))
    bytewise = byte_alphabet() if "ByteLevel" in kinds else None
    prefix = str(model.get("continuing_subword_prefix") or "") if "merges" not in model else ""
    found = {number: _surface(token, bytewise, prefix) for token, number in listed.items()}
    found |= {number: ("special", token.encode(), False) for token, number in special.items()}
    return Vocabulary(found, special)


def _kinds(part: Any) -> list[str]:
    if isinstance(part, Mapping):
        return [str(part.get("type")), *(kind for value in part.values() for kind in _kinds(value))]
    return [kind for value in part for kind in _kinds(value)] if isinstance(part, list) else []


def _surface(token: str, bytewise: Mapping[str, int] | None, prefix: str) -> Surface:
    if bytewise is not None and all(letter in bytewise for letter in token):
        raw = bytes(bytewise[letter] for letter in token)
        return ("text", raw[1:], True) if raw[:1] == b" " and len(raw) > 1 else ("text", raw, False)
    if prefix:
        continues = token.startswith(prefix) and len(token) > len(prefix)
        return "text", token.removeprefix(prefix).encode() if continues else token.encode(), not continues
    if (match := _BYTE.fullmatch(token)) is not None:
        return "text", bytes([int(match[1], 16)]), False
    if token.startswith(META) and len(token) > 1:
        return "text", token[1:].replace(META, " ").encode(), True
    return "text", token.replace(META, " ").encode(), False


def words(surface: Surface) -> str:
    """The text that a token stands for, with the space before a word."""
    _, raw, begins = surface
    return (" " if begins else "") + raw.decode("utf-8", errors="ignore")


def shared_ids(old: Vocabulary, new: Vocabulary) -> dict[int, int]:
    """New id -> old id of the tokens that both have, special ones by their content or role, ascending."""
    known = old.ids
    shared = {number: known[surface] for number, surface in sorted(new.surfaces.items()) if surface in known}
    for role in ROLES:
        mine, theirs = new.role(role), old.role(role)
        if mine is not None and theirs is not None:
            shared.setdefault(mine, theirs)
    return shared


def spelt(vocabulary: Vocabulary, numbers: Sequence[int], tokenizer: Any) -> list[list[int]]:
    """How another ``tokenizer`` (of ``tokenizers``) spells these tokens of ``vocabulary``; empty for special ones."""
    none: Surface = ("special", b"", False)
    found = [vocabulary.surfaces.get(number, none) for number in numbers]
    texts = [words(surface) if surface[0] == "text" else "" for surface in found]
    return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


__all__ = ["Surface", "Vocabulary", "byte_alphabet", "shared_ids", "spelt", "vocabulary_of", "words"]
