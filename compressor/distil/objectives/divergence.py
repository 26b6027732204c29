"""The divergence family between two categorical distributions given by logits (methods L2). Pure functions.

All take teacher and student logits (..., C), work in float32 with natural logarithms, and return one value per row
(...).
"""

from __future__ import annotations

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
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, 0 < beta < 1."""
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
