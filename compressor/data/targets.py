"""Pairs of a source text and the target text that an encoder-decoder model shall write for it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from compressor.data.raw import RawPart
from compressor.data.text import CHUNK, TextSplit, TokenStore, load_tokenizer, token_store
from compressor.errors import PlanError
from compressor.models.types import LoadedModel, TextInput
from compressor.types import Array, Inputs

IGNORED = -100


@dataclass(frozen=True)
class Targets:
    """What a model shall write for each sample of a split, and how ids become text.

    ``references``: the target texts as they stand in the data. A decoder begins with ``start`` and has written all
    when it writes ``end``, after ``limit`` tokens at most; it never writes ``pad``.
    """

    references: Sequence[str]
    start: int
    end: int
    pad: int
    limit: int
    decode: Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class TargetStore:
    """A whole part: tokens of the sources, and ragged tokens of the targets, each with its end token."""

    source: TokenStore
    ids: Array  # int32 (tokens,)
    offsets: Array  # int64 (N + 1,)
    truncated: int
    texts: Sequence[str]
    decode: Callable[[Sequence[int]], str]

    def target(self, row: int) -> Array:
        return self.ids[self.offsets[row] : self.offsets[row + 1]]


@dataclass(eq=False)
class TargetSplit:
    """One part of the data. ``rows`` of target ids (N, L), ``IGNORED`` after the end, are the labels."""

    name: str
    labels: Array | None  # int32 (N, L): the target's tokens; never None here
    digests: Array
    source: TextSplit
    targets: Targets

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, index: Array) -> Inputs:
        """Source and decoder inputs (n, S) and (n, T) by name: the decoder reads what stands before each token."""
        assert self.labels is not None
        labels = self.labels[index]
        real = labels != IGNORED
        width = max(1, int(real.sum(axis=1).max(initial=1)))
        before = np.full((len(index), width), self.targets.pad, np.int64)
        before[:, 0] = self.targets.start
        before[:, 1:] = np.where(real, labels, self.targets.pad)[:, : width - 1]
        mask = real[:, :width].astype(np.int64)
        return {**self.source.batch(index), "decoder_input_ids": before, "decoder_attention_mask": mask}


def target_store(part: RawPart, model: LoadedModel, name: str) -> TargetStore:
    """Tokenise the sources and the targets of a part, which stand where a classifier's labels do.

    A target is cut to the model's ``target_length`` with its end token, which is added where the tokenizer adds none.

    Raises:
        PlanError: there are no targets, or one is no text.
    """
    source = token_store(part, model)
    preprocess = source.preprocess
    hint = "Give `data.target`: the column of what the model shall write."
    if part.labels is None:
        raise PlanError.single("data.target", f"{name} has no targets", hint=hint)
    texts = list(part.labels)
    wrong = next((row for row, text in enumerate(texts) if not isinstance(text, str)), None)
    if wrong is not None:
        what = f"the target of sample {wrong} of {name} is a {type(texts[wrong]).__name__}, not a text"
        raise PlanError.single("data.target", what, hint=hint)
    tokenizer = load_tokenizer(model, preprocess)
    tokenizer.enable_truncation(_length(preprocess))
    ids: list[Array] = []
    truncated = 0
    for start in range(0, len(texts), CHUNK):
        for encoding in tokenizer.encode_batch(texts[start : start + CHUNK]):
            truncated += bool(encoding.overflowing)
            ids.append(_ended(encoding.ids, preprocess))
    return TargetStore(
        source,
        np.concatenate(ids) if ids else np.empty(0, np.int32),
        np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64),
        truncated,
        texts,
        decoder_of(tokenizer),
    )


def decoder_of(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Token ids to text without special tokens."""

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    return decode


def _length(preprocess: TextInput) -> int:
    return preprocess.target_length or preprocess.max_length


def _ended(ids: Sequence[int], preprocess: TextInput) -> Array:
    end = preprocess.eos_id
    row = [*ids] if ids and ids[-1] == end else [*ids[: _length(preprocess) - 1], end]
    return np.asarray(row, np.int32)


def target_split(name: str, store: TargetStore, rows: Array, part: RawPart) -> TargetSplit:
    """These samples of a part."""
    preprocess = store.source.preprocess
    assert preprocess.start_id is not None
    assert preprocess.eos_id is not None
    texts = tuple(store.texts[row] for row in rows)
    sources = part.digests()[rows]
    targets = Targets(
        texts, preprocess.start_id, preprocess.eos_id, preprocess.pad_id, _length(preprocess), store.decode
    )
    labels = table_of([store.target(int(row)) for row in rows])
    source = TextSplit(name, None, sources, store.source, rows)
    return TargetSplit(name, labels, pair_digests(sources, texts), source, targets)


def table_of(rows: Sequence[Array]) -> Array:
    """Ragged ids as int32 (N, L), filled with ``IGNORED``."""
    width = max((len(row) for row in rows), default=1)
    table = np.full((len(rows), width), IGNORED, np.int32)
    for place, row in enumerate(rows):
        table[place, : len(row)] = row
    return table


def pair_digests(sources: Array, targets: Sequence[str]) -> Array:
    """Of both texts: bank and predictions belong to pairs, while duplicates are looked for among sources."""
    made = [
        hashlib.blake2b(bytes(source) + target.encode(), digest_size=16).digest()
        for source, target in zip(sources, targets, strict=True)
    ]
    return np.frombuffer(b"".join(made), dtype="S16") if made else np.empty(0, "S16")
