"""What an engine file says without a GPU: its header, its normalised digest, and the manifest beside it."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compressor.errors import CompileError
from compressor.types import write_atomic

# Tags as in trtexec's source (--getPlanVersionOnly) and as observed in the files.
FLAVOUR_OF_TAG = {b"vtrt": "rtx", b"ftrt": "enterprise"}
_MYELIN_SYMBOL = re.compile(rb"__mye\d+")
_HEADER_BYTES = 28
SCHEMA = 1


@dataclass(frozen=True)
class EngineHeader:
    """First 28 bytes of a plan: tag (0..3), plan size as little-endian int64 (16..23), version (24..27)."""

    tag: str
    flavour: str
    version: str
    size: int


def read_header(path: Path) -> EngineHeader:
    """Parse the header. Raises :class:`CompileError` for a file that is no engine, or (RTX) is cut short."""
    with path.open("rb") as stream:
        head = stream.read(_HEADER_BYTES)
    if len(head) < _HEADER_BYTES or head[:4] not in FLAVOUR_OF_TAG:
        raise CompileError(f"`{path.name}` is not a TensorRT engine", hint="Build it again.")
    flavour = FLAVOUR_OF_TAG[head[:4]]
    (size,) = struct.unpack_from("<q", head, 16)
    if flavour == "rtx" and size != path.stat().st_size:
        raise CompileError(
            f"`{path.name}` has {path.stat().st_size} bytes, its header says {size}", hint="Build it again."
        )
    return EngineHeader(head[:4].decode(), flavour, ".".join(str(byte) for byte in head[24:28]), size)


def normalised_digest(path: Path) -> str:
    """SHA-256 of the engine with compiler symbol counters masked.

    Two builds of one model differ in the numbers of ``__mye<n>`` symbols and in nothing else, so the raw digest says
    nothing.
    """
    return "sha256:" + hashlib.sha256(_MYELIN_SYMBOL.sub(b"__mye#", path.read_bytes())).hexdigest()


def write_manifest(path: Path, content: Mapping[str, Any]) -> Path:
    """Write the JSON beside an engine or in a kit."""
    write_atomic(path, json.dumps({"schema": SCHEMA, **content}, indent=2, sort_keys=True) + "\n")
    return path


def engine_facts(path: Path) -> dict[str, Any]:
    """Header and normalised digest as plain data for the manifest."""
    return {**asdict(read_header(path)), "normalised_digest": normalised_digest(path)}
