"""Data as it was read, before a model says how to preprocess it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from compressor.types import Array

Text = str | tuple[str, str]  # a sentence, or a pair of them
Encoded = bytes | Path  # a picture that is still compressed
ONLY = ""  # the name of an array whose model input is not named by the data


@dataclass(frozen=True)
class RawPart:
    """Samples of one part and their labels as they stand in the source.

    ``samples`` by ``kind``: ``pictures`` uint8 (N, H, W, C); ``files`` compressed pictures; ``texts`` strings or pairs;
    ``words`` tuples of words; ``arrays`` name -> (N, ...).
    """

    kind: Literal["pictures", "files", "texts", "words", "arrays"]
    samples: Any  # Array | Sequence[Encoded] | Sequence[Text] | Mapping[str, Array], as `kind` says
    labels: Sequence[Any] | Array | None = None
    scores: Sequence[Any] | None = None  # of pairs of texts, as they stand in the source
    domains: Sequence[Any] | None = None  # of each sample, where the source has such a column

    def __len__(self) -> int:
        if isinstance(self.samples, Mapping):
            return len(next(iter(self.samples.values()), ()))
        return len(self.samples)

    def digests(self, *, normalised: bool = False) -> Array:
        """16-byte BLAKE2b of every sample, ``S16`` (N,). ``normalised`` ignores case and white space of texts."""
        parts = [hashlib.blake2b(data, digest_size=16).digest() for data in self._bytes(normalised)]
        return np.frombuffer(b"".join(parts), dtype="S16") if parts else np.empty(0, "S16")

    def _bytes(self, normalised: bool) -> Any:
        if isinstance(self.samples, Mapping):
            columns = [np.ascontiguousarray(column) for column in self.samples.values()]
            return (b"".join(column[row].tobytes() for column in columns) for row in range(len(self)))
        if isinstance(self.samples, np.ndarray):
            return (picture.tobytes() for picture in self.samples)
        if self.kind == "files":
            return (sample.read_bytes() if isinstance(sample, Path) else sample for sample in self.samples)
        return (_text_key(text, normalised).encode() for text in self.samples)

    def show(self, row: int) -> str:
        """A short description of one sample for messages."""
        if self.kind in ("texts", "words"):
            text = self.samples[row]
            words = " | ".join(text) if isinstance(text, tuple) else str(text)
            return f"`{words[:60]}{'...' if len(words) > 60 else ''}`"
        if self.kind == "files" and isinstance(self.samples[row], Path):
            return f"`{self.samples[row].name}`"
        return f"sample {row}"


def _text_key(text: Text, normalised: bool) -> str:
    joined = "\x1f".join(text) if isinstance(text, tuple) else text
    return " ".join(joined.casefold().split()) if normalised else joined


@dataclass(frozen=True)
class RawData:
    """All parts of a source. ``parts`` has ``train`` and perhaps ``test validation calibration transfer``."""

    parts: Mapping[str, RawPart]
    names: tuple[str, ...]  # class names in the order of the source's own class numbers; empty when unknown
    source: str
    notes: tuple[str, ...] = ()

    @property
    def sample(self) -> Array | Mapping[str, Array] | None:
        """One raw sample: a picture (H, W, C), an array, arrays by input name; None for texts."""
        part = self.parts["train"]
        if len(part) == 0 or part.kind in ("texts", "words"):
            return None
        if isinstance(part.samples, Mapping):
            row = {name: column[0] for name, column in part.samples.items()}
            return row[ONLY] if set(row) == {ONLY} else row
        if part.kind == "files":
            from compressor.data.images import decode

            return decode(part.samples[0])
        picture: Array = part.samples[0]
        return picture
