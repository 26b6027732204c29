"""Models as the data sees them: no weights, only inputs, outputs and preprocessing."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from compressor.models.types import ImageInput, LoadedModel, Provenance, RawInput, TextInput
from compressor.recipe import ImagePreprocess
from compressor.types import TensorSpec


def picture_model(
    shape: tuple[int, ...] = (1, 28, 28), labels: tuple[str, ...] = tuple("0123456789"), **settings: object
) -> LoadedModel:
    return LoadedModel(
        kind="onnx",
        task="image-classification",
        module=None,
        onnx=None,
        inputs=(TensorSpec("image", "float32", ("batch", *shape)),),
        outputs=(TensorSpec("logits", "float32", ("batch", len(labels))),),
        labels=labels,
        preprocess=ImageInput(settings=ImagePreprocess(**settings)),
        provenance=Provenance("test", "sha256:0", None),
    )


def array_model(width: int = 3, classes: int = 2) -> LoadedModel:
    return LoadedModel(
        kind="onnx",
        task="generic",
        module=None,
        onnx=None,
        inputs=(TensorSpec("x", "float32", ("batch", width)),),
        outputs=(TensorSpec("y", "float32", ("batch", classes)),),
        labels=(),
        preprocess=RawInput(),
        provenance=Provenance("test", "sha256:0", None),
    )


@pytest.fixture(scope="session")
def text_model() -> Callable[..., LoadedModel]:
    """A text classifier with a word tokenizer of the ten words a..j."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghij"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    text = tokenizer.to_str().encode()

    def make(
        labels: tuple[str, ...] = ("neg", "pos"), axis: int | str = "sequence", dtype: str = "int64"
    ) -> LoadedModel:
        names = ("input_ids", "attention_mask", "token_type_ids")
        return LoadedModel(
            kind="onnx",
            task="text-classification" if labels else "sentence-embedding",
            module=None,
            onnx=None,
            inputs=tuple(TensorSpec(name, dtype, ("batch", axis)) for name in names),
            outputs=(TensorSpec("logits", "float32", ("batch", len(labels) or 8)),),
            labels=labels,
            preprocess=TextInput(tokenizer_file="tokenizer.json", max_length=6, pad_id=0, names=names),
            provenance=Provenance("test", "sha256:0", None),
            files={"tokenizer.json": text},
        )

    return make


def write_idx(folder: Path, prefix: str, pixels: np.ndarray, labels: np.ndarray, *, packed: bool) -> None:
    for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
        data = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
        path = folder / f"{prefix}-{kind}-ubyte{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(data) if packed else data)


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """60 train and 20 test pictures of 6x5 pixels, no two alike."""
    random = np.random.default_rng(0)
    folder = tmp_path / "idx"
    folder.mkdir()
    for prefix, count, packed in (("train", 60, True), ("t10k", 20, False)):
        write_idx(folder, prefix, random.integers(0, 256, (count, 6, 5)), np.arange(count) % 10, packed=packed)
    return folder
