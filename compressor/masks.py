"""Masks that a stage may ask for, as data: zeros in a pattern, and units that learn whether they stay. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from compressor.config import Frozen

Share = Annotated[float, Field(ge=0, le=1)]
Sparsity = Annotated[float, Field(gt=0, lt=1)]  # share of the weights that are zero
Rate = Annotated[float, Field(gt=0)]
UnitKind = Literal["layers", "heads", "neurons", "channels", "hidden"]
UNSTRUCTURED, BLOCK = "unstructured", "block"
_N_OF_M = re.compile(r"^([1-9]\d?):([1-9]\d?)$")


def _pattern(value: str) -> str:
    found = _N_OF_M.match(value)
    if value in (UNSTRUCTURED, BLOCK) or (found and int(found[1]) < int(found[2])):
        return value
    raise ValueError(f"`{value}` is no pattern: `unstructured`, `block`, or N:M with N < M, such as `2:4`")


Pattern = Annotated[str, AfterValidator(_pattern)]


def n_of_m(pattern: str) -> tuple[int, int] | None:
    """``"2:4"`` as (2, 4): at most two of four neighbours along the input axis stay. None for the other patterns."""
    found = _N_OF_M.match(pattern)
    return (int(found[1]), int(found[2])) if found else None


@dataclass(frozen=True)
class Zeros:
    """Which weights become zero: how many, in which pattern, compared with which others."""

    sparsity: float
    pattern: str = UNSTRUCTURED
    block: tuple[int, int] = (1, 4)
    scope: str = "uniform"

    @property
    def shown(self) -> str:
        """``80 % unstructured``, ``2:4``, ``70 % in blocks of 1x4``."""
        if n_of_m(self.pattern):
            return self.pattern
        of = "unstructured" if self.pattern == UNSTRUCTURED else f"in blocks of {self.block[0]}x{self.block[1]}"
        return f"{self.sparsity:.0%} {of}".replace("%", " %", 1)


def given_zeros(sparsity: float | None, pattern: str | None, block: tuple[int, int], scope: str) -> Zeros | None:
    """The zeros that a table of a recipe asks for; None when it asks for none.

    Raises:
        ValueError: the keys contradict each other.
    """
    if sparsity is None and pattern is None:
        return None
    fixed = n_of_m(pattern or UNSTRUCTURED)
    if fixed:
        share = 1 - fixed[0] / fixed[1]
        if sparsity is not None and abs(sparsity - share) > 1e-9:
            raise ValueError(f"`{pattern}` means a sparsity of {share:g}; leave `sparsity` out")
        sparsity = share
    if sparsity is None:
        raise ValueError(f'`pattern = "{pattern}"` needs `sparsity`')
    return Zeros(sparsity, pattern or UNSTRUCTURED, block, scope)


Block = tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]


class Masks(Frozen):
    """Zeros that grow while a distil stage trains: s = s_end (1 - (1 - t)^3), t from 0 at ``start`` to 1 at ``end``.

    Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017. Weights
    that are zero stay zero. ``start = end = 0``: one shot before the first step.
    """

    sparsity: Sparsity | None = None  # of every layer; follows from the pattern for N:M
    pattern: Pattern | None = None  # `unstructured` (when left out), `2:4` or another N:M, `block`
    block: Block = (1, 4)  # outputs x inputs that go together
    scope: Literal["uniform", "global"] = "uniform"  # every layer alike, or the smallest of all layers
    start: Share = 0.0  # of the run
    end: Share = 0.5  # of the run: the pattern is complete, what stays is trained on
    every: Annotated[int, Field(ge=1)] = 10  # steps between two updates of the masks
    protect: tuple[str, ...] = ()  # module name patterns that stay dense

    @model_validator(mode="after")
    def _goes_together(self) -> Masks:
        if self.sparsity is None and self.pattern is None:
            raise ValueError("give `sparsity`, or a `pattern` such as `2:4`")
        if self.start > self.end:
            raise ValueError("`start` must not come after `end`")
        given_zeros(self.sparsity, self.pattern, self.block, self.scope)
        return self

    @property
    def zeros(self) -> Zeros:
        """What is reached at ``end``."""
        found = given_zeros(self.sparsity, self.pattern, self.block, self.scope)
        assert found is not None  # validated
        return found


class SparseUpdate(Frozen):
    """Only a share of the weights may differ from what they were when the stage began (methods T5).

    Ansell et al., "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", 2022 (lottery ticket): all weights train
    first, the largest changes are kept, every weight goes back, and these alone train again.
    """

    share: Sparsity  # of all trained weights
    select: Annotated[float, Field(gt=0, lt=1)] = 0.5  # of the run that finds them


class CoFi(Frozen):
    """Masks that learn which layers, heads, neurons, channels and hidden dimensions go (CoFi; methods U2).

    Xia et al., "Structured Pruning Learns Compact and Accurate Models", 2022: hard-concrete masks of layers and of
    their units, a Lagrangian that brings the expected sparsity to a target, at the end a committed, smaller student.
    """

    target: Sparsity  # share of the weights of the layers with masks that goes
    start: Share = 0.0  # of the run before the target begins to rise
    ramp: Share = 0.3  # of the run in which it rises linearly
    masks: tuple[UnitKind, ...] = ("layers", "heads", "neurons", "channels", "hidden")
    learning_rate: Rate = 0.1  # of the masks (Adam)
    multiplier_rate: Rate = 0.01  # of the Lagrangian multipliers, which ascend
    round_to: Annotated[int, Field(ge=1)] | None = None  # multiple of neurons, channels, hidden; the profiles'
    protect: tuple[str, ...] = ()  # module name patterns that get no masks

    @model_validator(mode="after")
    def _goes_together(self) -> CoFi:
        if self.start + self.ramp > 1:
            raise ValueError("`start` and `ramp` are fractions of one run: their sum must not be above 1")
        if not set(self.masks) & {"heads", "neurons", "channels"}:
            raise ValueError("name `heads`, `neurons` or `channels` among the `masks`")
        return self
