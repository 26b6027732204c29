"""Texts: tokenised once by the teacher's own tokenizer, padded per batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from compressor.data.pairs import Groups
from compressor.data.raw import RawPart, Text
from compressor.errors import ConfigError, PlanError
from compressor.models.types import LoadedModel, TextInput
from compressor.types import Array, Inputs, TensorSpec

CHUNK = 8192  # texts tokenised at a time: bounds the memory of the tokenizer's own objects
MADE = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class TokenStore:
    """Ragged token ids of a whole part: sample ``i`` is ``ids[offsets[i]:offsets[i + 1]]``."""

    ids: Array  # int32 (tokens,)
    types: Array  # int8 (tokens,): which of a pair of texts
    offsets: Array  # int64 (N + 1,)
    truncated: int
    preprocess: TextInput
    specs: Mapping[str, TensorSpec]


def token_store(part: RawPart, model: LoadedModel) -> TokenStore:
    """Tokenise a part. :class:`ConfigError` without the package ``tokenizers``; :class:`PlanError` for odd inputs."""
    preprocess = model.preprocess
    if not isinstance(preprocess, TextInput):
        raise PlanError.single(
            "data", "holds texts, but the model takes none", hint="A tokenizer.json must lie beside the model."
        )
    strange = [name for name in preprocess.names if name not in MADE]
    if strange:
        raise PlanError.single("teacher.model", f"wants the inputs {', '.join(strange)}, which no tokenizer makes")
    tokenizer = load_tokenizer(model, preprocess)
    if model.task == "causal-lm":
        tokenizer.no_truncation()  # documents are packed into blocks
    ids: list[Array] = []
    types: list[Array] = []
    lengths: list[int] = []
    truncated = 0
    texts: Sequence[Any] = part.samples
    for start in range(0, len(texts), CHUNK):
        for encoding in tokenizer.encode_batch(_checked(texts[start : start + CHUNK], start)):
            ids.append(np.asarray(encoding.ids, np.int32))
            types.append(np.asarray(encoding.type_ids, np.int8))
            lengths.append(len(encoding.ids))
            truncated += bool(encoding.overflowing)
    return TokenStore(
        ids=np.concatenate(ids) if ids else np.empty(0, np.int32),
        types=np.concatenate(types) if types else np.empty(0, np.int8),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        truncated=truncated,
        preprocess=preprocess,
        specs={spec.name: spec for spec in model.inputs},
    )


def _checked(texts: Sequence[Text], start: int) -> list[Text]:
    for row, text in enumerate(texts):
        good = isinstance(text, str) or (isinstance(text, tuple) and all(isinstance(part, str) for part in text))
        if not good:
            raise PlanError.single("data.text", f"sample {start + row} is a {type(text).__name__}, not a text")
    return list(texts)


def load_tokenizer(model: LoadedModel, preprocess: TextInput) -> Any:
    """The teacher's tokenizer, cutting at its limit and padding nothing."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ConfigError.single(
            "the data", "data.text", "texts need the package `tokenizers`", hint="pip install tokenizers"
        ) from error
    try:
        tokenizer = Tokenizer.from_str(model.files[preprocess.tokenizer_file].decode())
    except KeyError as error:
        raise PlanError.single("teacher.model", "brings no tokenizer") from error
    except Exception as error:  # the Rust binding raises plain Exception
        raise ConfigError.single("the tokenizer", preprocess.tokenizer_file, f"cannot be read: {error}") from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(preprocess.max_length)
    return tokenizer


@dataclass(eq=False)
class TextSplit:
    """One part of a text data set."""

    name: str
    labels: Array | None
    digests: Array
    store: TokenStore
    rows: Array  # positions in the store
    judgements: Array | None = None  # what people say of pairs of texts; for evaluation only
    groups: Groups | None = None  # texts that belong together; for training

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> Array:
        """Tokens of each sample, int64 (N,): for batches of like length."""
        offsets = self.store.offsets
        lengths: Array = offsets[self.rows + 1] - offsets[self.rows]
        return lengths

    def batch(self, index: Array) -> Inputs:
        """Integer inputs (n, T) by name; T is this batch's longest text, or the model's own fixed length."""
        store = self.store
        rows = self.rows[index]
        starts = store.offsets[rows]
        lengths = store.offsets[rows + 1] - starts
        width = int(lengths.max(initial=1))
        fixed = store.specs[store.preprocess.names[0]].shape[-1]
        width = fixed if isinstance(fixed, int) else width
        columns = np.arange(width)[None]
        mask = columns < lengths[:, None]
        where = np.where(mask, starts[:, None] + columns, 0)
        made = {
            "input_ids": np.where(mask, store.ids[where], store.preprocess.pad_id),
            "attention_mask": mask,
            "token_type_ids": np.where(mask, store.types[where], 0),
        }
        return {name: made[name].astype(store.specs[name].dtype) for name in store.preprocess.names}
