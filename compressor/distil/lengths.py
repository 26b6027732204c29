"""Short and long texts of a batch run apart, so that a query is not padded to the length of its passage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

Tap = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
WORTH = 0.8  # of the padded tokens must remain at most, for a second pass to be worth its overhead
BY_TOKEN = "hidden["  # signals (B, T, d); those without it here are (B, d)
SPLITS = ("logits", "pooled", "projected", BY_TOKEN)


def separable(names: Iterable[str]) -> bool:
    """Can these signals be joined from two passes?"""
    return all(name.startswith(SPLITS) for name in names)


def apart(tap: Tap) -> Tap:
    """``tap``, run on the short and on the long texts of a batch where that saves padding; the same signals.

    Signals of tokens are padded with zeros to the longest text; what stands there is masked anyway.
    """

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        mask = inputs.get("attention_mask")
        cut = None if mask is None else best_cut(mask.sum(1))
        if cut is None or mask is None:
            return tap(inputs)
        rows, width = cut
        short = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
        short[rows] = True
        long = torch.nonzero(~short).flatten()
        first = tap({name: tensor[rows, :width] for name, tensor in inputs.items()})
        second = tap({name: tensor[long] for name, tensor in inputs.items()})
        back = torch.cat([rows, long]).argsort()
        return {name: _joined(name, first[name], second[name])[back] for name in first}

    return run


def _joined(name: str, short: Tensor, long: Tensor) -> Tensor:
    if name.startswith(BY_TOKEN):
        short = F.pad(short, (0, 0, 0, long.shape[1] - short.shape[1]))
    return torch.cat([short, long])


def best_cut(lengths: Tensor) -> tuple[Tensor, int] | None:
    """The texts that run first and the length of their longest; None where one pass is cheaper.

    >>> best_cut(torch.tensor([3, 60, 4, 64]))
    (tensor([0, 2]), 4)
    """
    values, order = lengths.sort(stable=True)
    count = len(values)
    if count < 2:
        return None
    sizes = torch.arange(1, count, device=lengths.device)
    tokens = sizes * values[:-1] + (count - sizes) * values[-1]
    best = int(tokens.argmin())
    if float(tokens[best]) > WORTH * count * float(values[-1]) or int(values[best]) < 1:
        return None
    return order[: best + 1], int(values[best])
