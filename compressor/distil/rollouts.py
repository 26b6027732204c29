"""On-policy batches: the student writes, the teacher judges (methods X1), with a replay buffer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compressor.distil.generation import end_token, generate
from compressor.distil.objectives.base import Batch
from compressor.distil.stream import UNLABELLED
from compressor.errors import StageError
from compressor.language import Rollouts


def batch_of(labels: Tensor, inputs: Mapping[str, Tensor], *, by_token: bool) -> Batch:
    """What belongs to these samples; with ``by_token`` (logits (B, T, C)) labels (B, L) are cut to the batch's length.

    In tagged text only the tokens with a tag are taught: one a word. Samples without any tag count with all tokens.
    """
    mask = inputs.get("attention_mask")
    if mask is None or labels.dim() != 2 or not by_token:
        return Batch(labels, mask)
    width = mask.shape[1]
    if labels.shape[1] < width:
        labels = nn.functional.pad(labels, (0, width - labels.shape[1]), value=UNLABELLED)
    labels = labels[:, :width]
    tagged = labels != UNLABELLED
    response = torch.where(tagged.any(1, keepdim=True), tagged, mask != 0)
    return Batch(labels, mask, response=response)


class OnPolicy:
    """Decides by (seed, step) which steps are on-policy and makes their batches.

    Nothing is drawn from the global random state, so that a run with ``fraction`` 0 equals one without rollouts bit for
    bit, and a resumed run continues as an undisturbed one would.
    """

    def __init__(self, config: Rollouts, student: nn.Module, seed: int) -> None:
        self.config, self.student, self.seed = config, student, seed
        self.end = end_token(student)
        self.buffer: list[dict[str, Tensor]] = []

    def batch(self, inputs: Mapping[str, Tensor], step: int) -> tuple[dict[str, Tensor], Batch] | None:
        """Model inputs and batch of an on-policy step; None when this step learns from the data."""
        if self._uniform("fraction", step) >= self.config.fraction:
            return None
        if self.buffer and self._uniform("replay", step) < self.config.replay:
            stored = self.buffer[int(self._uniform("which", step) * len(self.buffer))]
        else:
            stored = self._write(inputs, step)
            if self.config.replay:
                self.buffer = [*self.buffer, stored][-self.config.buffer :]
        return _taught(stored)

    def _write(self, inputs: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        shortest = ids.shape[1] if mask is None else int(mask.sum(1).min())
        length = min(self.config.prompt_tokens, shortest)
        if length < 1:
            raise StageError("a sample has no token to continue", hint="Leave empty texts out of the data.")
        made = generate(
            self.student, ids[:, :length], self.config.max_new_tokens, temperature=self.config.temperature,
            top_k=self.config.top_k, seed=_number(self.seed, "tokens", step) >> 1, end=self.end,
        )  # fmt: skip
        return {"ids": made.ids, "mask": made.mask, "prompt": torch.tensor(length)}

    def _uniform(self, purpose: str, step: int) -> float:
        return _number(self.seed, purpose, step) / 2**64

    def state(self) -> list[dict[str, Tensor]]:
        """For the checkpoint."""
        return self.buffer

    def restore(self, state: list[dict[str, Tensor]]) -> None:
        """Continue from a checkpoint."""
        self.buffer = list(state)


def _number(seed: int, purpose: str, step: int) -> int:
    """64 bits that depend on nothing else."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{purpose}:{step}".encode()).digest()[:8], "big")


def _taught(stored: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Batch]:
    """The distribution at t speaks of token t + 1, so what is taught begins at the prompt's last token."""
    ids, mask, prompt = stored["ids"], stored["mask"], int(stored["prompt"])
    response = torch.zeros_like(mask, dtype=torch.bool)
    response[:, prompt - 1 : -1] = mask[:, prompt:] != 0
    batch = Batch(
        torch.full_like(ids, UNLABELLED),
        mask,
        response=response,
        student_made=torch.ones(len(ids), dtype=torch.bool, device=ids.device),
    )
    return {"input_ids": ids, "attention_mask": mask}, batch


def state_of(rollouts: OnPolicy | None) -> list[dict[str, Any]]:
    """The replay buffer for the checkpoint; nothing without rollouts."""
    return [] if rollouts is None else rollouts.state()
