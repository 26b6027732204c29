"""Objectives between two tokenizers that compare distributions, over shared tokens or the teacher's (methods V1)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from compressor.config import Frozen
from compressor.distil.objectives.base import Batch, Signals, Step, Term, Vocabularies
from compressor.distil.objectives.crossvocab import _CrossVocabulary
from compressor.distil.objectives.divergence import forward_kl
from compressor.distil.objectives.rows import UNLABELLED, taught, term
from compressor.errors import StageError
from compressor.recipe import Positive


def spans(batch: Batch, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First byte, last byte and validity of the token that each position speaks of, (B, T) each.

    Without bytes (one tokenizer) a position is its own span.
    """
    valid = taught(batch, logits)
    if batch.ends is None:
        place = torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)
        return place, place + 1, valid
    if batch.labels is not None and batch.labels.shape == batch.ends.shape:
        valid = valid & (batch.labels != UNLABELLED)
    first = torch.zeros_like(batch.ends[:, :1]) if batch.starts is None else batch.starts[:, None]
    starts = torch.cat([first, batch.ends[:, :-1]], dim=1)
    return starts, batch.ends, valid & (batch.ends >= 0) & (batch.ends > starts)


class _SameText(_CrossVocabulary):
    """Reads where both tokenizers have the same text."""

    fields = frozenset({"mask", "labels", "ends", "vocabularies"})

    def _checked(self, s: Signals, t: Signals, batch: Batch) -> tuple[Tensor, Tensor, Batch]:
        student, teacher = s["logits"], t[self.other]
        if student.dim() != 3 or teacher.dim() != 3:
            raise StageError("two vocabularies are compared token by token", hint="For language models.")
        if batch.vocabularies is None and student.shape[-1] != teacher.shape[-1]:
            raise StageError(
                "the batch does not say which tokens of both vocabularies are the same",
                hint="Name a teacher with a tokenizer of its own in `match`, as `big:logits`.",
            )
        return student, teacher, batch.view or batch


class VocabularyMatch(_SameText):
    """The teacher's distribution over the tokens that both vocabularies have, where both cut the same token.

    Formula: tau^2 KL(p || q) over the shared tokens, p and q renormalised over them; mean over the positions whose next
    token begins and ends at the same bytes in both tokenizations. With one vocabulary it is `kd`.

    Shapes: logits (B, T_S, C_S) and (B, T_T, C_T); labels and `ends` of both, and `vocabularies`, in the batch.
    Paper: Kolesnikova et al., "Knowledge Distillation of Russian Language Models with Reduction of Vocabulary", 2022
    (methods V1, match).
    Defaults: temperature 2. Match: the further teacher, as `big:logits`.
    When: a student with a smaller or another vocabulary that shares many tokens with its teacher's.
    Worked number: the logits of `kd` with one vocabulary, temperature 1: 0.341269.
    """

    class Options(Frozen):
        temperature: Positive = 2.0

    def __call__(self, s: Signals, t: Signals, batch: Batch, step: Step) -> Term:
        student, teacher, view = self._checked(s, t, batch)
        own_first, own_last, own_valid = spans(batch, student)
        first, last, valid = spans(view, teacher)
        equal = (own_first[:, :, None] == first[:, None]) & (own_last[:, :, None] == last[:, None])
        equal = equal & own_valid[:, :, None] & valid[:, None]
        sample, place = equal.any(2).nonzero(as_tuple=True)
        rows = student[sample, place], teacher[sample, equal.int().argmax(2)[sample, place]]
        if batch.vocabularies is not None:
            same = batch.vocabularies.same
            rows = rows[0][:, same[:, 0]], rows[1][:, same[:, 1]]
        tau = self.options.temperature
        return term(tau**2 * forward_kl(rows[1], rows[0], tau).sum(), float(len(sample)), "vocab-match")


class VocabularyMap(_SameText):
    """The student's logits become logits of the teacher's tokens: pieces are joined along text and vocabulary.

    Formula: for a teacher's token that several of the student's make up, their logit vectors are averaged (or summed);
    the logit of a teacher's class is the logsumexp (or the sum) of the logits of the pieces that spell it; then tau^2
    KL(p || q) over the classes that can be spelt, mean over the teacher's tokens that begin and end where tokens of the
    student do. With one vocabulary it is `kd`.

    Shapes: as `vocab-match`.
    Paper: Kolesnikova et al., "Knowledge Distillation of Russian Language Models with Reduction of Vocabulary", 2022
    (methods V1, reduce and map).
    Defaults: temperature 2, reduce mean, join logsumexp. A row of the student is gathered once for each of the
    teacher's classes and pieces: mind memory with large vocabularies. Match: the further teacher, as `big:logits`.
    When: as `vocab-match`, where few tokens are shared.
    Worked number: the logits of `kd` with one vocabulary, temperature 1: 0.341269.
    """

    class Options(Frozen):
        temperature: Positive = 2.0
        reduce: Literal["mean", "sum"] = "mean"
        join: Literal["logsumexp", "sum"] = "logsumexp"

    def __call__(self, s: Signals, t: Signals, batch: Batch, step: Step) -> Term:
        student, teacher, view = self._checked(s, t, batch)
        own_first, own_last, own_valid = spans(batch, student)
        first, last, valid = spans(view, teacher)
        begins = (first[:, :, None] == own_first[:, None]) & own_valid[:, None]
        ends = (last[:, :, None] == own_last[:, None]) & own_valid[:, None]
        inside = (
            (own_first[:, None] >= first[:, :, None]) & (own_last[:, None] <= last[:, :, None]) & own_valid[:, None]
        )
        sample, place = (begins.any(2) & ends.any(2) & valid).nonzero(as_tuple=True)
        parts = inside[sample, place].to(student.dtype)  # (R, T_S)
        if self.options.reduce == "mean":
            parts = parts / parts.sum(1, keepdim=True)
        rows = torch.einsum("rt,rtc->rc", parts, student[sample])
        other = teacher[sample, place]
        if batch.vocabularies is not None:
            rows = joined(rows, batch.vocabularies, self.options.join)
            other = other[:, batch.vocabularies.known]
        tau = self.options.temperature
        return term(tau**2 * forward_kl(other, rows, tau).sum(), float(len(sample)), "vocab-map")


def joined(rows: Tensor, vocabularies: Vocabularies, how: str) -> Tensor:
    """Logits (R, C_S) of the student's tokens as logits (R, M) of the teacher's tokens that they spell."""
    fill = 0.0 if how == "sum" else float("-inf")
    table = torch.nn.functional.pad(rows.float(), (0, 1), value=fill)
    pieces = torch.where(vocabularies.pieces < 0, rows.shape[-1], vocabularies.pieces)
    gathered = table[:, pieces]
    return gathered.sum(-1) if how == "sum" else torch.logsumexp(gathered, dim=-1)
