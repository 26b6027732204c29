"""Output distributions of both models row by row: aligned positions, their labels, and which of them count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressor.distil.objectives.base import Batch, Counts, Needs, SignalObjective, Signals, Step, Term
from compressor.errors import StageError

UNLABELLED = -100  # torch's ignore index of cross-entropy


@dataclass(frozen=True)
class Rows:
    """Logits (..., C) of both models at the same positions; ``labels`` and ``keep`` (...) of these positions."""

    student: Tensor
    teacher: Tensor
    labels: Tensor | None
    keep: Tensor | None  # None: all count

    def total(self, values: Tensor) -> tuple[Tensor, Tensor | float]:
        """Sum and count of values (...) at the rows that count."""
        if self.keep is None:
            return values.sum(), float(values.numel())
        return torch.where(self.keep, values, 0).sum(), self.keep.sum()


def compact(values: Tensor, valid: Tensor, length: int) -> Tensor:
    """The first ``length`` valid positions of each sample, in order: (B, T, ...) -> (B, length, ...).

    Samples with fewer valid positions are filled with others of theirs, which the caller must not count.
    """
    order = torch.sort((~valid).to(torch.int8), dim=1, stable=True).indices[:, :length]
    index = order.reshape(*order.shape, *[1] * (values.dim() - 2)).expand(-1, -1, *values.shape[2:])
    return values.gather(1, index)


def taught(batch: Batch, logits: Tensor) -> Tensor:
    """(B, T) true at the positions of sequence logits (B, T, C) that are taught."""
    found = batch.taught
    if found is None:
        return torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    return found != 0


def paired(student: Tensor, teacher: Tensor, batch: Batch) -> Rows:
    """Rows of both models that speak of the same thing, with a common number of classes.

    Where the teacher saw the samples in another view (a longer context), the k-th taught position of the student
    belongs to the k-th of the teacher.

    Raises:
        StageError: classes or positions differ.
    """
    labels = batch.labels
    keep = taught(batch, student) if student.dim() == 3 and batch.taught is not None else None
    if batch.view is not None and student.dim() == 3:
        own, other = taught(batch, student), taught(batch.view, teacher)
        if not torch.equal(own.sum(1), other.sum(1)):
            raise StageError(
                "teacher and student have different numbers of taught tokens",
                hint="Both views must hold the same response; with two tokenizers use `uld` or `alm`.",
            )
        length = int(own.sum(1).max())
        keep = torch.arange(length, device=own.device) < own.sum(1, keepdim=True)
        labels = compact(labels, own, length) if labels is not None and labels.shape == own.shape else labels
        student, teacher = compact(student, own, length), compact(teacher, other, length)
    if student.shape != teacher.shape:
        raise StageError(
            f"the student's logits are {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}",
            hint="Student and teacher must have the same classes in the same order.",
        )
    return Rows(student, teacher, labels, keep)


def with_labels(rows: Rows, name: str) -> Rows:
    """``rows`` where only labelled positions count; the labels of the others are 0.

    Raises:
        StageError: there is not one class for each row.
    """
    labels = rows.labels
    if labels is None or labels.shape != rows.student.shape[:-1] or labels.is_floating_point():
        have = "none" if labels is None else f"{labels.dtype} {tuple(labels.shape)}".removeprefix("torch.")
        raise StageError(
            f"{name}: logits {tuple(rows.student.shape)} need one class a row, the labels are {have}",
            hint="This objective is for labelled data with one class a sample (or token).",
        )
    known = labels != UNLABELLED
    keep = known if rows.keep is None else known & rows.keep
    return Rows(rows.student, rows.teacher, labels.clamp_min(0), keep)


class LogitObjective(SignalObjective):
    """A value a row of the two models' logits, mean over samples (or taught tokens of 3-D logits)."""

    log_name: ClassVar[str] = "logits"
    labelled: ClassVar[bool] = False
    batch_wise: ClassVar[bool] = False

    def bind(self, student: Counts, teacher: Counts) -> list[str]:
        batch = frozenset({"mask", "labels"} if self.labelled else {"mask"})
        self.needs = Needs(frozenset({"logits"}), frozenset({"logits"}), batch, batch_wise=self.batch_wise)
        missing = [who for who, have in (("student", student), ("teacher", teacher)) if "logits" not in have]
        return [f"the {who} has no logits" for who in missing]

    def values(self, rows: Rows) -> Tensor:
        """One value a row; temperature factors are part of it."""
        raise NotImplementedError

    def found(self, s: Signals, t: Signals, batch: Batch) -> Rows:
        """The rows of a batch; labels are checked where the objective reads them."""
        rows = paired(s["logits"], t["logits"], batch)
        return with_labels(rows, self.log_name) if self.labelled else rows

    def __call__(self, s: Signals, t: Signals, batch: Batch, step: Step) -> Term:
        rows = self.found(s, t, batch)
        return term(*rows.total(self.values(rows)), self.log_name)


def term(total: Tensor, count: Tensor | float, name: str) -> Term:
    """A term that logs its sum under ``name``."""
    return Term(total, count, {name: total.detach()})
