"""Objectives that take the output distribution apart: label and other classes, samples and classes (methods L3)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from compressor.config import Frozen
from compressor.distil.objectives.base import Batch, Signals, Step, Term
from compressor.distil.objectives.divergence import log_probabilities
from compressor.distil.objectives.rows import LogitObjective, Rows, term
from compressor.recipe import Positive

Weight = Annotated[float, Field(ge=0)]


def others(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Log-probabilities (..., C) among the classes that are not the label; -1e9 at the label itself."""
    scaled = (logits.float() / temperature).scatter(-1, labels.unsqueeze(-1), -1e9)
    return torch.log_softmax(scaled, dim=-1)


def target_and_rest(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """(..., 2) log-probabilities of the label and of all other classes together."""
    logs = log_probabilities(logits, temperature)
    own = logs.gather(-1, labels.unsqueeze(-1))
    rest = logs.scatter(-1, labels.unsqueeze(-1), -1e9).logsumexp(-1, keepdim=True)
    return torch.cat([own, rest], dim=-1)


def kl_of_logs(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last axis."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


class DecoupledKd(LogitObjective):
    """Knowledge distillation in two parts with weights of their own: how sure of the label, and how the rest compare.

    Formula: alpha * tau^2 KL([p_y, 1 - p_y] || [q_y, 1 - q_y]) + beta * tau^2 KL(p without y || q without y), both
    renormalised and at temperature tau; mean over labelled samples. With beta = 1 - p_y it would be `kd`.

    Shapes: logits (N, C) of both models with labels (N,), or (N, T, C) with labels (N, T); same classes.
    Paper: Zhao et al., "Decoupled Knowledge Distillation", 2022 (methods L3).
    Defaults: temperature 4, alpha 1, beta 8 (the paper's for CIFAR); language models: temperature 1, beta 0.5.
    When: several classes and a very sure teacher, whose dark knowledge `kd` weighs with 1 - p_y.
    Worked number: the logits of `kd` with labels 0, 1, 2 give 0.267419 + 8 * 0.480287 = 4.109714.
    """

    class Options(Frozen):
        temperature: Positive = 4.0
        alpha: Weight = 1.0
        beta: Weight = 8.0

    log_name = "dkd"
    labelled = True

    def values(self, rows: Rows) -> Tensor:
        assert rows.labels is not None  # with_labels saw to it
        tau, y = self.options.temperature, rows.labels
        target = kl_of_logs(target_and_rest(rows.teacher, y, tau), target_and_rest(rows.student, y, tau))
        rest = kl_of_logs(others(rows.teacher, y, tau), others(rows.student, y, tau))
        return (self.options.alpha * target + self.options.beta * rest) * tau**2  # type: ignore[no-any-return]


class NormalisedKd(LogitObjective):
    """The teacher's certainty as a weight of the label, and its other classes, renormalised, as soft labels.

    Formula: -p_y log q_y - gamma * tau^2 * sum over c != y of p^_c log q^_c, where p^ and q^ are the distributions at
    temperature tau among the other classes; p_y and q_y at temperature 1; mean over labelled samples. A cross-entropy:
    its minimum is not 0.

    Shapes: logits (N, C) of both models with labels (N,), or (N, T, C) with labels (N, T); same classes.
    Paper: Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized
    Loss and Customized Soft Labels", 2023 (methods L3).
    Defaults: temperature 1, gamma 1.
    When: in place of `kd` and labels together; it contains the label's own term.
    Worked number: logits [2,1,0] of the teacher and [0,0,0] of the student, label 0: 0.665241 * ln 3 + ln 2 = 1.423988.
    """

    class Options(Frozen):
        temperature: Positive = 1.0
        gamma: Weight = 1.0

    log_name = "nkd"
    labelled = True

    def values(self, rows: Rows) -> Tensor:
        assert rows.labels is not None  # with_labels saw to it
        tau, y = self.options.temperature, rows.labels
        log_p, log_q = (target_and_rest(x, y, 1.0)[..., 0] for x in (rows.teacher, rows.student))
        soft = -(others(rows.teacher, y, tau).exp() * others(rows.student, y, tau)).sum(-1)
        return -log_p.exp() * log_q + self.options.gamma * tau**2 * soft  # type: ignore[no-any-return]


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlation over the last axis, 0 where one side is constant."""
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return torch.cosine_similarity(a, b, dim=-1, eps=1e-8)


class Dist(LogitObjective):
    """Correlation instead of equality: how the classes of a sample compare, and how the samples of a class compare.

    Formula: beta * tau^2 (1 - mean over samples of rho(q_i, p_i)) + gamma * tau^2 (1 - mean over classes of rho(q_:c,
    p_:c)), rho Pearson's correlation of probabilities at temperature tau. The second part is over the batch, which must
    be large enough to tell the samples of a class apart.

    Shapes: logits (N, C) of both models, or (N, T, C) with a token mask; same classes.
    Paper: Huang et al., "Knowledge Distillation from A Stronger Teacher", 2022 (methods L3).
    Defaults: temperature 1, beta 1, gamma 1. gamma 0 leaves the samples' own part: 1 - correlation of scores with the
    teacher's.
    When: a teacher much stronger than the student, whose exact probabilities are out of reach.
    Worked number: the logits of `kd` give 0.363982 + 1.029912 = 1.393894.
    """

    class Options(Frozen):
        temperature: Positive = 1.0
        beta: Weight = 1.0
        gamma: Weight = 1.0

    log_name = "dist"
    batch_wise = True

    def __call__(self, s: Signals, t: Signals, batch: Batch, step: Step) -> Term:
        rows, tau = self.found(s, t, batch), self.options.temperature
        q, p = (log_probabilities(x, tau).exp() for x in (rows.student, rows.teacher))
        if rows.keep is not None:
            q, p = q[rows.keep], p[rows.keep]
        inter = 1 - pearson(q, p)
        intra = 1 - pearson(q.transpose(0, 1), p.transpose(0, 1))
        count = float(len(inter))
        total = self.options.beta * inter.sum() + self.options.gamma * intra.mean() * count
        return term(total * tau**2, count, self.log_name)
