"""Lottery-ticket sparse tuning (methods T5): train everything, keep the largest changes, go back, train only those."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compressor.distil.objectives.base import Committed, Step
from compressor.masks import SparseUpdate
from compressor.models.patterns import largest
from compressor.types import LayerFact


class FewUpdates:
    """Implements :class:`compressor.distil.masks.base.Masking`.

    The student keeps all its weights; only a share of them differs from what it was when the stage began.
    """

    def __init__(self, student: nn.Module, config: SparseUpdate, optimiser: Any) -> None:
        self._config, self._optimiser = config, optimiser
        self._weights = {name: p for name, p in student.named_parameters() if p.requires_grad}
        self._start = {name: p.detach().clone() for name, p in self._weights.items()}
        self._kept: dict[str, Tensor] = {}  # name -> elements that train on; empty while all do
        self._restart = False  # the moving average starts again with the weights

    def parameters(self) -> Iterable[nn.Parameter]:
        return ()

    def train(self, training: bool) -> None:
        return None

    def _switch(self, total: int) -> int:
        return round(self._config.select * max(1, total - 1))

    def begin(self, step: Step) -> Step:
        if step.index == self._switch(step.total) and not self._kept:
            self._choose()
        return step

    def _choose(self) -> None:
        """The largest changes of all tensors together; every weight goes back, and the optimiser forgets."""
        changes = [(p.detach() - self._start[name]).abs().reshape(-1) for name, p in self._weights.items()]
        chosen = torch.from_numpy(largest(torch.cat(changes).float().cpu().numpy(), self._config.share))
        with torch.no_grad():
            for (name, weight), part in zip(
                self._weights.items(), chosen.split([len(c) for c in changes]), strict=True
            ):
                self._kept[name] = part.view(weight.shape).to(weight.device)
                weight.copy_(self._start[name])
        self._optimiser.state.clear()
        self._restart = True

    def gradients(self, step: Step) -> None:
        for name, mask in self._kept.items():
            grad = self._weights[name].grad
            if grad is not None:
                grad.mul_(mask)

    def end(self, average: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, mask in self._kept.items():
                start, weight = self._start[name], self._weights[name]
                weight.copy_(torch.where(mask, weight, start))
                if name in average:
                    average[name].copy_(weight if self._restart else torch.where(mask, average[name], start))
        self._restart = False

    def complete(self, index: int, total: int) -> bool:
        return index >= self._switch(total)

    def values(self) -> dict[str, float]:
        total = sum(weight.numel() for weight in self._weights.values())
        kept = sum(int(mask.sum()) for mask in self._kept.values()) if self._kept else total
        return {"sparse_update.share": kept / total}

    def state(self) -> dict[str, Any]:
        return {"start": self._start, "kept": self._kept}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._start, self._kept = dict(state["start"]), dict(state["kept"])

    def commit(self, student: nn.Module, example: Callable[[], Mapping[str, Tensor]]) -> Committed:
        facts = []
        for name, weight in self._weights.items():
            changed = float((weight.detach() != self._start[name]).float().mean())
            why = f"{self._config.share:.1%} of all weights may change, those that a first pass changed most"
            facts.append(LayerFact("distil", name, "updated", "", f"{changed:.1%} of its weights changed", why))
        return Committed((), tuple(facts))
