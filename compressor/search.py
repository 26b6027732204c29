"""Spaces of students and what a student may cost, as data: the searches DisWOT, AutoDistil and grids. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import islice, product
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from compressor.config import Frozen

Count = Annotated[int, Field(ge=1)]
Keep = tuple[Annotated[int, Field(ge=0)], ...] | Count  # indices of layers, or how many (spread evenly)
Argument = bool | int | float | str  # of a factory
Candidate = Mapping[str, Any]  # key of the student stage (`factory.width`: argument of the factory) -> value
FACTORY = "factory."
GRID_LIMIT = 4096  # candidates of a grid: all of them are built


class Budget(Frozen):
    """What a student may cost at most; give at least one."""

    macs: Count | None = None  # multiply-accumulates of one sample
    parameters: Count | None = None
    latency_ms: Annotated[float, Field(gt=0)] | None = None  # of its layers with weights, measured on this machine

    @model_validator(mode="after")
    def _limits_something(self) -> Budget:
        if self.macs is None and self.parameters is None and self.latency_ms is None:
            raise ValueError("give `macs`, `parameters` or `latency_ms`")
        return self

    def over(self, macs: int, parameters: int, latency_ms: float | None) -> tuple[str, ...]:
        """What is too much, in words; empty when the budget holds. A latency that was not measured is not judged."""
        found = []
        if self.macs is not None and macs > self.macs:
            found.append(f"{macs:,} multiply-accumulates, {self.macs:,} are allowed")
        if self.parameters is not None and parameters > self.parameters:
            found.append(f"{parameters:,} parameters, {self.parameters:,} are allowed")
        if self.latency_ms is not None and latency_ms is not None and latency_ms > self.latency_ms:
            found.append(f"{latency_ms:.3g} ms, {self.latency_ms:g} ms are allowed")
        return tuple(found)


class SubSpace(Frozen):
    """Allowed values of each key; a candidate takes one of each."""

    keep_layers: tuple[Keep, ...] = ()  # how many layers stay (spread evenly), or lists of indices
    hidden_size: tuple[Count, ...] = ()
    heads: tuple[Count, ...] = ()  # of each attention at most
    neurons: tuple[Count, ...] = ()  # of each feed-forward layer at most

    least: ClassVar[int] = 2  # candidates that make a space

    @model_validator(mode="after")
    def _not_empty(self) -> SubSpace:
        for name, values in self.axes.items():
            if len({repr(value) for value in values}) < len(values):
                raise ValueError(f"`{name}` names a value twice")
        if self.size < self.least:
            raise ValueError("is empty: there is nothing to choose from; give several values of a key")
        return self

    @property
    def axes(self) -> dict[str, tuple[Any, ...]]:
        """Values by key, those that are given, in the order of the fields; factory arguments as ``factory.NAME``."""
        given = {name: getattr(self, name, ()) for name in AXES}
        found: dict[str, tuple[Any, ...]] = {name: values for name, values in given.items() if values}
        more = getattr(self, "factory", {})
        return found | {f"{FACTORY}{name}": tuple(values) for name, values in more.items()}

    @property
    def size(self) -> int:
        """How many candidates there are."""
        return math.prod(len(values) for values in self.axes.values()) if self.axes else 0

    def candidates(self) -> Iterator[Candidate]:
        """All of them, the last key fastest."""
        axes = self.axes
        for values in product(*axes.values()):
            yield dict(zip(axes, values, strict=True))

    def at(self, number: int) -> Candidate:
        """The candidate with this number in the order of :meth:`candidates`."""
        found: dict[str, Any] = {}
        for name, values in reversed(self.axes.items()):
            number, place = divmod(number, len(values))
            found[name] = values[place]
        return dict(reversed(found.items()))

    def some(self, count: int, generator: np.random.Generator) -> list[Candidate]:
        """``count`` different candidates at random, in their order; all where there are no more."""
        if self.size <= count:
            return list(self.candidates())
        return [self.at(int(number)) for number in sorted(generator.choice(self.size, count, replace=False))]


AXES = ("keep_layers", "decoder_layers", "hidden_size", "heads", "neurons", "width")


class Space(SubSpace):
    """Students that a search may choose from: the values that each key of the stage may have.

    ``[stage.search.space.factory]`` holds values of the keyword parameters of the teacher's factory
    (``pkg.mod:factory``); the student is then what the factory makes with them, weights included.
    """

    decoder_layers: tuple[Keep, ...] = ()  # of encoder-decoder models
    width: tuple[Annotated[float, Field(gt=0, le=1)], ...] = ()  # CNNs: all widths times this, new weights
    factory: dict[str, tuple[Argument, ...]] = {}  # parameter of the factory -> values


class SuperNet(SubSpace):
    """One set of weights for all sub-nets of a space, trained together; the best one is cut out at the end.

    AutoDistil (methods N2): every step trains one sub-net, drawn uniformly. At the end sub-nets within the budget are
    judged by their distillation loss on validation with the weights they inherit, and the best becomes the student.
    """

    least: ClassVar[int] = 1  # one sub-net, trained alone: what the others are compared with

    budget: Budget  # of the student
    judged: Count = 64  # sub-nets within the budget that are judged, drawn at random from a larger space
    samples: Count = 512  # of validation that judge them


class Search(Frozen):
    """Choose the student from a space, under a budget, before anything is trained.

    ``diswot`` (methods N1) scores a candidate beside the teacher, both with random weights, on one mini-batch: minus
    the differences of their class maps' channel correlations and of their samples' similarities. It looks at a
    population that evolves; ``grid`` scores every candidate of the space in the same way.
    """

    method: Literal["diswot", "grid"] = "diswot"
    space: Space
    budget: Budget
    population: Annotated[int, Field(ge=2)] = 16  # candidates that survive a generation, and new ones in each
    generations: Annotated[int, Field(ge=0)] = 8  # after the first, which is drawn at random
    terms: tuple[Literal["ickd", "sp"], ...] = ("ickd", "sp")  # channel correlation of class maps, similar samples
    widths: Literal["project", "pad"] = "project"  # unequal last widths: random projection to the narrower, or zeros
    draws: Count = 1  # random initialisations that a score is the mean of
    samples: Annotated[int, Field(ge=2)] = 64  # of the calibration split: the mini-batch
    seed: Annotated[int, Field(ge=0)] = 0  # of the search, whatever the recipe's

    @model_validator(mode="after")
    def _goes_together(self) -> Search:
        if not self.terms:
            raise ValueError('`terms` is empty: give "ickd", "sp" or both')
        if self.method == "grid" and self.space.size > GRID_LIMIT:
            raise ValueError(f"`grid` builds all {self.space.size:,} candidates, at most {GRID_LIMIT:,}: use `diswot`")
        return self

    @property
    def shown(self) -> str:
        """In words, for the plan."""
        limits = ", ".join(f"{name} {value:,}" for name, value in self.budget.model_dump(exclude_none=True).items())
        return f"{self.method} over {self.space.size:,} candidates ({', '.join(self.space.axes)}) within {limits}"


def named(candidate: Candidate) -> str:
    """``keep_layers 3, hidden_size 192``.

    >>> named({"keep_layers": (0, 2), "factory.width": 8})
    'keep_layers [0, 2], factory.width 8'
    """
    shown = {key: list(value) if isinstance(value, tuple) else value for key, value in candidate.items()}
    return ", ".join(f"{key} {value}" for key, value in shown.items())


def size_of(value: Any) -> float:
    """By what values of one key are ordered from small to large: a number, or how many indices."""
    return float(len(value)) if isinstance(value, tuple) else float(value)


def corners(space: SubSpace, limit: int = 16) -> list[Candidate]:
    """The smallest candidates: the least value of each key, every value of keys without an order; at most ``limit``."""
    axes = {}
    for name, values in space.axes.items():
        ordered = all(isinstance(value, int | float | tuple) and not isinstance(value, bool) for value in values)
        axes[name] = (min(values, key=size_of),) if ordered else values
    return [dict(zip(axes, values, strict=True)) for values in islice(product(*axes.values()), limit)]
