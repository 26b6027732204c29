"""Low-rank adapters (methods X17): only they are trained, and merging them leaves the model as it was built."""

from __future__ import annotations

import math
from fnmatch import fnmatch

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compressor.errors import StageError
from compressor.language import LoRA


class LowRank(nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    """``W + (alpha / rank) B A`` in place of a weight (rows, columns): A (rank, columns) random, B (rows, rank) zero.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021. The product is formed once a forward pass,
    which costs as much as ``rank`` more tokens in the batch.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        bound = math.sqrt(3 / columns)  # kaiming_uniform with a = sqrt(5), as nn.Linear draws
        self.down = nn.Parameter((torch.rand(rank, columns, generator=generator) * 2 - 1) * bound)
        self.up = nn.Parameter(torch.zeros(rows, rank))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.up @ self.down)


def adapt(module: nn.Module, config: LoRA, seed: int) -> int:
    """Give the matching linear layers an adapter and freeze everything else; the number of trained parameters.

    Tied weights (an embedding that is also the head) get none: a merged head would untie them.

    Raises:
        StageError: no linear layer matches.
    """
    generator = torch.Generator().manual_seed(seed)
    owners: dict[int, int] = {}
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    chosen = [
        part
        for name, part in module.named_modules()
        if _is_linear(part)
        and owners[id(part.weight)] == 1
        and any(fnmatch(name, pattern) or fnmatch(name.rpartition(".")[2], pattern) for pattern in config.modules)
    ]
    if not chosen:
        names = ", ".join(name for name, part in module.named_modules() if _is_linear(part))
        raise StageError("`lora.modules` matches no linear layer", hint=f"The model has {names[:300] or 'none'}.")
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    for part in chosen:
        rank = min(config.rank, *part.weight.shape)
        parametrize.register_parametrization(part, "weight", LowRank(part.weight, rank, config.alpha, generator))
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def merge(module: nn.Module) -> None:
    """Add the adapters to the weights and remove them; every parameter can be trained again."""
    for part in list(module.modules()):
        if parametrize.is_parametrized(part, "weight") and isinstance(part.parametrizations.weight[0], LowRank):
            parametrize.remove_parametrizations(part, "weight", leave_parametrized=True)
    for parameter in module.parameters():
        parameter.requires_grad_(True)


def _is_linear(part: nn.Module) -> bool:
    """nn.Linear, or transformers' Conv1D, which is one with its weight transposed."""
    return isinstance(part, nn.Linear) or (hasattr(part, "nx") and hasattr(part, "nf"))
