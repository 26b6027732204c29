"""Objectives between two vocabularies: sorted probabilities and likelihoods of common text spans (methods X10, X11)."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.config import Frozen
from compressor.distil.objectives import layers
from compressor.distil.objectives.base import Batch, Counts, Needs, SignalObjective, Signals, Step, Term
from compressor.distil.objectives.divergence import log_probabilities
from compressor.distil.objectives.rows import UNLABELLED, compact, taught, term
from compressor.errors import StageError
from compressor.recipe import Match, Positive


class _CrossVocabulary(SignalObjective):
    """Reads the logits of both models, each over a vocabulary and token positions of its own."""

    default_match: ClassVar[Match | None] = Match(student="logits", teacher="logits", proj="none")
    fields: frozenset[str] = frozenset({"mask"})

    def bind(self, student: Counts, teacher: Counts) -> list[str]:
        assert self.match is not None  # there is a default
        pairs, problems = layers.pairs(self.match, student, teacher)
        if [pair[0] for pair in pairs] != ["logits"] or pairs[0][1].rpartition(":")[2] != "logits":
            problems = problems or ["compares `logits` with the `logits` of a teacher"]
        if not problems:
            self.other = pairs[0][1]
            names = frozenset({"logits"}), frozenset({self.other})
            self.needs = Needs(*names, self.fields, same_vocab=False)
        return problems


def sorted_distance(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """Sum of the absolute differences of the sorted probabilities, the smaller vocabulary filled with zeros: (...)."""
    size = max(teacher.shape[-1], student.shape[-1])
    p, q = (
        F.pad(log_probabilities(x, temperature).exp().sort(-1, descending=True).values, (0, size - x.shape[-1]))
        for x in (teacher, student)
    )
    return (p - q).abs().sum(-1)


class SortedProbabilities(_CrossVocabulary):
    """Teacher and student share no vocabulary: their sorted probabilities are compared (Wasserstein distance).

    Formula: sum over k of |sort(q)_k - sort(p)_k|, the smaller vocabulary filled with zeros; mean over the first
    min(T_S, T_T) taught tokens of a sample, mean over samples. 0 where one vocabulary is a permutation of the other.

    Shapes: logits (B, T_S, C_S) and (B, T_T, C_T), with the teacher's mask in the batch's `view`; or (B, C_S) and (B,
    C_T).
    Paper: Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs", 2024
    (methods X10).
    Defaults: temperature 1; the paper weighs it 1.5 beside labels (1). Match: the further teacher, as `big:logits`.
    When: a teacher with another tokenizer whose tokens cannot be aligned.
    Worked number: teacher [2,1,0,-1,0], student [1,0,.5,-.5]: 0.333467.
    """

    class Options(Frozen):
        temperature: Positive = 1.0

    def __call__(self, s: Signals, t: Signals, batch: Batch, step: Step) -> Term:
        student, teacher, tau = s["logits"], t[self.other], self.options.temperature
        if student.dim() == 2:
            values = sorted_distance(teacher, student, tau)
            return term(values.sum(), float(len(values)), "uld")
        own, other = taught(batch, student), taught(batch.view or batch, teacher)
        sizes = torch.minimum(own.sum(1), other.sum(1))
        length = max(1, int(sizes.max()))
        values = sorted_distance(compact(teacher, other, length), compact(student, own, length), tau)
        keep = torch.arange(length, device=sizes.device) < sizes[:, None]
        means = torch.where(keep, values, 0).sum(1) / sizes.clamp_min(1)
        return term(means.sum(), (sizes > 0).sum(), "uld")


def common_chunks(
    student_ends: Tensor, student_valid: Tensor, teacher_ends: Tensor, teacher_valid: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut two tokenizations of the same text where both have a boundary.

    Args:
        student_ends, teacher_ends: (B, T), the byte where each token ends, not falling within a sample.
        student_valid, teacher_valid: (B, T), which tokens count.

    Returns:
        The chunk of each token (B, T_S) and (B, T_T), -1 for tokens outside every chunk, and the chunks of each sample
        (B,). Tokens behind the last common boundary belong to none.

    >>> a, b = torch.tensor([[1, 3, 4, 6]]), torch.tensor([[3, 5, 6]])
    >>> every = torch.ones
    >>> common_chunks(a, every(1, 4).bool(), b, every(1, 3).bool())
    (tensor([[0, 0, 1, 1]]), tensor([[0, 1, 1]]), tensor([2]))
    """
    equal = (student_ends[:, :, None] == teacher_ends[:, None]) & student_valid[:, :, None] & teacher_valid[:, None]
    own = _chunk_of(student_ends, student_valid, equal.any(2))
    other = _chunk_of(teacher_ends, teacher_valid, equal.any(1))
    return own[0], other[0], own[1]


def _chunk_of(ends: Tensor, valid: Tensor, common: Tensor) -> tuple[Tensor, Tensor]:
    """Chunk of each token, and how many chunks; of tokens that end at one byte the last one closes the chunk."""
    later = torch.triu(torch.ones(ends.shape[1], ends.shape[1], dtype=torch.bool, device=ends.device), 1)
    followed = ((ends[:, :, None] == ends[:, None]) & valid[:, None] & later).any(2)
    closes = (common & valid & ~followed).long()
    count = closes.sum(1)
    before = closes.cumsum(1) - closes
    return torch.where(valid & (before < count[:, None]), before, -1), count


def without_first(own: Tensor, other: Tensor, count: Tensor, apart: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Chunks of :func:`common_chunks` without the first one of samples (B,) whose two texts begin ``apart``."""
    less = apart.long()
    chunks = [torch.where(x < 0, x, x - less[:, None]) for x in (own, other)]
    return chunks[0].clamp_min(-1), chunks[1].clamp_min(-1), (count - less).clamp_min(0)


def _apart(batch: Batch, view: Batch, like: Tensor) -> Tensor:
    own, other = (torch.zeros_like(like) if x.starts is None else x.starts for x in (batch, view))
    return own != other


def chunk_sums(values: Tensor, chunks: Tensor, count: int) -> Tensor:
    """Sum of ``values`` (B, T) over each chunk: (B, count); tokens with chunk -1 are left out."""
    found = values.new_zeros(len(values), count + 1)
    return found.scatter_add(1, torch.where(chunks < 0, count, chunks), values)[:, :count]


def likelihood_matching(teacher: Tensor, student: Tensor, scale: float, epsilon: float = 1e-6) -> Tensor:
    """Binary cross-entropy of e^(l_S / scale) against e^(l_T / scale), l the chunks' log-likelihoods (<= 0)."""
    a, b = teacher.float() / scale - epsilon, student.float() / scale - epsilon
    p = a.exp()
    return -(p * b + (1 - p) * (-torch.expm1(b)).log())


class ApproximateLikelihood(_CrossVocabulary):
    """The student finds each span of text as likely as the teacher does, whatever tokens either cuts it into.

    Formula: chunks are the spans between bytes where tokens of both models end (the first one counts where both also
    begin together); l = sum of the log-probabilities of a
    chunk's tokens; a = l_T / scale - 1e-6, b = l_S / scale - 1e-6; loss = -[e^a b + (1 - e^a) log(1 - e^b)], mean over
    chunks. Its minimum, at l_S = l_T, is not 0. Not offered: unbiased and space chunks, other differences, GradMag.

    Shapes: logits (B, T_S, C_S) and (B, T_T, C_T); labels (next tokens) and `ends` (bytes) of both in the batch and its
    `view`.
    Paper: Minixhofer et al., "Universal Cross-Tokenizer Distillation via Approximate Likelihood Matching", 2025
    (methods X11; unconstrained chunks).
    Defaults: scale 100. Match: the further teacher with a tokenizer of its own, as `big:logits`.
    When: a language model whose teacher has another tokenizer (`[[teacher.more]]`) on the same text.
    Worked number: log-likelihoods -3 of the teacher and -5 of the student: 0.137799.
    """

    class Options(Frozen):
        scale: Positive = 100.0

    fields = frozenset({"mask", "labels", "ends"})

    def __call__(self, s: Signals, t: Signals, batch: Batch, step: Step) -> Term:
        view = batch.view or batch
        own, own_ends, own_valid = _token_logs(s["logits"], batch)
        other, other_ends, other_valid = _token_logs(t[self.other], view)
        own_chunks, other_chunks, count = common_chunks(own_ends, own_valid, other_ends, other_valid)
        if batch.starts is not None or view.starts is not None:
            own_chunks, other_chunks, count = without_first(own_chunks, other_chunks, count, _apart(batch, view, count))
        most = max(1, int(count.max()))
        student, teacher = chunk_sums(own, own_chunks, most), chunk_sums(other, other_chunks, most)
        keep = torch.arange(most, device=count.device) < count[:, None]
        values = likelihood_matching(teacher, student, self.options.scale)
        return term(torch.where(keep, values, 0).sum(), count.sum(), "alm")


def _token_logs(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each next token (B, T), where it ends, and whether it counts."""
    labels, ends = batch.labels, batch.ends
    if labels is None or ends is None or labels.shape != logits.shape[:2] or ends.shape != labels.shape:
        raise StageError(
            "alm: the batch does not hold the next token of each position and the byte where it ends",
            hint="Approximate likelihood matching needs text with byte offsets of both tokenizers.",
        )
    valid = taught(batch, logits) & (labels != UNLABELLED) & (ends >= 0)
    logs = log_probabilities(logits, 1.0).gather(-1, labels.clamp_min(0).unsqueeze(-1))[..., 0]
    return torch.where(valid, logs, 0), ends, valid
