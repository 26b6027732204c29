"""Zeros instead of a cut: by magnitude, unstructured, N of M, or in blocks. All sizes stay as they are."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compressor.errors import PlanError, Problem
from compressor.recipe import PruneStage
from compressor.types import LayerFact

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Sparsified:
    """A module with zeros and their masks, the steps that rebuild its structure, and how many weights are zero."""

    module: nn.Module
    record: list[dict[str, Any]]
    facts: tuple[LayerFact, ...]
    weights: int  # elements of the masked weights
    zeros: int


def check(module: nn.Module, config: PruneStage) -> list[Problem]:
    """What keeps the zeros that ``config`` asks for from being made; ``where`` is the key inside the stage."""
    from compressor.models.sparse import problems_of

    return problems_of(module, config.zeros, config.protect) if config.zeros is not None else []


def sparsify(module: nn.Module, config: PruneStage) -> Sparsified:
    """A copy of ``module`` with the zeros that ``config`` asks for, at once.

    Raises :class:`PlanError` for what :func:`check` finds.
    """
    from compressor.models import sparse

    zeros, problems = config.zeros, check(module, config)
    if problems or zeros is None:
        raise PlanError("the prune stage", problems or [Problem("sparsity", "is not given")])
    made = copy.deepcopy(module).eval()
    found = sparse.maskable(made, zeros, config.protect)
    before = {name: sparse.density(made.get_parameter(name)) for name in found.axes}
    sparse.set_zeros(made, found, zeros)
    weights = [made.get_parameter(name) for name in found.axes]
    return Sparsified(
        made,
        sparse.mask_steps(found, zeros),
        tuple(sparse.mask_facts(made, before, found, zeros)),
        sum(weight.numel() for weight in weights),
        sum(int((weight == 0).sum()) for weight in weights),
    )


__all__ = ["Sparsified", "check", "sparsify"]
