"""Outputs of artifacts on splits, kept between profiles and runs."""

from __future__ import annotations

import io
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import numpy as np

from compressor.ledger import digest_of
from compressor.types import Array, write_atomic


class PredictionStore(MutableMapping[str, Array]):
    """Outputs of artifacts on splits, one ``.npy`` a key, so that profiles that share a file score it once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{digest_of(key)[:32]}.npy"

    def __getitem__(self, key: str) -> Array:
        try:
            made: Array = np.load(self._path(key), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            raise KeyError(key) from None
        return made

    def __setitem__(self, key: str, value: Array) -> None:
        stream = io.BytesIO()
        np.save(stream, value, allow_pickle=False)
        write_atomic(self._path(key), stream.getvalue())

    def __delitem__(self, key: str) -> None:
        self._path(key).unlink()

    def __iter__(self) -> Any:
        raise TypeError("keys are stored as digests and cannot be listed")

    def __len__(self) -> int:
        return len(list(self.folder.glob("*.npy")))

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._path(key).is_file()
