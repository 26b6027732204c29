"""On-policy batches: the student writes, the teacher judges (methods X1), with a replay buffer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from compressor.distil.generation import end_token, generate, write_targets
from compressor.distil.objectives.base import Batch
from compressor.distil.stream import UNLABELLED
from compressor.errors import StageError
from compressor.language import Rollouts
from compressor.models.signals import output_mask
from compressor.models.text2text import SOURCE
from compressor.schedule import Schedule


def batch_of(labels: Tensor, inputs: Mapping[str, Tensor], *, by_token: bool) -> Batch:
    """What belongs to these samples; with ``by_token`` (logits (B, T, C)) labels (B, L) are cut to the batch's length.

    In tagged text only the tokens with a tag are taught: one a word. Samples without any tag count with all tokens.
    """
    mask = output_mask(inputs)
    source = inputs.get("attention_mask") if "decoder_attention_mask" in inputs else None
    if mask is None or labels.dim() != 2 or not by_token:
        return Batch(labels, mask, source=source)
    width = mask.shape[1]
    if labels.shape[1] < width:
        labels = nn.functional.pad(labels, (0, width - labels.shape[1]), value=UNLABELLED)
    labels = labels[:, :width]
    tagged = labels != UNLABELLED
    response = torch.where(tagged.any(1, keepdim=True), tagged, mask != 0)
    return Batch(labels, mask, response=response, source=source)


class OnPolicy:
    """Decides by (seed, step) which steps are on-policy and makes their batches.

    Nothing is drawn from the global random state, so that a run with ``fraction`` 0 equals one without rollouts bit for
    bit, and a resumed run continues as an undisturbed one would.
    """

    def __init__(self, config: Rollouts, student: nn.Module, seed: int) -> None:
        self.config, self.student, self.seed = config, student, seed
        self.end = end_token(student)
        self.buffer: list[dict[str, Tensor]] = []
        self.fraction, self.replay = (
            value.first if isinstance(value, Schedule) else value for value in (config.fraction, config.replay)
        )

    @property
    def courses(self) -> dict[str, float | Schedule]:
        """The values that a schedule may move, by the name that :meth:`set` reads."""
        return {"rollouts.fraction": self.config.fraction, "rollouts.replay": self.config.replay}

    def set(self, values: Mapping[str, float]) -> None:
        """Take the scheduled values of this step."""
        self.fraction = values.get("rollouts.fraction", self.fraction)
        self.replay = values.get("rollouts.replay", self.replay)

    def step(self, inputs: dict[str, Tensor], batch: Batch, step: int) -> tuple[dict[str, Tensor], Batch]:
        """What a step learns from: the data's rows, the student's, or (``beside``) both, marked by ``student_made``."""
        written = self.batch(inputs, step)
        if not self.config.beside:
            return written or (inputs, batch)
        none = torch.zeros(len(inputs["input_ids"]), dtype=torch.bool, device=inputs["input_ids"].device)
        batch = replace(batch, student_made=none)
        return (inputs, batch) if written is None else _together((inputs, batch), written)

    def batch(self, inputs: Mapping[str, Tensor], step: int) -> tuple[dict[str, Tensor], Batch] | None:
        """Model inputs and batch of an on-policy step; None when this step learns from the data."""
        if self._uniform("fraction", step) >= self.fraction:
            return None
        if self.buffer and self._uniform("replay", step) < self.replay:
            stored = self.buffer[int(self._uniform("which", step) * len(self.buffer))]
        else:
            stored = self._write(inputs, step)
            if self.config.replay:  # a schedule may begin at 0
                self.buffer = [*self.buffer, stored][-self.config.buffer :]
        return _taught(stored)

    def _write(self, inputs: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        if "decoder_input_ids" in inputs:
            return self._write_targets({name: inputs[name] for name in SOURCE}, step)
        if self.config.guess is not None:
            return self._guess(inputs, self.config.guess, step)
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

    def _guess(self, inputs: Mapping[str, Tensor], share: float, step: int) -> dict[str, Tensor]:
        """The data's tokens, some replaced by what the student expects after the tokens before them, in one pass.

        Every guess is the student's likeliest token after the data's own prefix: the errors of writing without its
        cost. Source: Zhong et al., "Learning from Imperfect Data: Towards Efficient Knowledge Distillation of
        Autoregressive Language Models for Text-to-SQL" (KID), 2024 (methods X14), from its abstract.
        """
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        training = [part for part in self.student.modules() if part.training]
        self.student.eval()
        with torch.no_grad():
            expected = self.student(**inputs).argmax(-1)[:, :-1]
        for part in training:
            part.training = True
        random = torch.Generator().manual_seed(_number(self.seed, "guess", step) >> 1)
        replaced = torch.rand(expected.shape, generator=random).to(ids.device) < share
        mask = torch.ones_like(ids) if mask is None else mask
        replaced &= mask[:, 1:] != 0
        made = torch.cat([ids[:, :1], torch.where(replaced, expected, ids[:, 1:])], dim=1)
        return {"ids": made, "mask": mask, "prompt": torch.tensor(1)}

    def _write_targets(self, sources: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        made = write_targets(
            self.student, sources, self.config.max_new_tokens, temperature=self.config.temperature,
            top_k=self.config.top_k, seed=_number(self.seed, "tokens", step) >> 1,
        )  # fmt: skip
        return {**sources, "ids": made.ids, "mask": made.mask}

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
    if "prompt" not in stored:
        return _taught_targets(stored)
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


def _taught_targets(stored: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Batch]:
    """Targets that the student wrote: the decoder reads them from the start token to the one before the last."""
    read, real = stored["ids"][:, :-1], stored["mask"][:, 1:]
    inputs = {name: stored[name] for name in SOURCE} | {"decoder_input_ids": read, "decoder_attention_mask": real}
    batch = Batch(
        torch.full_like(read, UNLABELLED),
        real,
        response=real != 0,
        student_made=torch.ones(len(read), dtype=torch.bool, device=read.device),
        source=stored["attention_mask"],
    )
    return inputs, batch


def _together(
    first: tuple[Mapping[str, Tensor], Batch], second: tuple[Mapping[str, Tensor], Batch]
) -> tuple[dict[str, Tensor], Batch]:
    """Rows of two batches under each other, the shorter ones filled up with masked tokens."""
    width = max(inputs["input_ids"].shape[1] for inputs, _ in (first, second))

    def stacked(values: Sequence[Tensor | None], fill: float) -> Tensor:
        rows = [value for value in values if value is not None]  # the loop fills these of every language model's batch
        return torch.cat([nn.functional.pad(row, (0, width - row.shape[1]), value=fill) for row in rows])

    names = [name for name in ("input_ids", "attention_mask") if name in first[0]]
    batches = (first[1], second[1])
    masks = [batch.mask for batch in batches]
    taught = [batch.response if batch.response is not None else batch.mask for batch in batches]
    return {name: stacked([first[0][name], second[0][name]], 0) for name in names}, Batch(
        stacked([batch.labels for batch in batches], UNLABELLED),
        stacked(masks, 0),
        response=stacked([None if rows is None else rows != 0 for rows in taught], False),
        student_made=torch.cat([batch.student_made for batch in batches if batch.student_made is not None]),
    )


def state_of(rollouts: OnPolicy | None) -> list[dict[str, Any]]:
    """The replay buffer for the checkpoint; nothing without rollouts."""
    return [] if rollouts is None else rollouts.state()
