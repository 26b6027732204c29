"""Arrays with a JSON header as bytes, for models that run elsewhere: in a browser (targets/backends/web/page/runner.js
reads and writes the same), on a board (targets/remote/runner.py).

A message is the header's length (uint32, little endian), the header, and the bytes of the arrays it lists.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from compressor.types import Array


def encode(header: Mapping[str, Any], arrays: Mapping[str, Array]) -> bytes:
    """Header and arrays as one message."""
    tensors, parts = [], []
    for name, array in arrays.items():
        content = np.ascontiguousarray(array)
        tensors.append(
            {"name": name, "type": str(content.dtype), "dims": list(content.shape), "bytes": int(content.nbytes)}
        )
        parts.append(content.tobytes())
    head = json.dumps({**header, "tensors": tensors}).encode()
    return struct.pack("<I", len(head)) + head + b"".join(parts)


def decode(message: bytes) -> tuple[dict[str, Any], dict[str, Array]]:
    """Header and arrays of a message."""
    (size,) = struct.unpack_from("<I", message)
    header: dict[str, Any] = json.loads(message[4 : 4 + size])
    arrays: dict[str, Array] = {}
    offset = 4 + size
    for item in header.pop("tensors", []):
        end = offset + int(item["bytes"])
        arrays[item["name"]] = np.frombuffer(message[offset:end], item["type"]).reshape(item["dims"])
        offset = end
    return header, arrays
