"""Objectives on the models' outputs: the L rows of the methods catalogue and D3."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from compressor.config import Frozen
from compressor.distil.objectives import divergence
from compressor.distil.objectives.base import Batch, Signals, Step, Term
from compressor.distil.objectives.rows import LogitObjective, Rows, taught, term
from compressor.distil.top import TOP, bucketed_kl
from compressor.recipe import Positive


class _Divergence(LogitObjective):
    """A divergence between the two output distributions, mean over samples (or valid tokens of 3-D logits)."""

    class Options(Frozen):
        temperature: Positive = 1.0

    def rows(self, teacher: Tensor, student: Tensor) -> Tensor:
        """One value per distribution; temperature factors are part of it."""
        raise NotImplementedError

    def values(self, rows: Rows) -> Tensor:
        return self.rows(rows.teacher, rows.student)


class KnowledgeDistillation(_Divergence):
    """Soft labels of the teacher at a temperature (Hinton's knowledge distillation).

    Formula: tau^2 * KL(p_tau || q_tau), p_tau = softmax(teacher logits / tau), q_tau = softmax(student logits / tau),
    summed over classes, mean over samples ("batchmean"). The factor tau^2 keeps the gradient's size when tau changes.

    Shapes: logits (N, C) of both models, or (N, T, C) with a token mask; same classes.
    Paper: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015 (methods L1).
    With `cache_logits = k` the sum runs over the teacher's k largest classes and one bucket for all others.
    Defaults: temperature 2 (1 to 2 suits small students and few classes; 4 lost against labels alone on 10 000 images).
    When: always the first thing to try; the only signal it needs can be cached.
    Worked number: teacher [[2,1,0,-1],[0,3,1,-2],[1,1,2,0]], student [[1,0,.5,-.5],[.5,1,0,0],[0,2,1,-1]]:
    0.341269 at tau 1, 0.495474 at tau 2, 0.568150 at tau 4.
    """

    class Options(Frozen):
        temperature: Positive = 2.0

    log_name = "tau^2 KL(teacher||student)"

    def __call__(self, s: Signals, t: Signals, batch: Batch, step: Step) -> Term:
        if TOP not in t:
            return super().__call__(s, t, batch, step)
        # the bank kept the teacher's largest logits only (`cache_logits`): all other classes are one
        values = bucketed_kl(t, s["logits"], self.options.temperature) * self.options.temperature**2
        keep = taught(batch, s["logits"]) if values.dim() == 2 and batch.taught is not None else None
        return term(*Rows(s["logits"], s["logits"], None, keep).total(values), self.log_name)

    def rows(self, teacher: Tensor, student: Tensor) -> Tensor:
        tau = self.options.temperature
        return divergence.forward_kl(teacher, student, tau) * tau**2  # type: ignore[no-any-return]


class SoftCrossEntropy(_Divergence):
    """Cross-entropy with the teacher's probabilities: the gradient of `kd`, another value.

    Formula: -tau^2 * sum p_tau log q_tau, mean over samples. Differs from `kd` by the teacher's entropy, a constant.

    Shapes: logits (N, C) of both models, or (N, T, C) with a token mask; same classes.
    Paper: Hinton, Vinyals, Dean, 2015; the ensemble form is MEAL V2, Shen and Savvides, 2020 (methods L1, L11).
    Defaults: temperature 1.
    When: to compare a loss curve with a cross-entropy on labels.
    Worked number: the logits of `kd` give 1.230649 at tau 1.
    """

    log_name = "tau^2 CE(teacher, student)"

    def rows(self, teacher: Tensor, student: Tensor) -> Tensor:
        tau = self.options.temperature
        return divergence.soft_cross_entropy(teacher, student, tau) * tau**2  # type: ignore[no-any-return]


class ReverseKl(_Divergence):
    """The divergence the other way round: the student may leave modes of the teacher out.

    Formula: tau^2 * KL(q_tau || p_tau), mean over samples; q the student.

    Shapes: logits (N, C) of both models, or (N, T, C) with a token mask; same classes.
    Paper: Gu et al., "MiniLLM", 2023 (methods L2).
    Defaults: temperature 1.
    When: a student far too small for the teacher's whole distribution.
    Worked number: the logits of `kd` give 0.483460 at tau 1.
    """

    log_name = "tau^2 KL(student||teacher)"

    def rows(self, teacher: Tensor, student: Tensor) -> Tensor:
        tau = self.options.temperature
        return divergence.reverse_kl(teacher, student, tau) * tau**2  # type: ignore[no-any-return]


class SymmetricKl(_Divergence):
    """Both directions at once, without labels: agreement with a strong teacher on any data.

    Formula: (1 - balance) * KL(p || q) + balance * KL(q || p), times tau^2, mean over samples.

    Shapes: logits (N, C) of both models, or (N, T, C) with a token mask; same classes.
    Paper: Cui et al., "Beyond Self-Supervision: A Simple Yet Effective Network Distillation Alternative to Improve
    Backbones" (SSLD), 2021 (methods D3).
    Defaults: temperature 1, balance 0.5; a long schedule and a low weight decay; `labels = 0`.
    When: much unlabelled data (`data.transfer`) and a strong teacher.
    Worked number: the logits of `kd` give 0.412364 at tau 1.
    """

    class Options(Frozen):
        temperature: Positive = 1.0
        balance: Annotated[float, Field(ge=0, le=1)] = 0.5

    log_name = "tau^2 symmetric KL"

    def rows(self, teacher: Tensor, student: Tensor) -> Tensor:
        tau, balance = self.options.temperature, self.options.balance
        forward = divergence.forward_kl(teacher, student, tau)
        backward = divergence.reverse_kl(teacher, student, tau)
        return ((1 - balance) * forward + balance * backward) * tau**2  # type: ignore[no-any-return]


class JensenShannon(_Divergence):
    """The bounded divergence between the two: each against their mixture.

    Formula: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; no temperature factor, mean over
    samples. The formula itself tends to 0 at both ends, so these are branches of their own, as in GKD: beta 0 is
    KL(p || q), beta 1 is KL(q || p). The gradient jumps there: at beta 0.01 it is about a hundredth of that at 0.

    Shapes: logits (N, C) of both models, or (N, T, C) with a token mask; same classes.
    Paper: Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes" (GKD),
    2023 (methods L2).
    Defaults: temperature 1, beta 0.5.
    When: noisy teachers; the loss never exceeds ln 2 a sample at beta 0.5.
    Worked number: the logits of `kd` give 0.092361 at beta 0.5, 0.030992 at 0.1, 0.039371 at 0.9.
    """

    class Options(Frozen):
        temperature: Positive = 1.0
        beta: Annotated[float, Field(ge=0, le=1)] = 0.5

    log_name = "generalised JSD"

    def rows(self, teacher: Tensor, student: Tensor) -> Tensor:
        return divergence.jensen_shannon(teacher, student, self.options.temperature, self.options.beta)


class SkewKl(_Divergence):
    """KL against a mixture that holds some of the teacher: finite gradients where the student gives no mass.

    Formula: KL(p || alpha p + (1 - alpha) q), or with `reverse` KL(q || (1 - alpha) p + alpha q); mean over samples.

    Shapes: logits (N, C) of both models, or (N, T, C) with a token mask; same classes.
    Paper: Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models", 2024 (methods L2).
    Defaults: temperature 1, alpha 0.1, reverse false.
    When: a student that starts far from its teacher (random weights).
    Worked number: the logits of `kd` give 0.281879, reversed 0.328629.
    """

    class Options(Frozen):
        temperature: Positive = 1.0
        alpha: Annotated[float, Field(ge=0, lt=1)] = 0.1
        reverse: bool = False

    log_name = "skew KL"

    def rows(self, teacher: Tensor, student: Tensor) -> Tensor:
        first, second = (student, teacher) if self.options.reverse else (teacher, student)
        return divergence.skew_kl(first, second, self.options.temperature, self.options.alpha)


class TotalVariation(_Divergence):
    """Half the sum of the absolute differences of the probabilities: bounded by 1, robust to a few wild logits.

    Formula: 1/2 sum |p - q|, mean over samples.

    Shapes: logits (N, C) of both models, or (N, T, C) with a token mask; same classes.
    Paper: Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation", 2023 (methods L2).
    Defaults: temperature 1.
    When: beside `kd`; alone its gradient vanishes where the student is sure and wrong.
    Worked number: the logits of `kd` give 0.372577.
    """

    log_name = "total variation"

    def rows(self, teacher: Tensor, student: Tensor) -> Tensor:
        return divergence.total_variation(teacher, student, self.options.temperature)


class AdaptiveKl(_Divergence):
    """Both directions of KL, each weighted by where the student is wrong: on the teacher's likely classes or the rest.

    Formula: (g_h KL(p || q) + g_t KL(q || p)) / (g_h + g_t). The head is the smallest set of likeliest classes with
    mass of at least `head`; g_h and g_t are the sums of |p - q| over head and tail, without gradient. Times tau^2,
    mean over samples.

    Shapes: logits (N, C) of both models, or (N, T, C) with a token mask; same classes.
    Paper: Wu et al., "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models", 2024
    (methods L2).
    Defaults: temperature 1, head 0.5.
    When: language models; a baseline for the other divergences.
    Worked number: the logits of `kd` give 0.417639 at head 0.5.
    """

    class Options(Frozen):
        temperature: Positive = 1.0
        head: Annotated[float, Field(gt=0, le=1)] = 0.5

    log_name = "tau^2 adaptive KL"

    def rows(self, teacher: Tensor, student: Tensor) -> Tensor:
        tau = self.options.temperature
        return divergence.adaptive_kl(teacher, student, tau, self.options.head) * tau**2  # type: ignore[no-any-return]


class TopKKl(_Divergence):
    """The teacher's likeliest classes and one bucket for all others, beside the shape of the tail with its own weight.

    Formula: KL over {top k classes, the rest as one} + w * KL(tail renormalised), times tau^2, mean over samples. With
    w = the teacher's tail mass (`tail = "mass"`) the sum is exactly KL(p || q); `tail` sets another weight.

    Shapes: logits (N, C) of both models, or (N, T, C) with a token mask; same classes.
    Paper: after TopKLD of Ding et al., "Dissecting Bit-Level Scaling Laws in Quantizing Vision Generative Models", 2025
    (methods Q3); the split is ours.
    Defaults: temperature 1, k 10, tail 1: the tail counts as much as the head. tail 0 ignores it.
    When: large vocabularies and low-bit students, whose tails a plain KL hardly sees.
    Worked number: the logits of `kd` with k 2: 0.338607 without the tail; with `tail = "mass"` 0.341269 as `kd`.
    """

    class Options(Frozen):
        temperature: Positive = 1.0
        k: Annotated[int, Field(ge=1)] = 10
        tail: Annotated[float, Field(ge=0)] | Literal["mass"] = 1.0

    log_name = "tau^2 top-k KL"

    def rows(self, teacher: Tensor, student: Tensor) -> Tensor:
        tau, tail = self.options.temperature, self.options.tail
        weight = None if tail == "mass" else tail
        values = divergence.bucketed_kl(teacher, student, tau, self.options.k, weight)
        return values * tau**2  # type: ignore[no-any-return]
