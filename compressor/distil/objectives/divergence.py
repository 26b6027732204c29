"""The divergence family between two categorical distributions given by logits (methods L2). Pure functions.

All take teacher and student logits (..., C), work in float32 with natural logarithms, and return one value per row
(...).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """``log softmax(logits / temperature)`` in float32."""
    logits = logits.float()
    return F.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def forward_kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p || q), p the teacher: covers every mode of the teacher."""
    log_p, log_q = log_probabilities(teacher, temperature), log_probabilities(student, temperature)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def soft_cross_entropy(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """-sum p log q: the gradient of KL(p || q), another value (the teacher's entropy stays in it)."""
    p = log_probabilities(teacher, temperature).exp()
    return -(p * log_probabilities(student, temperature)).sum(-1)


def reverse_kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(q || p): seeks one mode of the teacher."""
    return forward_kl(student, teacher, temperature)


def jensen_shannon(teacher: Tensor, student: Tensor, temperature: float = 1.0, beta: float = 0.5) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; forward KL at beta 0, reverse at 1."""
    if beta in (0.0, 1.0):
        return forward_kl(teacher, student, temperature) if beta == 0.0 else reverse_kl(teacher, student, temperature)
    log_p, log_q = log_probabilities(teacher, temperature), log_probabilities(student, temperature)
    p, q = log_p.exp(), log_q.exp()
    log_m = (beta * p + (1 - beta) * q).clamp_min(torch.finfo(torch.float32).tiny).log()
    return beta * (p * (log_p - log_m)).sum(-1) + (1 - beta) * (q * (log_q - log_m)).sum(-1)


def skew_kl(teacher: Tensor, student: Tensor, temperature: float = 1.0, alpha: float = 0.1) -> Tensor:
    """KL(p || alpha p + (1 - alpha) q): bounded where the student gives no mass."""
    log_p, log_q = log_probabilities(teacher, temperature), log_probabilities(student, temperature)
    p = log_p.exp()
    mixed = (alpha * p + (1 - alpha) * log_q.exp()).clamp_min(torch.finfo(torch.float32).tiny).log()
    return (p * (log_p - mixed)).sum(-1)


def total_variation(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """Half the sum of |p - q|."""
    p, q = log_probabilities(teacher, temperature).exp(), log_probabilities(student, temperature).exp()
    return 0.5 * (p - q).abs().sum(-1)


def adaptive_kl(teacher: Tensor, student: Tensor, temperature: float = 1.0, head: float = 0.5) -> Tensor:
    """Both directions of KL, weighted by the gaps |p - q| over the teacher's head (mass >= ``head``) and tail."""
    log_p, log_q = log_probabilities(teacher, temperature), log_probabilities(student, temperature)
    p, q = log_p.exp(), log_q.exp()
    ordered, order = p.sort(dim=-1, descending=True, stable=True)
    in_head = ordered.cumsum(-1) - ordered < head  # the class that crosses the mark belongs to the head
    gaps = (p - q).abs().detach().gather(-1, order)
    of_head, of_tail = (gaps * in_head).sum(-1), (gaps * ~in_head).sum(-1)
    forward, backward = (p * (log_p - log_q)).sum(-1), (q * (log_q - log_p)).sum(-1)
    return (of_head * forward + of_tail * backward) / (of_head + of_tail).clamp_min(torch.finfo(torch.float32).tiny)


def bucketed_kl(
    teacher: Tensor, student: Tensor, temperature: float = 1.0, k: int = 10, tail: float | None = None
) -> Tensor:
    """KL over the teacher's ``k`` likeliest classes and one bucket of all others, plus ``tail`` times the KL inside it.

    ``tail`` None is the bucket's mass under the teacher, which makes the sum KL(p || q) (chain rule).
    """
    if k >= teacher.shape[-1]:
        return forward_kl(teacher, student, temperature)
    log_p, log_q = log_probabilities(teacher, temperature), log_probabilities(student, temperature)
    top = log_p.topk(k, dim=-1).indices
    inside = torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, top, True)
    rest_p, rest_q = (x.masked_fill(inside, -1e9).logsumexp(-1) for x in (log_p, log_q))
    gap, rest_gap = log_p - log_q, rest_p - rest_q
    rest = rest_p.exp()
    buckets = (log_p.exp() * gap * inside).sum(-1) + rest * rest_gap
    tail_p = (log_p - rest_p.unsqueeze(-1)).masked_fill(inside, -1e9).exp()  # filled first: a tiny rest overflows
    shape = (tail_p * (gap - rest_gap.unsqueeze(-1))).sum(-1)
    return buckets + (rest if tail is None else tail) * shape


def log_mean_probabilities(teachers: Sequence[Tensor]) -> Tensor:
    """Logits whose softmax is the mean of the teachers' probabilities (methods L11): any objective can learn from it.

    >>> two = [torch.tensor([[0.0, 0.0]]), torch.tensor([[100.0, 0.0]])]
    >>> log_mean_probabilities(two).exp()
    tensor([[0.7500, 0.2500]])
    """
    found = torch.stack([log_probabilities(teacher, 1.0) for teacher in teachers])
    return found.logsumexp(0) - math.log(len(teachers))
