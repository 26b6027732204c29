"""Tiny encoder-decoder models over letters, and pairs of texts for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from compressor.data import load_data
from compressor.data.raw import RawData, RawPart
from compressor.data.types import DataBundle
from compressor.models import load_model
from compressor.models.types import LoadedModel
from compressor.recipe import DataConfig, TeacherConfig

KNOWN = {token: number for number, token in enumerate(["<pad>", "</s>", "?", *"abcdefgh"])}
SIZES = {"vocab_size": len(KNOWN), "d_model": 16, "pad_token_id": 0, "eos_token_id": 1}
SIDES = {f"{side}_{name}": value for side in ("encoder", "decoder")
         for name, value in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 24))}  # fmt: skip
DATA = DataConfig(max_length=12, target_length=6, validation=8, calibration=4, near_duplicates="off")


def save(folder: Path, kind: str = "t5", layers: int = 2, decoder: int | None = None) -> Path:
    """A checkpoint folder: ``t5``, ``bart`` or ``marian`` with random weights, one token a letter."""
    tokenizer = Tokenizer(models.WordLevel(KNOWN, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="?")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    model(kind, layers, decoder).save_pretrained(folder)
    return folder


def model(kind: str, layers: int = 2, decoder: int | None = None) -> torch.nn.Module:
    """One of the architectures, new weights."""
    if kind == "t5":
        return T5ForConditionalGeneration(
            T5Config(**SIZES, d_kv=8, d_ff=24, num_heads=2, num_layers=layers, num_decoder_layers=decoder or layers,
                     decoder_start_token_id=0, dropout_rate=0.0)
        )  # fmt: skip
    config, build = (BartConfig, BartForConditionalGeneration) if kind == "bart" else (MarianConfig, MarianMTModel)
    sides = SIDES | {"encoder_layers": layers, "decoder_layers": decoder or layers}
    return build(config(**SIZES, **sides, max_position_embeddings=24, decoder_start_token_id=0, dropout=0.0,
                        bos_token_id=None, forced_eos_token_id=None))  # fmt: skip


def loaded(folder: Path, task: str | None = None) -> LoadedModel:
    return load_model(TeacherConfig(model=str(folder), task=task), data=DATA)


def raw(count: int = 60, seed: int = 1) -> RawData:
    """Sources of 2 to 8 letters; the target is the source in upside-down order, four letters at most."""
    random = np.random.default_rng(seed)
    words = ["".join(random.choice(list("abcdefgh"), random.integers(2, 9))) for _ in range(count * 2)]
    words = list(dict.fromkeys(words))[:count]
    return RawData({"train": RawPart("texts", words, [" ".join(word[::-1][:4]) for word in words])}, (), "toy")


def bundle(model: LoadedModel, count: int = 60) -> DataBundle:
    return load_data(DATA, model, seed=0, raw=raw(count))
