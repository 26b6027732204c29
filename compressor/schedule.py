"""Values that change while a stage trains, as data: a number, or a table with its course. No torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)

from compressor.config import Frozen

Share = Annotated[float, Field(ge=0, le=1)]
_WARMUP_END = 0.1


class Schedule(Frozen):
    """A value over the run. ``start`` and ``end`` are fractions of the run; before and after them the value stands.

    ``linear`` and ``cosine`` go from ``from`` to ``to``; ``warmup`` rises from 0 to ``to`` until ``end`` (0.1);
    ``step`` jumps to ``to`` at ``start``; ``constant`` stays at ``from``. ``feedback`` starts at ``from`` and moves by
    ``by`` towards ``to`` after every epoch in which the watched quantity rose (or fell) by more than ``by_more_than``.
    """

    model_config = ConfigDict(populate_by_name=True)

    kind: Literal["linear", "cosine", "constant", "step", "warmup", "feedback"]
    from_: float | None = Field(None, alias="from")  # `from`: first value; 1, or 0 for warmup and feedback
    to: float | None = None  # last value; 0, or 1 for warmup and feedback
    start: Share = 0.0  # of the run
    end: Share | None = None  # of the run; 1, or 0.1 for warmup
    watch: str = "score"  # feedback: `score`, `loss` or the name of a term
    when: Literal["rises", "falls"] = "rises"  # feedback
    by: Annotated[float, Field(gt=0)] = 0.1  # feedback: size of one move
    by_more_than: Annotated[float, Field(ge=0)] = 0.0  # feedback: smaller changes are ignored

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.start > self.last:
            raise ValueError("`start` must not come after `end`")
        return self

    @model_serializer(mode="wrap")
    def _named(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found = handler(self)
        return {("from" if key == "from_" else key): value for key, value in found.items()}

    @property
    def first(self) -> float:
        """The value at the start."""
        rising = self.kind in {"warmup", "feedback"}
        return self.from_ if self.from_ is not None else 0.0 if rising else 1.0

    @property
    def final(self) -> float:
        """The value that it moves towards."""
        if self.kind == "constant":
            return self.first
        return self.to if self.to is not None else 1.0 if self.kind in {"warmup", "feedback"} else 0.0

    @property
    def last(self) -> float:
        """The fraction of the run at which it arrives."""
        return self.end if self.end is not None else max(self.start, _WARMUP_END) if self.kind == "warmup" else 1.0

    @property
    def values(self) -> tuple[float, float]:
        """Both ends: every value lies between them."""
        return self.first, self.final


def none_below(value: Any, least: float, *, allowed: bool) -> None:
    """Refuse a number or schedule that goes below ``least`` (or reaches it, unless ``allowed``)."""
    ends = value.values if isinstance(value, Schedule) else (value,)
    if min(ends) < least:
        raise ValueError(f"must be at least {least:g}")
    if not allowed and max(ends) <= least:
        raise ValueError(f"must be greater than {least:g}")


def _tag(value: Any) -> str:
    return "schedule" if isinstance(value, dict | Schedule) else "number"


def _tag_or_word(value: Any) -> str:
    return "word" if isinstance(value, str) else _tag(value)


def _weight(value: float | Schedule) -> float | Schedule:
    none_below(value, 0.0, allowed=False)
    return value


def _label_weight(value: float | Schedule | Literal["estimate"]) -> float | Schedule | Literal["estimate"]:
    if value != "estimate":
        none_below(value, 0.0, allowed=True)
    return value


def _share(value: float | Schedule) -> float | Schedule:
    none_below(value, 0.0, allowed=True)
    if max(value.values if isinstance(value, Schedule) else (value,)) > 1:
        raise ValueError("must be at most 1")
    return value


_Either = Annotated[Annotated[float, Tag("number")] | Annotated[Schedule, Tag("schedule")], Discriminator(_tag)]
Weight = Annotated[_Either, AfterValidator(_weight)]
LabelWeight = Annotated[
    Annotated[
        Annotated[float, Tag("number")]
        | Annotated[Schedule, Tag("schedule")]
        | Annotated[Literal["estimate"], Tag("word")],
        Discriminator(_tag_or_word),
    ],
    AfterValidator(_label_weight),
]
Weight01 = Annotated[_Either, AfterValidator(_share)]
Option = Annotated[
    Annotated[float | int | str | bool, Tag("number")] | Annotated[Schedule, Tag("schedule")], Discriminator(_tag)
]


def shown(value: float | Schedule | str) -> str:
    """``0.5``, ``1 -> 0 (linear)``, or a word as it is."""
    if isinstance(value, str):
        return value
    if isinstance(value, Schedule):
        return f"{value.first:g} -> {value.final:g} ({value.kind})"
    return f"{value:g}"
