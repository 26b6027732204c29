"""The teacher's k largest logits and one bucket for all others: what is cached of a large vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from compressor.distil.objectives.base import Signals

TOP, INDEX, REST = "logits.top", "logits.index", "logits.rest"


def top_signals(logits: Tensor, k: int, temperatures: Iterable[float]) -> dict[str, Tensor]:
    """What stands for ``logits`` (..., C) in the bank.

    ``logits.top`` (..., k) the largest values, ``logits.index`` (..., k) their classes, and for each temperature tau
    ``logits.rest@tau`` (..., 1), log of the sum of exp(z / tau) over all other classes.
    """
    values, index = logits.float().topk(min(k, logits.shape[-1]), dim=-1)
    rest = logits.float().scatter(-1, index, float("-inf"))
    found = {TOP: values, INDEX: index}
    for tau in temperatures:
        bucket = torch.logsumexp(rest / tau, dim=-1, keepdim=True)
        found[f"{REST}@{tau:g}"] = bucket.clamp_min(-1e4)  # k = C leaves nothing: a finite number that weighs nothing
    return found


class TopTap:
    """The tap of a teacher whose full logits nobody reads."""

    def __init__(
        self, tap: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], k: int, temperatures: Iterable[float]
    ) -> None:
        self._tap, self._k, self._temperatures = tap, k, sorted(set(temperatures))

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = dict(self._tap(inputs))
        return found | top_signals(found.pop("logits"), self._k, self._temperatures)


def bucketed_kl(teacher: Signals, student: Tensor, tau: float) -> Tensor:
    """KL over {the teacher's k largest classes, all others as one} at temperature ``tau``, (...) for logits (..., C).

    Exactly the KL of the two distributions after that merging: never more than the full KL, and equal to it when the
    student shares the rest among its classes as the teacher does.
    """
    index = teacher[INDEX].long()
    log_p = torch.log_softmax(torch.cat([teacher[TOP].float() / tau, teacher[f"{REST}@{tau:g}"].float()], -1), -1)
    scaled = student.float() / tau
    rest = torch.logsumexp(scaled.scatter(-1, index, float("-inf")), dim=-1, keepdim=True).clamp_min(-1e4)
    log_q = torch.log_softmax(torch.cat([scaled.gather(-1, index), rest], -1), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
