"""What a distil stage may ask of language models, as data: rollouts, teacher-made text, low-rank adapters. No torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from compressor.config import Frozen
from compressor.schedule import Schedule, Weight01

Share = Annotated[float, Field(ge=0, le=1)]
Tokens = Annotated[int, Field(ge=1)]


class Rollouts(Frozen):
    """On-policy batches: the student continues the text, the teacher says what it should have said (GKD; methods X1).

    Labels do not count for tokens that the student made. `fraction` and `replay` may be schedules, for instance
    ``{ kind = "feedback", watch = "score", when = "falls" }``: more of the student's text whenever validation got worse
    (DistiLLM).
    """

    fraction: Weight01 = 0.5  # of the steps; a number, or a schedule
    prompt_tokens: Tokens = 16  # kept from the data
    max_new_tokens: Tokens = 128
    temperature: Annotated[float, Field(ge=0)] = 0.9  # of sampling only; 0 is greedy
    top_k: Annotated[int, Field(ge=0)] = 0  # 0: all tokens
    replay: Weight01 = 0.0  # of the on-policy steps: a batch made before is seen again; a number, or a schedule
    buffer: Annotated[int, Field(ge=1)] = 64  # batches that are kept for it
    guess: Share | None = None  # instead of writing: this share of the data's tokens becomes the student's guess (X14)
    beside: bool = False  # on-policy steps keep the data's rows beside the student's, as `distillm2` needs

    @property
    def used(self) -> bool:
        """Is any step on-policy?"""
        return self.fraction.values != (0.0, 0.0) if isinstance(self.fraction, Schedule) else self.fraction > 0


class Sequences(Frozen):
    """Text that the teacher wrote replaces the training text (sequence-level KD, Kim and Rush, 2016; methods X2)."""

    prompt_tokens: Tokens = 16  # taken from the data; they carry no labels
    max_new_tokens: Tokens = 128
    beams: Annotated[int, Field(ge=1)] = 1  # more than one: the best of a beam search
    choose: Literal["likeliest", "nearest"] = (
        "likeliest"  # of the beams; nearest: highest BLEU with the data's own text
    )
    temperature: Annotated[float, Field(ge=0)] = 0.0  # 0: greedy
    samples: Tokens | None = None  # prompts; all training blocks when left out

    @model_validator(mode="after")
    def _has_a_choice(self) -> Self:
        if self.choose == "nearest" and self.beams < 2:
            raise ValueError('`choose = "nearest"` needs several `beams`')
        return self


class LoRA(Frozen):
    """Train low-rank additions to weights only; they are merged before export (LLM-Neo; methods X17)."""

    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0  # the addition is scaled by alpha / rank
    modules: tuple[str, ...] = ("*",)  # name patterns of the linear layers that get one
