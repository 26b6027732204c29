"""Atomic checkpoints of plain tensors and numbers, and what a full disk looks like to the user."""

from __future__ import annotations

import errno
import hashlib
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError  # only its name: torch raises it for refused or damaged files
from typing import Any

import torch
from torch import nn

from compressor.errors import StageError
from compressor.types import write_atomic

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """A full disk or quota becomes a :class:`StageError` with a hint; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise StageError(
            f"the disk is full while writing below `{folder}`: {error.strerror}",
            hint="Free some space and run again: training resumes at the last checkpoint, which is intact.",
        ) from error


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, strings, lists, dicts) so that a reader sees the old file or the new one."""
    stream = io.BytesIO()
    torch.save(dict(state), stream)
    write_atomic(path, stream.getvalue())


def load(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """The checkpoint at ``path``, or None when there is none.

    Raises:
        StageError: it is damaged, or belongs to another configuration, seed, teacher, data or student.
    """
    if not path.exists():
        return None
    hint = f"Delete `{path}` to train from the start."
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, UnpicklingError) as error:
        raise StageError(f"the checkpoint `{path}` cannot be read: {error}", hint=hint) from error
    if state.get("fingerprint") != fingerprint:
        raise StageError(
            f"the checkpoint `{path}` belongs to another run: its stage, seed, teacher, data or student differ",
            hint=hint,
        )
    return state


def state_digest(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of a module's state."""
    found = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        found.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(plain.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
