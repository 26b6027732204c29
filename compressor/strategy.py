"""Data strategies of a distil stage as data: which samples are trained on, in what mixture. No torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from compressor.config import Frozen

Part = Literal["transfer", "train", "all"]
Share = Annotated[float, Field(ge=0, lt=1)]
Kept = Annotated[float, Field(gt=0, le=1)]


class Negatives(Frozen):
    """Wrong passages beside each query and its right one in a batch (retrieval).

    They are the query's own where the data have some. Otherwise they are drawn from the `pool` passages of other
    queries that the teacher ranks highest (hard negatives), or at random; the null twin always draws at random.
    """

    count: Annotated[int, Field(ge=1)] = 4  # in a batch, drawn anew every epoch
    mine: Literal["teacher", "random"] = "teacher"
    pool: Annotated[int, Field(ge=1)] = 20  # passages that a query draws from


class FilterStrategy(Frozen):
    """Keep the samples whose teacher is sure enough, without looking at labels (uDistil-Whisper; methods T8).

    ``confidence`` is the largest probability, ``margin`` its lead over the second, ``log-prob`` the logarithm of the
    confidence; sequences take the mean over their real tokens. Give ``threshold`` or ``keep``.
    """

    use: Literal["filter"]
    score: Literal["confidence", "margin", "log-prob"] = "confidence"
    threshold: float | None = None  # samples at or above it stay
    keep: Kept | None = None  # share of the samples that stays, surest first
    part: Part = "transfer"  # which samples are judged; the others stay

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if (self.threshold is None) == (self.keep is None):
            raise ValueError("give either `threshold` or `keep`")
        return self


class SubsetStrategy(Frozen):
    """Keep a random fraction of the samples (knowledge distillation with pruned data; methods T11)."""

    use: Literal["subset"]
    fraction: Kept
    part: Part = "all"


class PseudoLabelStrategy(Frozen):
    """Samples without a label take the teacher's class where it is sure enough (methods T8, DHO)."""

    use: Literal["pseudo-label"]
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.0  # of the teacher's largest probability


class QueryStrategy(Frozen):
    """Ask the teacher about a budget of unlabelled samples only (Robust Active Distillation; methods T12).

    Chosen where the student, as it enters the stage, is unsure, hedged against mistakes of the teacher.
    """

    use: Literal["query"]
    budget: Annotated[float, Field(gt=0)]  # samples (>= 1) or a share of the unlabelled ones
    teacher_error: Share = 0.1  # share of the budget that the teacher may get wrong


class SelectStrategy(Frozen):
    """Train on the samples of a larger batch that are hard for the student and easy for the teacher (ACID; methods T9).

    Super-batches hold ``batch / (1 - discard)`` samples, of which ``batch`` are trained on.
    """

    use: Literal["select"]
    discard: Annotated[float, Field(gt=0, lt=1)] = 0.8


class MixStrategy(Frozen):
    """Draw domains by how far the student is behind the teacher in them (DDK; methods T10).

    After every epoch p_i = smoothing * softmax(ppl_student / ppl_teacher)_i + (1 - smoothing) / domains.
    """

    use: Literal["mix"]
    by: Literal["part", "label", "domain"] = "part"  # labelled and transfer data, the classes, or `data.domain`
    smoothing: Annotated[float, Field(ge=0, le=1)] = 0.5
    probe: Annotated[int, Field(ge=1)] = 256  # samples of each domain that are scored


class MixupStrategy(Frozen):
    """Blend every sample with a partner; the teacher sees the blend (mixup, Zhang et al., 2018)."""

    use: Literal["mixup"]
    alpha: Annotated[float, Field(gt=0)] = 0.4  # of the Beta distribution that draws the shares


Strategy = Annotated[
    FilterStrategy
    | SubsetStrategy
    | PseudoLabelStrategy
    | QueryStrategy
    | SelectStrategy
    | MixStrategy
    | MixupStrategy,
    Field(discriminator="use"),
]
TEACHER_STRATEGIES = (FilterStrategy, PseudoLabelStrategy, QueryStrategy, SelectStrategy, MixStrategy)
