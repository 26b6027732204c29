"""What a loaded model is, before anything is done to it. No torch at import time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from compressor.config import Frozen
from compressor.recipe import ImagePreprocess
from compressor.types import Task, TensorSpec

if TYPE_CHECKING:
    from torch import nn


class ImageInput(Frozen):
    """uint8 pictures (N, H, W, C) become the model's float32 input."""

    kind: Literal["image"] = "image"
    settings: ImagePreprocess
    resample: Literal["nearest", "bilinear", "bicubic"] = "bilinear"


class TextInput(Frozen):
    """Strings become token ids by the teacher's own tokenizer (the text of ``tokenizer.json``)."""

    kind: Literal["text"] = "text"
    tokenizer_file: str  # name of the file beside the manifest; bytes come from LoadedModel.files
    max_length: int
    pad_id: int
    mask_id: int | None = None  # stands for a hidden token; encoders only
    eos_id: int | None = None  # end of a document, or of a target; language and encoder-decoder models only
    start_id: int | None = None  # what a decoder begins with; encoder-decoder models only
    target_length: int | None = None  # tokens of a target with its end; encoder-decoder models only
    pair: bool = False  # samples are pairs of texts
    names: tuple[str, ...]  # model inputs made by it: input_ids, attention_mask, token_type_ids


class RawInput(Frozen):
    """Arrays go in as they are."""

    kind: Literal["raw"] = "raw"


Preprocess = Annotated[ImageInput | TextInput | RawInput, Field(discriminator="kind")]


@dataclass(frozen=True)
class Provenance:
    """Where a model came from; goes into every manifest."""

    source: str
    digest: str  # SHA-256 over the weights
    licence: str | None
    revision: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoadedModel:
    """A teacher, ready to be used.

    ``module`` is in evaluation mode, takes its inputs by name (``forward(input_ids=..., attention_mask=...)`` or
    ``forward(image)`` with the names of ``inputs``) and returns one tensor: logits (N, C) or unit
    embeddings (N, D).
    ``module`` is None for ONNX files: then only ``prune`` and ``quantize`` apply.
    """

    kind: Literal["checkpoint", "factory", "onnx"]
    task: Task
    module: nn.Module | None
    onnx: Path | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...]  # class names by output index; empty for embeddings
    preprocess: ImageInput | TextInput | RawInput
    provenance: Provenance
    files: Mapping[str, bytes] = field(default_factory=dict)  # tokenizer.json and the like, for packages
