"""Trimming of a ``tokenizer.json``: fewer tokens, the same segmentation of every text whose tokens were all kept.

Why the segmentation stays (T5's vocabulary trim, AlanAnsell/bistil; the arguments are ours):

- WordPiece takes the longest match; among fewer tokens the longest kept one is still the longest.
- BPE applies the merge of lowest rank that fits; merges that take part in a kept token stay with their rank, and those
  that went never fitted.
- Unigram takes the segmentation of highest score; the best one is still there, and its rivals only got fewer.

Plain JSON; neither torch nor transformers is needed.
"""

from __future__ import annotations

import copy
import itertools
import json
import string
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from compressor.errors import PlanError
from compressor.types import Array

KINDS = ("WordPiece", "BPE", "Unigram", "WordLevel")
BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))  # tokens of a byte fallback


@dataclass(frozen=True)
class TrimmedTokenizer:
    """The smaller tokenizer. New id ``i`` is the old id ``keep[i]`` (int64, ascending)."""

    content: bytes
    keep: Array
    needed: int  # tokens that had to stay: special ones, single characters or bytes


def trim_tokenizer(content: bytes, counts: Mapping[int, int], keep_tokens: int | None = None) -> TrimmedTokenizer:
    """Keep the tokens of ``counts`` (id -> how often it was seen), the most frequent first where there is a limit.

    What must stay does: special and added tokens, the unknown token, bytes, and single characters (of the corpus and
    ASCII; for byte-level tokenizers all 256), so that other text still has tokens. BPE also keeps the tokens on the
    way to a kept one, with their merges.

    Raises:
        PlanError: another kind of tokenizer, or ``keep_tokens`` is less than what must stay.
    """
    data = json.loads(content)
    kind = str(data["model"].get("type") or _guess(data["model"]))
    if kind not in KINDS:
        raise PlanError.single("vocabulary", f"a tokenizer of kind {kind} cannot be trimmed; {', '.join(KINDS)} can")
    data["model"]["type"] = kind
    words = Words(data)
    kept = words.needed({words.token[i] for i in counts if i in words.token})
    needed = len(kept)
    if keep_tokens is not None and keep_tokens < needed:
        what = f"{keep_tokens} is too few: {needed} special tokens and single characters or bytes must stay"
        raise PlanError.single("keep_tokens", what)
    for number in sorted(counts, key=lambda number: (-counts[number], number)):
        if number in kept or number not in words.token:
            continue
        more = words.way_to(number) - kept
        if keep_tokens is None or len(kept) + len(more) <= keep_tokens:
            kept |= more
    keep = np.array(sorted(kept), np.int64)
    return TrimmedTokenizer(json.dumps(words.only(keep), ensure_ascii=False).encode(), keep, needed)


def _guess(model: Mapping[str, Any]) -> str:
    """Old files do not name the kind of their model."""
    if isinstance(model.get("vocab"), list):
        return "Unigram"
    return "BPE" if "merges" in model else "WordPiece" if "max_input_chars_per_word" in model else "unknown"


class Words:
    """The vocabulary of a tokenizer.json by id, and what each token needs."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data, self.model = data, data["model"]
        vocabulary = self.model["vocab"]
        listed = isinstance(vocabulary, list)
        self.ids: dict[str, int] = (
            {str(entry[0]): number for number, entry in enumerate(vocabulary)} if listed else dict(vocabulary)
        )
        self.scores = [float(entry[1]) for entry in vocabulary] if listed else []
        self.added = {str(item["content"]): int(item["id"]) for item in data.get("added_tokens") or ()}
        self.token = {number: token for token, number in {**self.ids, **self.added}.items()}
        self.prefix = str(self.model.get("continuing_subword_prefix") or "")
        self.suffix = str(self.model.get("end_of_word_suffix") or "")
        self.merges = [_pair(merge) for merge in self.model.get("merges") or ()]
        self._rank = {pair: rank for rank, pair in reversed(list(enumerate(self.merges)))}

    def needed(self, corpus: Iterable[str]) -> set[int]:
        """Ids that stay whatever the corpus: special tokens, single characters of it, ASCII, bytes."""
        must = set(self.added.values()) | set(_ids_in(self.data.get("post_processor")))
        unknown = self.model.get("unk_token")
        must |= {self.ids[unknown]} if unknown in self.ids else set()
        if self.scores:
            must |= {int(self.model["unk_id"])} if self.model.get("unk_id") is not None else set()
            must.add(int(np.argmin(self.scores)))  # the score of the unknown token is derived from the lowest one
        characters = {letter for token in corpus for letter in self._bare(token)} | set(string.printable)
        every = any(part.get("type") == "ByteLevel" for part in _parts(self.data))
        for token, number in self.ids.items():
            bare = self._bare(token)
            if token in BYTES or (len(bare) == 1 and (every or bare in characters)):
                must.add(number)
        return must

    def _bare(self, token: str) -> str:
        body = token.removeprefix(self.prefix) if self.prefix and len(token) > len(self.prefix) else token
        return body.removesuffix(self.suffix) if self.suffix and len(body) > len(self.suffix) else body

    def way_to(self, number: int) -> set[int]:
        """A token and, for BPE, all tokens that its merges make on the way."""
        token = self.token[number]
        if not self.merges or token in self.added:
            return {number}
        return {number} | {self.ids[part] for part in self._derive(token) if part in self.ids}

    def _derive(self, token: str) -> set[str]:
        """Every symbol that appears while BPE merges the characters of one token."""
        symbols = self._characters(token)
        seen = set(symbols)
        while len(symbols) > 1:
            pairs = list(itertools.pairwise(symbols))
            best = min(pairs, key=lambda pair: self._rank.get(pair, len(self._rank)))
            if best not in self._rank:
                break
            at = pairs.index(best)
            symbols[at : at + 2] = [self._joined(*best)]
            seen.add(symbols[at])
        return seen

    def _characters(self, token: str) -> list[str]:
        first = self.prefix if self.prefix and token.startswith(self.prefix) else ""
        last = self.suffix if self.suffix and token.endswith(self.suffix) else ""
        letters = list(token[len(first) : len(token) - len(last)])
        symbols = [letter if at == 0 and not first else self.prefix + letter for at, letter in enumerate(letters)]
        return [*symbols[:-1], symbols[-1] + last] if symbols else [token]

    def _joined(self, left: str, right: str) -> str:
        return left + (right.removeprefix(self.prefix) if self.prefix else right)

    def only(self, keep: Array) -> dict[str, Any]:
        """The whole tokenizer.json with these tokens, renumbered."""
        new = {int(old): position for position, old in enumerate(keep)}
        made = {name: copy.deepcopy(part) for name, part in self.data.items() if name != "model"}
        model = {name: part for name, part in self.model.items() if name not in {"vocab", "merges"}}
        if self.scores:
            model["vocab"] = [self.model["vocab"][old] for old in keep.tolist() if old < len(self.scores)]
            if model.get("unk_id") is not None:
                model["unk_id"] = new[int(model["unk_id"])]
        else:
            kept = sorted((new[number], token) for token, number in self.ids.items() if number in new)
            model["vocab"] = {token: number for number, token in kept}
        if "merges" in self.model:
            here = {token for token, number in self.ids.items() if number in new}
            model["merges"] = [
                entry
                for entry, (left, right) in zip(self.model["merges"], self.merges, strict=True)
                if {left, right, self._joined(left, right)} <= here
            ]
        for item in made.get("added_tokens") or ():
            item["id"] = new[int(item["id"])]
        _renumber(made.get("post_processor"), new)
        return {**made, "model": model}


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return str(left), str(right)


def _parts(data: Any) -> Iterator[Mapping[str, Any]]:
    """Normalizers, pre-tokenizers, post-processors and decoders, those inside sequences included."""
    if isinstance(data, Mapping):
        yield data
        for name, value in data.items():
            if name not in {"model", "added_tokens"}:
                yield from _parts(value)
    elif isinstance(data, list):
        for value in data:
            yield from _parts(value)


def _ids_in(processor: Any) -> Iterator[int]:
    """Token ids that a post-processor writes."""
    for part in _parts(processor):
        if part.get("type") == "TemplateProcessing":
            yield from (int(number) for item in part["special_tokens"].values() for number in item["ids"])
        elif part.get("type") in {"BertProcessing", "RobertaProcessing"}:
            yield from (int(part["sep"][1]), int(part["cls"][1]))


def _renumber(processor: Any, new: Mapping[int, int]) -> None:
    for part in _parts(processor):
        if part.get("type") == "TemplateProcessing":
            for item in part["special_tokens"].values():
                item["ids"] = [new[int(number)] for number in item["ids"]]
        elif part.get("type") in {"BertProcessing", "RobertaProcessing"}:
            for side in ("sep", "cls"):
                part[side][1] = new[int(part[side][1])]  # type: ignore[index]


__all__ = ["TrimmedTokenizer", "trim_tokenizer"]
