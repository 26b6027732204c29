"""Objectives for sequence models with one vocabulary (methods X5, X6, X8, X16, Q1)."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from compressor.config import Frozen
from compressor.distil.objectives.base import Batch, Context, Counts, Needs, Signals, Step, Term
from compressor.distil.objectives.divergence import (
    forward_kl,
    log_probabilities,
    skew_kl,
    soft_cross_entropy,
)
from compressor.distil.objectives.rows import LogitObjective, Rows, term
from compressor.errors import StageError
from compressor.recipe import Positive

Share = Annotated[float, Field(ge=0, le=1)]


class Interpolation(nn.Module):  # type: ignore[misc]  # torch is not typed here
    """TAID's share of the teacher and what drives it; buffers, so that a checkpoint holds them.

    After each step with loss L_n: rel = (L_{n-1} - L_n) / L_{n-1}; m <- beta m + (1 - beta) rel; t <- min(end,
    max(start + (end - start) n / N, t + rate * sigmoid(m) * (1 - t))).
    """

    share: Tensor
    momentum: Tensor
    loss: Tensor
    pending: Tensor
    index: Tensor

    def __init__(self, start: float, end: float, rate: float, beta: float) -> None:
        super().__init__()
        self.start, self.end, self.rate, self.beta = start, end, rate, beta
        self.register_buffer("share", torch.tensor(start, dtype=torch.float64))
        self.register_buffer("momentum", torch.zeros((), dtype=torch.float64))
        self.register_buffer("loss", torch.full((), -1.0, dtype=torch.float64))  # none yet
        self.register_buffer("pending", torch.zeros(2, dtype=torch.float64))  # sum and count of the current step
        self.register_buffer("index", torch.full((), -1, dtype=torch.int64))

    def advance(self, step: Step) -> float:
        """The share of step ``step``; the first call of a step learns from the loss of the step before."""
        if int(self.index) != step.index:
            self._learn(step)
            self.index.fill_(step.index)
        return float(self.share)

    def observe(self, total: Tensor, count: Tensor | float) -> None:
        """Add what a (micro-)batch of the current step lost."""
        self.pending += torch.stack([total.detach().double(), torch.as_tensor(count, device=total.device).double()])

    def _learn(self, step: Step) -> None:
        pending = self.pending.clone()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(pending)  # every process must take the same share
        self.pending.zero_()
        delta = 0.0
        if float(pending[1]) > 0:
            current = float(pending[0] / pending[1])
            if float(self.loss) >= 0:
                relative = (float(self.loss) - current) / (float(self.loss) + 1e-15)
                self.momentum.mul_(self.beta).add_((1 - self.beta) * relative)
                delta = self.rate * float(self.momentum.sigmoid()) * (1 - float(self.share))
            self.loss.fill_(current)
        linear = self.start + (self.end - self.start) * step.index / step.total
        self.share.fill_(min(self.end, max(linear, float(self.share) + delta)))


class Taid(LogitObjective):
    """The target walks from the student's own distribution to the teacher's, faster while the student learns well.

    Formula: p_t = softmax((1 - t) * stop-gradient(z_S) + t * z_T), loss -sum p_t log q, mean over samples or taught
    tokens. t starts at `start` and reaches `end` with the last step at the latest; it grows by rate * sigmoid(m) *
    (1 - t) a step, m the moving average (`beta`) of the relative fall of the loss. At t = 1 it is `soft-ce`.

    Shapes: logits (N, C) of both models, or (N, T, C) with a token mask; same classes.
    Paper: Shing et al., "TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in
    Language Models", 2025 (methods X5).
    Defaults: start 0.4, end 1, rate 0.0005, beta 0.99.
    When: a student much smaller than its teacher; language models.
    Worked number: the logits of `kd` give 1.179541 at t = 0.4.
    """

    class Options(Frozen):
        start: Share = 0.4
        end: Share = 1.0
        rate: Annotated[float, Field(ge=0)] = 5e-4
        beta: Annotated[float, Field(ge=0, lt=1)] = 0.99

    log_name = "taid"

    def bind(self, student: Counts, teacher: Counts) -> list[str]:
        problems = super().bind(student, teacher)
        if self.options.start > self.options.end:
            problems.append("`start` must not be greater than `end`")
        options = self.options
        self._state = Interpolation(options.start, options.end, options.rate, options.beta)
        return problems

    def prepare(self, ctx: Context) -> None:
        self._state.to(ctx.device)

    def modules(self) -> nn.Module | None:
        return self._state

    def __call__(self, s: Signals, t: Signals, batch: Batch, step: Step) -> Term:
        share = self._state.advance(step)
        rows = self.found(s, t, batch)
        mixed = (1 - share) * rows.student.detach().float() + share * rows.teacher.float()
        total, count = rows.total(soft_cross_entropy(mixed, rows.student))
        self._state.observe(total, count)
        return term(total, count, self.log_name)


class ContrastiveSkew(LogitObjective):
    """Teacher-made answers are pulled up, student-made ones pushed down, each with the skew divergence that suits it.

    Formula: (2 - b) * SKL(rows of the teacher) + b * SRKL(rows of the student), each a mean over its taught tokens;
    SKL = KL(p || a p + (1 - a) q), SRKL = KL(q || (1 - a) p + a q); b = 1, or with `gradual` 1 + min(1, 2 step /
    total) / 2.

    Shapes: logits (B, T, C) of both models, same classes; `student_made` (B,) marks the rows the student generated.
    Paper: Ko et al., "DistiLLM-2: A Contrastive Approach Boosts the Distillation of LLMs", 2025 (methods X6).
    Defaults: alpha 0.1, gradual true.
    When: language models with answers of both models to the same prompts.
    Worked number: the logits of `kd` as a teacher's row and again as a student's row, first step: 0.281879 + 0.328629.
    """

    class Options(Frozen):
        alpha: Annotated[float, Field(ge=0, lt=1)] = 0.1
        gradual: bool = True

    log_name = "distillm2"
    batch_wise = True  # two means with counts of their own

    def bind(self, student: Counts, teacher: Counts) -> list[str]:
        problems = super().bind(student, teacher)
        fields = self.needs.batch | {"student_made"}
        self.needs = Needs(self.needs.student, self.needs.teacher, fields, batch_wise=True)
        return problems

    def __call__(self, s: Signals, t: Signals, batch: Batch, step: Step) -> Term:
        if batch.student_made is None:
            raise StageError(
                "distillm2: the batch does not say which rows the student made",
                hint="It needs answers of both models: use a strategy with rollouts, or `skew-kl` without.",
            )
        rows, alpha = self.found(s, t, batch), self.options.alpha
        forward = skew_kl(rows.teacher, rows.student, alpha=alpha)
        backward = skew_kl(rows.student, rows.teacher, alpha=alpha)
        keep = torch.ones_like(forward, dtype=torch.bool) if rows.keep is None else rows.keep
        made = batch.student_made.reshape(-1, *[1] * (forward.dim() - 1)).expand_as(forward)
        share = 1 + 0.5 * min(1.0, 2 * step.index / step.total) if self.options.gradual else 1.0
        total = (2 - share) * _mean(forward, keep & ~made) + share * _mean(backward, keep & made)
        return term(total, 1.0, self.log_name)


def _mean(values: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep, values, 0).sum() / keep.sum().clamp_min(1)


class PreferenceKd(LogitObjective):
    """Where the two would say different things, the teacher's choice is preferred to the student's.

    Formula: y_T, y_S the likeliest classes of both; h = [log q(y_T) - log q(y_S)] - [log p(y_T) - log p(y_S)]; loss =
    -log sigmoid(beta h), mean over samples or taught tokens. Where both agree it is ln 2 without gradient.

    Shapes: logits (N, C) of both models, or (N, T, C) with a token mask; same classes.
    Paper: Li et al., "Direct Preference Knowledge Distillation for Large Language Models", 2024, in the token form of
    its code (methods X8).
    Defaults: beta 0.1.
    When: language models, beside labels (0.5).
    Worked number: the logits of `kd` give 0.728144.
    """

    class Options(Frozen):
        beta: Positive = 0.1

    log_name = "dpkd"

    def values(self, rows: Rows) -> Tensor:
        choices = torch.stack([rows.teacher.argmax(-1), rows.student.argmax(-1)], dim=-1)
        log_q, log_p = (log_probabilities(x, 1.0).gather(-1, choices) for x in (rows.student, rows.teacher))
        margin = (log_q[..., 0] - log_q[..., 1]) - (log_p[..., 0] - log_p[..., 1])
        return -F.logsigmoid(self.options.beta * margin)


class TokenScaled(LogitObjective):
    """Soft labels, token by token weighted by how unsure the teacher is of the label.

    Formula: sum over the tokens t of a sequence of w_t * (-sum p_t log q_t), w = softmax over t of CE(label_t, p_t) /
    scale; mean over sequences (the published code sums over the batch, which ties the learning rate to its size).

    Shapes: logits (B, T, C) of both models with labels (B, T); (N, C) with labels (N,) counts as sequences of one
    token.
    Paper: Kim et al., "Token-Scaled Logit Distillation for Ternary Weight Generative Language Models", 2023 (methods
    Q1).
    Defaults: scale 10.
    When: low-bit language models; no label term beside it.
    Worked number: teacher's cross-entropies 0.5, 2 and 4 give the weights 0.279259, 0.324453, 0.396288.
    """

    class Options(Frozen):
        scale: Positive = 10.0

    log_name = "tsld"
    labelled = True

    def __call__(self, s: Signals, t: Signals, batch: Batch, step: Step) -> Term:
        rows = self.found(s, t, batch)
        assert rows.labels is not None
        assert rows.keep is not None  # with_labels saw to both
        losses = soft_cross_entropy(rows.teacher, rows.student)
        if losses.dim() == 1:
            return term(*rows.total(losses), self.log_name)
        errors = -log_probabilities(rows.teacher, 1.0).gather(-1, rows.labels.unsqueeze(-1))[..., 0]
        weights = token_weights(errors, rows.keep, self.options.scale)
        return term((weights * losses).sum(), rows.keep.any(1).sum(), self.log_name)


def token_weights(errors: Tensor, keep: Tensor, scale: float) -> Tensor:
    """Softmax of the teacher's errors (B, T) / ``scale`` over the kept tokens of each sequence; 0 elsewhere."""
    return (errors / scale).masked_fill(~keep, -1e9).softmax(-1) * keep


def mixed_target(
    teacher: Tensor, student: Tensor, labels: Tensor, mix: float, threshold: float
) -> tuple[Tensor, Tensor]:
    """Target probabilities (..., C) of self-evolution, and the difficulty (...) of each token.

    Difficulty d = KL(p || q), no gradient. Up to ``threshold`` the target is p; above it (1 - l) q + l [mix p + (1 -
    mix) onehot(label)] with l = 1 - e^-d, which grows with difficulty.
    """
    p, q = log_probabilities(teacher, 1.0).exp(), log_probabilities(student.detach(), 1.0).exp()
    difficulty = forward_kl(teacher, student.detach())
    truth = F.one_hot(labels, teacher.shape[-1]).to(p.dtype)
    trust = (1 - (-difficulty).exp()).unsqueeze(-1)
    hard = (1 - trust) * q + trust * (mix * p + (1 - mix) * truth)
    return torch.where((difficulty > threshold).unsqueeze(-1), hard, p), difficulty


class SelfEvolution(LogitObjective):
    """Tokens that are too hard learn from a mixture of the student's own belief, the teacher and the label.

    Formula: KL(target || q), mean over labelled tokens. Easy tokens (KL(p || q) <= threshold): target p. Hard ones: (1
    - l) q + l [mix p + (1 - mix) onehot(label)], q without gradient, l = 1 - exp(-KL(p || q)). (Threshold and l are
    ours: the paper's are not known.)

    Shapes: logits (N, C) of both models with labels (N,), or (N, T, C) with labels (N, T); same classes.
    Paper: Song et al., "Self-Evolution Knowledge Distillation for LLM-based Machine Translation", 2024 (methods X16).
    Defaults: mix 0.5, threshold 1.
    When: translation and other generation with tokens far from the student's reach.
    Worked number: the logits of `kd` have no KL above 1: 0.341269, as `kd`.
    """

    class Options(Frozen):
        mix: Share = 0.5
        threshold: Annotated[float, Field(ge=0)] = 1.0

    log_name = "self-evolution"
    labelled = True

    def values(self, rows: Rows) -> Tensor:
        assert rows.labels is not None  # with_labels saw to it
        target, _ = mixed_target(rows.teacher, rows.student, rows.labels, self.options.mix, self.options.threshold)
        log_q = log_probabilities(rows.student, 1.0)
        return (torch.xlogy(target, target) - target * log_q).sum(-1)
