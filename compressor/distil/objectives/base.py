"""The interface of an objective. No torch at import time: the registry and the planner read it without training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from compressor.config import Frozen
from compressor.recipe import Match
from compressor.types import LayerFact

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

Signals = Mapping[str, "Tensor"]  # "logits", "hidden[2]", "qkv[0]" ... of one model for one batch
Counts = Mapping[str, int]  # what a model offers: ``compressor.models.signals.available``


@dataclass(frozen=True)
class Needs:
    """What an objective reads. The loop provides exactly this, so an undeclared signal is a ``KeyError`` in the tests.

    ``online_teacher``: the teacher must see inputs the student made, so nothing can be cached. ``batch_wise``: the
    value depends on the other samples of the batch, so the batch must not be cut into micro-batches. ``training_pass``:
    a fresh run costs one more pass of the teacher (none, when its outputs are in the bank) and perhaps of the student.
    """

    student: frozenset[str] = frozenset()
    teacher: frozenset[str] = frozenset()
    batch: frozenset[str] = frozenset()  # fields of Batch without which there is no value, and "mask" where it is read
    online_teacher: bool = False
    batch_wise: bool = False
    rollouts: bool = False
    same_vocab: bool = True
    training_pass: bool = False  # reads the whole training set once before the first step (see :class:`Surveys`)


@dataclass(frozen=True)
class Term:
    """An unreduced loss: the loop divides ``sum`` by ``count`` in one place, so that reductions never differ.

    ``sum`` is a scalar tensor with gradient; ``count`` what it was summed over (samples, valid tokens, pairs): a number
    or a scalar tensor without gradient.
    """

    sum: Tensor
    count: Tensor | float
    logs: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """Where the training is: ``index`` of ``total`` steps, in ``epoch`` (all from 0).

    ``alive``: for each transformer block of the student, whether masks that learn let it do anything; empty: all do.
    """

    index: int
    total: int
    epoch: int
    alive: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Batch:
    """What belongs to the samples rather than to a model. Every field but the first two is left out by most tasks.

    ``labels``: int64 (B,), or (B, T) where ``labels[b, t]`` is the class (next token) that the distribution at position
    t speaks of, -100 where there is none; for several labels a sample 0 or 1, float (B, C), a row of -100 without any.
    ``mask``: (B, T), non-zero at real tokens; None for pictures.
    ``response``: (B, T), non-zero at the tokens that are taught; None: all real tokens.
    ``ends``: int64 (B, T), the byte of the sample's text where the token of ``labels[b, t]`` ends, negative for none.
    ``starts``: int64 (B,), the byte where the first token of ``labels`` begins; None: 0.
    ``masked``: int64 (B, T), the tokens that augmentation hid from the models, -100 elsewhere; None: it hides none.
    ``groups``: int64 (B,), rows with equal numbers are one list (query, pair) in their order.
    ``scores``: float (B,), a teacher's offline score of each row.
    ``student_made``: bool (B,), rows that the student generated.
    ``source``: (B, S), non-zero at real tokens of the source text; encoder-decoder models only.
    ``vocabularies``: the student's beside those of the teacher of ``view``; None: one vocabulary.
    ``view``: the same samples as the teacher saw them (other tokenizer, longer context); None: as the student did.
    """

    labels: Tensor | None
    mask: Tensor | None
    response: Tensor | None = None
    ends: Tensor | None = None
    starts: Tensor | None = None
    masked: Tensor | None = None
    groups: Tensor | None = None
    scores: Tensor | None = None
    student_made: Tensor | None = None
    view: Batch | None = None
    source: Tensor | None = None
    vocabularies: Vocabularies | None = None

    def mask_of(self, signal: str) -> Tensor | None:
        """The mask of a signal's tokens: the encoder's lie at the source's, all others where the outputs do."""
        return self.source if signal.startswith("encoder.") else self.mask

    @property
    def taught(self) -> Tensor | None:
        """(B, T), non-zero at the tokens whose distributions count."""
        if self.response is None or self.mask is None:
            return self.mask if self.response is None else self.response
        return (self.mask != 0) & (self.response != 0)


@dataclass(frozen=True)
class Vocabularies:
    """Two vocabularies side by side, int64: see :class:`compressor.data.alignment.Shared`."""

    same: Tensor
    known: Tensor
    pieces: Tensor


@dataclass(frozen=True)
class Context:
    """Given to :meth:`Objective.prepare` once: one small batch of signals of both models, and the projectors' seed.

    ``classes``: how many classes (or dimensions) the student's output has.
    """

    student: Signals
    teacher: Signals
    generator: Generator
    device: Any
    classes: int = 0


@dataclass(frozen=True)
class Seen:
    """What a pass over a set shows of some of its samples. ``student`` is empty unless it was asked for."""

    teacher: Signals
    student: Signals
    batch: Batch
    positions: Any  # int64 (B,) array: their places in the set


# ``passes(student=False)``: the whole set in its order, batch by batch, without gradients and in evaluation mode.
# Called twice it gives the same values again; nothing but one batch is held in memory.
Pass = Callable[[bool], Iterator[Seen]]


Steps = tuple[Mapping[str, Any], ...]  # of a structure record: :mod:`compressor.models.rebuild`


@dataclass(frozen=True)
class Committed:
    """What an objective changed in the student for good: steps that rebuild it, and rows of the report."""

    steps: Steps = ()
    facts: tuple[LayerFact, ...] = ()


@runtime_checkable
class Surveys(Protocol):
    """An objective that learns something from the training set before the first step (class means, PCA, filters).

    What it finds goes into buffers or parameters of :meth:`Objective.modules`, so that a resumed run has it from its
    checkpoint: only a fresh run calls this. Shapes are made in ``prepare``, which every run calls.
    """

    def survey(self, training: Pass, generator: Generator) -> None: ...


@runtime_checkable
class ChangesStudent(Protocol):
    """An objective that puts a part into the student: a head it trains with, which stays or goes at the end.

    The part stands in the student during training, so that validation, moving average and checkpoints see what will
    ship. ``place`` (``head``, ``pooling`` or ``exits``) names what is changed: two objectives cannot change the same.
    """

    place: ClassVar[str]

    def unfit(self, student: nn.Module) -> list[str]:
        """Why the part cannot be put into this student; empty when it can."""
        ...

    def install(self, student: nn.Module, example: Signals) -> Steps:
        """Change the student in place; returns the record steps that do the same to its structure.

        ``example``: model inputs of a few samples. The same seed of torch gives the same student.
        """
        ...

    def commit(self, student: nn.Module, steps: Steps, validation: Pass | None) -> Committed:
        """After training: settle what stays. The returned steps take the place of ``steps``, those of ``install``.

        ``validation`` shows the student's signals on held-out samples; None when there are none.
        """
        ...


@runtime_checkable
class Objective(Protocol):
    """One loss term. Built from its options and match, bound to two models, prepared with real shapes, then called."""

    Options: ClassVar[type[Frozen]]
    default_match: ClassVar[Match | None]  # None: the objective knows its own signals and takes no ``match``
    needs: Needs

    def bind(self, student: Counts, teacher: Counts) -> list[str]:
        """Resolve the match against what the models offer, set ``needs``; returns what is impossible."""
        ...

    def prepare(self, ctx: Context) -> None:
        """Build projectors, class means and the like; once, before the first step."""
        ...

    def modules(self) -> nn.Module | None:
        """Trained parts (projectors, critics) that are dropped at export."""
        ...

    def parameters(self) -> Iterable[nn.Parameter]:
        """Their parameters."""
        ...

    def __call__(self, s: Signals, t: Signals, batch: Batch, step: Step) -> Term: ...


class NoOptions(Frozen):
    """The objective has no options."""


class SignalObjective:
    """Common part of the objectives here: options, match, and no trained parts unless a subclass makes some."""

    Options: ClassVar[type[Frozen]] = NoOptions
    default_match: ClassVar[Match | None] = None
    label_signal: ClassVar[str] = "logits"  # the student's signal that cross-entropy with the labels teaches

    def __init__(self, options: Any = None, match: Match | None = None) -> None:
        self.options: Any = options if options is not None else self.Options()
        self.match = match if match is not None else self.default_match
        self.needs = Needs()

    def bind(self, student: Counts, teacher: Counts) -> list[str]:
        raise NotImplementedError

    def prepare(self, ctx: Context) -> None:
        """Nothing to prepare."""

    def modules(self) -> nn.Module | None:
        return None

    def parameters(self) -> Iterable[nn.Parameter]:
        modules = self.modules()
        return () if modules is None else modules.parameters()

    def __call__(self, s: Signals, t: Signals, batch: Batch, step: Step) -> Term:
        raise NotImplementedError


Factory = Callable[..., Objective]
