"""The interface of what accompanies the steps of a stage, and the one that does nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from compressor.distil.objectives.base import Committed, Step


class Masking(Protocol):
    """Called around every step. Everything is a function of the step and of what the checkpoint holds."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """What learns besides the student; not in its optimiser."""
        ...

    def train(self, training: bool) -> object:
        """Is the student about to be trained (True) or judged?"""
        ...

    def begin(self, step: Step) -> Step:
        """Before the forward passes of a step; the step as objectives shall see it."""
        ...

    def gradients(self, step: Step) -> None:
        """After the backward passes, before clipping."""
        ...

    def end(self, average: Mapping[str, Tensor]) -> None:
        """After the optimiser and the moving average, whose values may be changed in place."""
        ...

    def complete(self, index: int, total: int) -> bool:
        """May the student as it is after step ``index`` be the best one?"""
        ...

    def values(self) -> dict[str, float]:
        """Figures for the history."""
        ...

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        ...

    def commit(self, student: nn.Module, example: Callable[[], Mapping[str, Tensor]]) -> Committed:
        """Settle the masks in the student, in place; steps that rebuild its structure, and rows of the report."""
        ...


class NoMasking:
    """A stage without masks."""

    def parameters(self) -> Iterable[nn.Parameter]:
        return ()

    def train(self, training: bool) -> None:
        return None

    def begin(self, step: Step) -> Step:
        return step

    def gradients(self, step: Step) -> None:
        return None

    def end(self, average: Mapping[str, Tensor]) -> None:
        return None

    def complete(self, index: int, total: int) -> bool:
        return True

    def values(self) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        return None

    def commit(self, student: nn.Module, example: Callable[[], Mapping[str, Tensor]]) -> Committed:
        return Committed()
