"""The masked-token term of encoder pre-training: part of F2 and the first stage of T1 of the methods catalogue."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.distil.objectives import layers
from compressor.distil.objectives.base import (
    Batch,
    Committed,
    Context,
    Counts,
    Needs,
    Pass,
    SignalObjective,
    Signals,
    Step,
    Steps,
    Term,
)
from compressor.errors import StageError


class MaskedTokens(SignalObjective):
    """No teacher, no labels: the student says which tokens were hidden from it (masked language modelling).

    Formula: mean over hidden tokens of -log softmax(E (LayerNorm(GELU(W h + b))) + c)[token], E the student's own table
    of token embeddings, h its last hidden state there. W, b, c and the norm are dropped at export.

    Shapes: student hidden[-1] (B, T, d); `masked` (B, T) of the batch: the token that was hidden, -100 elsewhere.
    Paper: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", 2019; a
    term of Sanh et al., "DistilBERT", 2019 (methods F2) and the first stage of Turc et al., "Well-Read Students Learn
    Better", 2019 (methods T1).
    Defaults: none. `augment = ["mask"]` in the stage hides 15 % of the tokens behind the tokenizer's mask token (all of
    them: BERT's 10 % of random and 10 % of kept tokens are left out). DistilBERT weighs it 2 beside `kd` (5) and
    `cosine` (1).
    When: a compact encoder that shall read much unlabelled text before it is taught a task.
    Worked number: a table of 4 zero vectors: ln 4 = 1.386294.
    """

    place: ClassVar[str] = "masked tokens"
    _table: nn.Embedding | None = None

    def bind(self, student: Counts, teacher: Counts) -> list[str]:
        blocks = layers.count(student, "hidden")
        self.own = f"hidden[{blocks - 1}]"
        self.needs = Needs(frozenset({self.own}), frozenset(), frozenset({"mask", "masked"}), same_vocab=False)
        known = blocks and layers.count(student, "qkv")
        return [] if known else ["the student is no transformer encoder: it has no `hidden` and `qkv` signals"]

    def unfit(self, student: nn.Module) -> list[str]:
        return [] if _token_table(student) is not None else ["the student has no table of token embeddings"]

    def install(self, student: nn.Module, example: Signals) -> Steps:
        self._table = _token_table(student)
        return ()

    def commit(self, student: nn.Module, steps: Steps, validation: Pass | None) -> Committed:
        return Committed(steps)

    def prepare(self, ctx: Context) -> None:
        assert self._table is not None  # `install` comes first
        tokens, width = self._table.weight.shape
        parts = nn.Module()
        parts.dense = nn.Linear(ctx.student[self.own].shape[-1], width)
        parts.norm = nn.LayerNorm(width)
        parts.bias = nn.Parameter(torch.zeros(tokens))
        with torch.no_grad():
            for parameter in parts.dense.parameters():
                bound = parts.dense.in_features**-0.5
                parameter.copy_((torch.rand(parameter.shape, generator=ctx.generator) * 2 - 1) * bound)
        self._parts = parts.to(ctx.device)

    def modules(self) -> nn.Module | None:
        return self._parts

    def __call__(self, s: Signals, t: Signals, batch: Batch, step: Step) -> Term:
        if batch.masked is None or self._table is None:
            raise StageError("masked-tokens: no token is hidden", hint='Set augment = ["mask"] in the stage.')
        hidden = batch.masked >= 0
        rows = self._parts.norm(F.gelu(self._parts.dense(s[self.own][hidden].float())))
        logits = F.linear(rows, self._table.weight.float(), self._parts.bias)
        total = F.cross_entropy(logits, batch.masked[hidden], reduction="sum")
        return Term(total, hidden.sum(), {"masked tokens": total.detach()})


def _token_table(student: nn.Module) -> nn.Embedding | None:
    """The first embedding of a model, which transformers call the word embeddings."""
    return next((part for part in student.modules() if isinstance(part, nn.Embedding)), None)


def hidden_tokens(inputs: Tensor, original: Tensor) -> Tensor:
    """Which tokens (B, T) were hidden: their number, -100 where ``inputs`` are the ``original`` ones.

    >>> hidden_tokens(torch.tensor([[1, 9, 3]]), torch.tensor([[1, 2, 3]]))
    tensor([[-100,    2, -100]])
    """
    return torch.where(inputs != original, original, -100)
