"""Thin modules around a transformers model: inputs by name, one tensor out. Needs torch."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Pooling(nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    """Token vectors (B, T, D) and mask (B, T) -> one vector a sentence (B, D): mean over real tokens, or the first."""

    def __init__(self, mode: Literal["mean", "cls"]) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        if self.mode == "cls":
            return hidden[:, 0]
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1.0)


class TextModel(nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    """``input_ids``, ``attention_mask``, perhaps ``token_type_ids``, int64 (B, T) -> logits (B, C) or vectors (B, D).

    The arguments are spelt out rather than ``**inputs`` because the exporter names dynamic axes by argument.
    """

    def __init__(self, model: nn.Module, pooling: Pooling | None = None) -> None:
        super().__init__()
        self.model = model
        self.pooling = pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        if self.pooling is None:
            return self.model(**inputs).logits
        hidden = self.model(**inputs).last_hidden_state
        return F.normalize(self.pooling(hidden, attention_mask), dim=-1)


class EncoderDecoder(nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    """``input_ids``, ``attention_mask`` int64 (B, S), ``decoder_input_ids``, ``decoder_attention_mask`` int64 (B, T)
    -> logits (B, T, V); the logits at t speak of the target's token t, which the decoder has not read yet.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor, decoder_attention_mask: Tensor
    ) -> Tensor:
        return self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
        ).logits


class ImageModel(nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    """``pixel_values`` float32 (B, C, H, W) -> logits (B, classes)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).logits


def state_digest(module: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of the state dict, in order of the names."""
    digest = hashlib.sha256()
    state: dict[str, Any] = module.state_dict()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return "sha256:" + digest.hexdigest()
