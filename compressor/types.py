"""Frozen values that flow from stage to stage. No torch and no vendor SDK is imported here."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Inputs = Mapping[str, Array]

Task = Literal[
    "image-classification",
    "text-classification",
    "multi-label-image-classification",
    "multi-label-text-classification",
    "token-classification",
    "sentence-embedding",  # judged against the teacher's own similarities
    "sentence-similarity",  # judged against human scores of pairs
    "retrieval",  # judged by the ranking of passages
    "causal-lm",
    "text2text-generation",  # encoder-decoder models: a target text for a source text
    "translation",  # the same, judged by BLEU
    "summarization",  # the same, judged by ROUGE-L
    "generic",
]
MULTI_LABEL: frozenset[Task] = frozenset({"multi-label-image-classification", "multi-label-text-classification"})
EMBEDDING: frozenset[Task] = frozenset({"sentence-embedding", "sentence-similarity", "retrieval"})
TEXT2TEXT: frozenset[Task] = frozenset({"text2text-generation", "translation", "summarization"})
Role = Literal["teacher", "student", "null-twin"]


class Format(StrEnum):
    """File format of an artifact."""

    ONNX = "onnx"


class Origin(StrEnum):
    """Where a number comes from."""

    MEASURED = "measured"  # ran on the real device or on this machine, which is named
    PROXY = "proxy"  # ran on a stand-in, which is named
    SIMULATED = "simulated"  # bit-true simulator
    ESTIMATED = "estimated"  # a compiler's or a model's figure


@dataclass(frozen=True)
class TensorSpec:
    """A model's input or output. A dynamic dimension is a string (``"batch"``, ``"sequence"``)."""

    name: str
    dtype: str  # numpy name: float32, int64, uint8
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Measurement:
    """A number with its unit, its origin and the device that gave it."""

    value: float
    unit: str
    origin: Origin
    device: str
    detail: Mapping[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Unavailable:
    """A number that cannot be had here, and why. Never written as -1, 0, NaN or a blank."""

    reason: str
    hint: str = ""


Figure = Measurement | Unavailable


@dataclass(frozen=True)
class LayerFact:
    """What one stage did to one layer, or why it left it alone."""

    stage: str
    layer: str
    action: str  # pruned, kept, quantized, left-float, copied, dropped, fused ...
    before: str
    after: str
    reason: str = ""


def stand_in_path(path: Path) -> Path:
    """Where the emulation of a file lies that ONNX Runtime does not run as the device does (float16, float8)."""
    return path.with_suffix(".emulated.onnx")


@dataclass(frozen=True)
class Artifact:
    """A model file that could ship.

    ``scheme`` says how it was quantized (empty for fp32): engine, activation, weight, granularity, operators.
    """

    name: str  # unique within a run: "student/int8-static-per-channel"
    role: Role
    path: Path
    format: Format
    precision: str  # fp32, int8-static, int8-dynamic
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    digest: str
    parameters: int
    scheme: Mapping[str, str] = field(default_factory=dict)
    facts: tuple[LayerFact, ...] = ()
    runtime: str = ""  # in a race: the target that runs it; empty: the profile's own

    @property
    def file_bytes(self) -> int:
        return self.path.stat().st_size


@dataclass(frozen=True)
class StageResult:
    """What a stage left behind in its content-addressed folder."""

    stage: str
    key: str
    folder: Path
    seconds: float
    reused: bool
    metrics: Mapping[str, float | int | str] = field(default_factory=dict)
    facts: tuple[LayerFact, ...] = ()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, as ``sha256:<hex>``."""
    with path.open("rb") as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()


def array_digest(*arrays: Array) -> str:
    """SHA-256 over dtype, shape and bytes of the arrays, in order."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return "sha256:" + digest.hexdigest()


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write through a temporary file in the same folder, fsync, rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(data.encode() if isinstance(data, str) else data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
