"""Zeros that grow on a schedule while the student trains, and zeros of earlier stages that are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compressor.distil.objectives.base import Committed, Step
from compressor.errors import StageError
from compressor.masks import Masks
from compressor.models import sparse
from compressor.models.patterns import cubic


class KeptZeros:
    """Implements :class:`compressor.distil.masks.base.Masking`; the masks themselves are buffers of the student.

    Masked elements get no gradient, so that neither momentum nor clipping sees them, and are zero after every step.
    """

    def __init__(self, student: nn.Module, config: Masks | None) -> None:
        """``config``: the masks that this stage makes grow; None: all are there."""
        self._student, self._config = student, config
        self._before: dict[str, float] = {}
        self._steps: list[dict[str, Any]] = []
        if config is not None:
            self._found = sparse.maskable(student, config.zeros, config.protect)
            if not self._found.axes:
                reasons = "; ".join(sorted(set(self._found.dense.values())))
                raise StageError(
                    "`masks` matches no layer of the student", hint=f"Why: {reasons or 'none has a weight'}."
                )
            self._before = {name: sparse.density(student.get_parameter(name)) for name in self._found.axes}
            for name in self._found.axes:
                sparse.add_mask(student, name)
            self._steps = sparse.mask_steps(self._found, config.zeros)
        self._masked = list(sparse.masked(student))

    def parameters(self) -> Iterable[nn.Parameter]:
        return ()

    def train(self, training: bool) -> None:
        return None

    def begin(self, step: Step) -> Step:
        config = self._config
        if config is None:
            return step
        first, last = (round(at * max(1, step.total - 1)) for at in (config.start, config.end))
        due = first <= step.index <= last and ((step.index - first) % config.every == 0 or step.index == last)
        if due:
            share = 1.0 if step.index == last else cubic(step.index, first, last)
            sparse.set_zeros(self._student, self._found, config.zeros, share)
        return step

    def gradients(self, step: Step) -> None:
        for _, weight, mask in self._masked:
            if weight.grad is not None:
                weight.grad.mul_(mask)

    def end(self, average: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, weight, mask in self._masked:
                weight.mul_(mask)
                if name in average:
                    average[name].mul_(mask)

    def complete(self, index: int, total: int) -> bool:
        return self._config is None or index >= round(self._config.end * max(1, total - 1))

    def values(self) -> dict[str, float]:
        if self._config is None:
            return {}
        gone = sum(int((~mask).sum()) for _, _, mask in self._masked)
        return {"masks.sparsity": gone / sum(mask.numel() for _, _, mask in self._masked)}

    def state(self) -> dict[str, Any]:
        return {"before": self._before}  # the masks are in the student's state

    def restore(self, state: Mapping[str, Any]) -> None:
        self._before = dict(state["before"])

    def commit(self, student: nn.Module, example: Callable[[], Mapping[str, Tensor]]) -> Committed:
        sparse.apply_masks(student)
        if self._config is None:
            return Committed()
        facts = sparse.mask_facts(student, self._before, self._found, self._config.zeros)
        return Committed(tuple(self._steps), tuple(facts))
