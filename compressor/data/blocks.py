"""Text of a language model: documents in one stream of tokens, cut into blocks; the label is the next token."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from compressor.data.text import TokenStore
from compressor.errors import PlanError
from compressor.models.types import TextInput
from compressor.types import Array, Inputs, TensorSpec

IGNORED = -100
LEAST_TOKENS = 2  # a block of fewer has nothing to predict


@dataclass(eq=False)
class BlockSplit:
    """One part of a text in blocks. ``ids`` int32 (N, L), ``lengths`` (N,): real tokens, fewer in the last."""

    name: str
    labels: Array | None  # int32 (N, L): the next token of the stream, -100 after the last
    digests: Array
    ids: Array
    lengths: Array
    specs: tuple[TensorSpec, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, index: Array) -> Inputs:
        """Integer inputs (n, T) by name."""
        lengths = self.lengths[index]
        fixed = self.specs[0].shape[-1]
        width = fixed if isinstance(fixed, int) else int(lengths.max(initial=1))
        mask = np.arange(width)[None] < lengths[:, None]
        made = {"input_ids": self.ids[index][:, :width], "attention_mask": mask, "token_type_ids": np.zeros_like(mask)}
        return {spec.name: made[spec.name].astype(spec.dtype) for spec in self.specs}


def packed(name: str, store: TokenStore, rows: Array, specs: tuple[TensorSpec, ...], *, labelled: bool) -> BlockSplit:
    """The documents ``rows`` of a part, each followed by the end token where the model has one, in blocks.

    Raises:
        PlanError: there are fewer than two tokens.
    """
    preprocess = store.preprocess
    end = [] if preprocess.eos_id is None else [preprocess.eos_id]
    pieces: list[Array] = []
    for row in rows:
        pieces += [store.ids[store.offsets[row] : store.offsets[row + 1]], np.array(end, np.int32)]
    stream = np.concatenate(pieces) if pieces else np.empty(0, np.int32)
    if len(stream) < LEAST_TOKENS:
        raise PlanError.single(f"data.{name}", f"has {len(stream)} tokens, too few for a language model")
    return blocks_of(name, stream, preprocess, specs, labelled=labelled)


def blocks_of(
    name: str, stream: Array, preprocess: TextInput, specs: tuple[TensorSpec, ...], *, labelled: bool = True
) -> BlockSplit:
    """A stream of token ids as blocks of ``preprocess.max_length``."""
    size = preprocess.max_length
    fixed = specs[0].shape[-1]
    size = fixed if isinstance(fixed, int) else size
    count = -(-(len(stream) - 1) // size)  # the last token is only ever a label
    ids = np.full(count * size, preprocess.pad_id, np.int32)
    labels = np.full(count * size, IGNORED, np.int32)
    ids[: len(stream) - 1], labels[: len(stream) - 1] = stream[:-1], stream[1:]
    lengths = np.full(count, size, np.int64)
    lengths[-1] = len(stream) - 1 - (count - 1) * size
    rows, answers = ids.reshape(count, size), labels.reshape(count, size)
    return BlockSplit(name, answers if labelled else None, digests_of(rows), rows, lengths, specs)


def digests_of(ids: Array) -> Array:
    """16 bytes of BLAKE2b for each row of ids, ``S16`` (N,)."""
    found = [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in ids]
    return np.frombuffer(b"".join(found), dtype="S16")
