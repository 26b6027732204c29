"""One text in blocks of two tokenizers: for each block of the student, what the teacher's tokenizer makes of it.

Both streams are made from whole documents, so no word is cut where a block begins. A document's end token stands for
one byte more than its text, which both tokenizers share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from compressor.data.blocks import IGNORED, LEAST_TOKENS, BlockSplit, digests_of
from compressor.data.raw import RawData, RawPart
from compressor.data.surfaces import Vocabulary, shared_ids, spelt, vocabulary_of
from compressor.data.text import CHUNK, load_tokenizer
from compressor.data.types import Split
from compressor.errors import PlanError
from compressor.models.types import LoadedModel, TextInput
from compressor.types import Array


@dataclass(eq=False)
class AlignedSplit(BlockSplit):
    """A part of a text as a teacher with another tokenizer sees it, block by block of its student.

    ``labels`` (N, W) are the teacher's next tokens, ``ends`` (N, W) the bytes where they end and ``starts`` (N,) where
    the first of them begins; ``student_ends`` (N, L) and 0 are the student's. All bytes are counted from the end of the
    block's first student token; -1 is none.
    """

    ends: Array
    starts: Array
    student_ends: Array

    def fields(self, index: Array) -> dict[str, Array]:
        """``ends``, ``starts`` and ``student_ends`` of these blocks, not cut to the batch's width."""
        found = {"ends": self.ends, "starts": self.starts, "student_ends": self.student_ends}
        return {name: array[index].astype(np.int64) for name, array in found.items()}


@dataclass(frozen=True)
class Stream:
    """Token ids of all documents, and the byte of the whole text where each token ends."""

    ids: Array  # int32 (S,)
    ends: Array  # int64 (S,)


def aligned_view(
    raw: RawData,
    rows: Mapping[str, tuple[str, Array]],
    student: LoadedModel,
    teacher: LoadedModel,
    splits: Mapping[str, Split],
) -> dict[str, Split]:
    """The blocks of ``splits`` as the teacher's tokenizer cuts their text.

    Args:
        raw, rows: the documents, and which of them each part takes (``DataBundle.rows``).
        student, teacher: whose tokenizers cut; the blocks are the student's.
        splits: the student's parts, in blocks.

    Raises:
        PlanError: a model reads no text, or a block is longer than the teacher's positions.
    """
    found: dict[str, Split] = {}
    for name, split in splits.items():
        home, index = rows[name]
        if isinstance(split, BlockSplit):
            own, other = (stream_of(raw.parts[home], index, model) for model in (student, teacher))
            found[name] = aligned(name, split, own, other, teacher)
    return found


def stream_of(part: RawPart, rows: Array, model: LoadedModel) -> Stream:
    """All tokens of these documents, each with the byte where it ends in the text of all of them."""
    preprocess = model.preprocess
    if not isinstance(preprocess, TextInput):
        raise PlanError.single("teacher.more", f"`{model.provenance.source}` reads no text")
    tokenizer = load_tokenizer(model, preprocess)
    tokenizer.no_truncation()
    texts = [part.samples[int(row)] for row in rows]
    ids: list[Array] = []
    ends: list[Array] = []
    at = 0
    for start in range(0, len(texts), CHUNK):
        chunk = texts[start : start + CHUNK]
        for text, encoding in zip(chunk, tokenizer.encode_batch(chunk), strict=True):
            own_ids, own_ends = _document(text, encoding, preprocess.eos_id)
            ids.append(own_ids)
            ends.append(own_ends + at)
            at += len(text.encode()) + 1
    found = Stream(np.concatenate(ids), np.concatenate(ends))
    if len(found.ids) < LEAST_TOKENS:
        raise PlanError.single("data", f"is {len(found.ids)} tokens to `{model.provenance.source}`: too few")
    return found


def _document(text: str, encoding: Any, end: int | None) -> tuple[Array, Array]:
    """Tokens of one document and the bytes where they end; the end token, or else the last one, ends a byte later."""
    places = np.concatenate([[0], np.cumsum([len(letter.encode()) for letter in text])]).astype(np.int64)
    found = places[[stop for _, stop in encoding.offsets]] if encoding.ids else np.empty(0, np.int64)
    ends = np.maximum.accumulate(found) if len(found) else found  # special tokens stand at 0 wherever they are
    ids = np.asarray(encoding.ids, np.int32)
    if end is not None:
        return np.append(ids, np.int32(end)), np.append(ends, places[-1] + 1)
    if len(ends):
        ends[-1] = places[-1] + 1
    return ids, ends


def aligned(name: str, split: BlockSplit, own: Stream, other: Stream, teacher: LoadedModel) -> AlignedSplit:
    """Each block of ``split``: the teacher's tokens that end inside the text which the block predicts."""
    size, lengths = split.ids.shape[1], split.lengths
    begin = np.arange(len(split)) * size
    if int(lengths.sum()) + 1 != len(own.ids):
        raise PlanError.single(f"data.{name}", "its blocks are not made of these documents alone")
    zero, last = own.ends[begin], own.ends[begin + lengths]
    first = np.clip(np.searchsorted(other.ends, zero, "right"), 1, len(other.ids) - 1)
    count = np.maximum(np.searchsorted(other.ends, last, "right") - first, 0)
    width = max(1, int(count.max(initial=1)))
    _check_positions(teacher, width)
    places = np.arange(width)[None]
    keep = places < count[:, None]
    where = np.where(keep, first[:, None] + places, first[:, None])
    real = keep.copy()
    real[:, 0] = True  # a block without a token of the teacher still is one token of input
    preprocess = teacher.preprocess
    assert isinstance(preprocess, TextInput)  # the stream was made with it
    ids = np.where(real, other.ids[where - 1], preprocess.pad_id).astype(np.int32)
    student = own.ends[np.minimum(begin[:, None] + 1 + np.arange(size)[None], len(own.ends) - 1)] - zero[:, None]
    return AlignedSplit(
        name,
        np.where(keep, other.ids[where], IGNORED).astype(np.int32),
        digests_of(ids),
        ids,
        np.maximum(count, 1),
        teacher.inputs,
        np.where(keep, other.ends[where] - zero[:, None], -1).astype(np.int32),
        (other.ends[first - 1] - zero).astype(np.int32),
        np.where(np.arange(size)[None] < lengths[:, None], student, -1).astype(np.int32),
    )


@dataclass(frozen=True)
class Shared:
    """Two vocabularies side by side, int64.

    ``same`` (K, 2): student id and teacher id of the same token. ``known`` (M,): the teacher's tokens that the
    student's tokenizer can spell, ``pieces`` (M, P): the student's tokens that spell them, -1 where there are fewer.
    """

    same: Array
    known: Array
    pieces: Array


def shared_vocabulary(student: LoadedModel, teacher: LoadedModel) -> Shared:
    """What both tokenizers have, and how the student's spells the teacher's tokens."""
    own, other = (_vocabulary(model) for model in (student, teacher))
    both = shared_ids(other, own)
    same = np.array(sorted(both.items()), np.int64).reshape(-1, 2)
    back = {old: new for new, old in reversed(sorted(both.items()))}
    preprocess = student.preprocess
    assert isinstance(preprocess, TextInput)  # its vocabulary was read
    tokenizer = load_tokenizer(student, preprocess)
    tokenizer.no_truncation()
    absent = [number for number in other.surfaces if number not in back]
    spelling = {number: [token] for number, token in back.items()}
    spelling |= {number: ids for number, ids in zip(absent, spelt(other, absent, tokenizer), strict=True) if ids}
    known = sorted(spelling)
    pieces = np.full((len(known), max((len(spelling[n]) for n in known), default=1)), -1, np.int64)
    for row, number in enumerate(known):
        pieces[row, : len(spelling[number])] = spelling[number]
    return Shared(same, np.array(known, np.int64), pieces)


def _vocabulary(model: LoadedModel) -> Vocabulary:
    preprocess = model.preprocess
    if not isinstance(preprocess, TextInput):
        raise PlanError.single("teacher.more", f"`{model.provenance.source}` reads no text")
    return vocabulary_of(model.files[preprocess.tokenizer_file], "teacher.more")


def _check_positions(teacher: LoadedModel, width: int) -> None:
    config = getattr(getattr(teacher.module, "model", None), "config", None)
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and width > positions:
        what = f"a block is {width} tokens to `{teacher.provenance.source}`, which has {positions} positions"
        raise PlanError.single("data.max_length", what, hint="Make `data.max_length` smaller.")
