"""Token classification: words with one tag each, tokenised; the first piece of a word carries its tag."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from compressor.data.labels import encode_labels
from compressor.data.raw import RawPart
from compressor.data.text import CHUNK, TokenStore, load_tokenizer
from compressor.errors import PlanError
from compressor.models.types import LoadedModel, TextInput
from compressor.types import Array

IGNORED = -100


@dataclass(frozen=True)
class Tagged:
    """A part of tagged words: its tokens, and int32 (N, max_length) labels by token, -100 where none counts."""

    store: TokenStore
    labels: Array | None


def tagged_words(
    part: RawPart, model: LoadedModel, names: tuple[str, ...], teacher: tuple[str, ...], name: str
) -> Tagged:
    """Tokenise the words of a part and lay their tags on the first pieces.

    Raises:
        PlanError: the samples are no lists of words, or tags and words differ in number or name.
    """
    if not isinstance(model.preprocess, TextInput) or part.kind != "words":
        hint = "Give json with lists of words and tags, or a .conll file with a word and its tag a line."
        raise PlanError.single("data.text", f"{name} holds no lists of words", hint=hint)
    tokenizer = load_tokenizer(model, model.preprocess)
    found: list[Any] = []
    for start in range(0, len(part), CHUNK):
        found += tokenizer.encode_batch(
            [list(words) for words in part.samples[start : start + CHUNK]], is_pretokenized=True
        )
    lengths = [len(encoding.ids) for encoding in found]
    store = TokenStore(
        ids=np.concatenate([np.asarray(encoding.ids, np.int32) for encoding in found]),
        types=np.concatenate([np.asarray(encoding.type_ids, np.int8) for encoding in found]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        truncated=sum(bool(encoding.overflowing) for encoding in found),
        preprocess=model.preprocess,
        specs={spec.name: spec for spec in model.inputs},
    )
    if part.labels is None:
        return Tagged(store, None)
    tags = _tags(part, names, teacher, model, name)
    labels = np.full((len(part), model.preprocess.max_length), IGNORED, np.int32)
    for row, encoding in enumerate(found):
        place, word = first_pieces(encoding.word_ids)
        labels[row, place] = tags[row][word]
    return Tagged(store, labels)


def first_pieces(words: Sequence[int | None]) -> tuple[Array, Array]:
    """Positions of the first token of each word, and the words' numbers.

    >>> first_pieces([None, 0, 0, 1, 2, None])[0].tolist()
    [1, 3, 4]
    """
    place = [i for i, word in enumerate(words) if word is not None and (i == 0 or words[i - 1] != word)]
    return np.array(place, np.int64), np.array([words[i] for i in place], np.int64)


def _tags(
    part: RawPart, names: tuple[str, ...], teacher: tuple[str, ...], model: LoadedModel, name: str
) -> list[Array]:
    assert part.labels is not None
    counts = [len(words) for words in part.samples]
    for row, (count, tags) in enumerate(zip(counts, part.labels, strict=True)):
        if len(tags) != count:
            raise PlanError.single("data.label", f"sample {row} of {name} has {count} words but {len(tags)} tags")
    classes = model.outputs[0].shape[-1]
    flat = encode_labels(
        [tag for tags in part.labels for tag in tags],
        teacher=teacher,
        names=names,
        classes=classes if isinstance(classes, int) else None,
        part=name,
    )
    return np.split(flat, np.cumsum(counts)[:-1])
