"""Speculative decoding: a small draft proposes, the target checks several tokens in one pass (methods X4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.distil.generation import language_model


@dataclass(frozen=True)
class Speculated:
    """``ids`` int64 (1, P + n), and how many tokens each pass of the target gave (1 to ``ahead`` + 1)."""

    ids: Tensor
    gained: tuple[int, ...]

    @property
    def mean_gained(self) -> float:
        """Mean tokens a pass of the target: the block efficiency of Leviathan et al., 2023."""
        return sum(self.gained) / len(self.gained)


class _Reader:
    """A model and the cache of what it has read."""

    def __init__(self, module: nn.Module) -> None:
        self.model = language_model(module)
        self.cache: Any = None
        self.read = 0

    def logits(self, ids: Tensor) -> Tensor:
        """Read what of ``ids`` (1, T) is new; logits of these positions."""
        out = self.model(input_ids=ids[:, self.read :], past_key_values=self.cache, use_cache=True)
        self.cache, self.read = out.past_key_values, ids.shape[1]
        return out.logits

    def forget(self, length: int) -> None:
        """Keep the first ``length`` tokens only."""
        if length < self.read:
            self.cache.crop(length - self.read)  # negative: so many tokens go
            self.read = length


def speculate(target: nn.Module, draft: nn.Module, prompt: Tensor, new_tokens: int, ahead: int = 4) -> Speculated:
    """Greedy continuation of ``prompt`` int64 (1, P) by exactly ``new_tokens``: the very tokens the target alone gives.

    Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023, at temperature 0: of ``ahead``
    proposed tokens those before the first disagreement are kept, and the target's own token follows. Both models must
    have the same vocabulary.
    """
    checker, proposer = _Reader(target), _Reader(draft)
    ids, gained = prompt, []
    goal = prompt.shape[1] + new_tokens
    training = [part for module in (target, draft) for part in module.modules() if part.training]
    target.eval()
    draft.eval()
    try:
        with torch.no_grad():
            while ids.shape[1] < goal:
                length = ids.shape[1]
                candidate = _propose(proposer, ids, ahead)
                wanted = checker.logits(candidate)[:, -(ahead + 1) :].argmax(-1)
                agreed = int((candidate[0, length:] == wanted[0, :-1]).long().cumprod(0).sum())
                ids = torch.cat([candidate[:, : length + agreed], wanted[:, agreed : agreed + 1]], dim=1)
                gained.append(agreed + 1)
                checker.forget(length + agreed)
                proposer.forget(length + agreed)
    finally:
        for part in training:
            part.training = True
    return Speculated(ids[:, :goal], tuple(gained))


def _propose(reader: _Reader, ids: Tensor, ahead: int) -> Tensor:
    for _ in range(ahead):
        ids = torch.cat([ids, reader.logits(ids)[:, -1:].argmax(-1)], dim=1)
    return ids
