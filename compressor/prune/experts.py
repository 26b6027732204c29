"""Experts of a mixture: the least used go, with their rows of the router."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.errors import Problem
from compressor.recipe import PruneStage
from compressor.types import LayerFact

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compressor.models.structure.experts import Mixture

Batch = Mapping[str, "Tensor"]


def kept_count(mixture: Mixture, ratio: float) -> int:
    return round(mixture.count * (1 - ratio))


def problems_of(module: nn.Module, example: Batch, config: PruneStage) -> list[Problem]:
    """What is wrong with the request for experts."""
    from compressor.models.structure.experts import find_mixtures

    if not config.experts:
        return []
    mixtures = find_mixtures(module, example)
    if not mixtures:
        return [Problem("experts", "matches nothing: the model has no router that picks the k best of its experts")]
    return [
        Problem(
            "experts",
            f"{config.experts:g} would leave {kept_count(mixture, config.experts)} of {mixture.count} experts in "
            f"`{mixture.block}`, which sends each token to {mixture.chosen}",
        )
        for mixture in mixtures
        if kept_count(mixture, config.experts) < mixture.chosen
    ]


def drop_experts(
    work: nn.Module, example: Batch, config: PruneStage, batches: Iterable[Batch], seed: int
) -> tuple[nn.Module, list[dict[str, Any]], list[LayerFact]]:
    """``work`` without the experts that fewest calibration tokens are sent to (``random`` importance drops any).

    A block whose smaller form does not compute what the whole one does with those experts switched off stays whole.
    """
    from compressor.models.structure.experts import find_mixtures, usage

    if not config.experts:
        return work, [], []
    mixtures = find_mixtures(work, example)
    data = batches if next(iter(batches), None) is not None else [example]
    counts = usage(work, mixtures, data)
    generator = np.random.default_rng(seed)
    record: list[dict[str, Any]] = []
    facts = []
    for mixture in mixtures:
        scores = generator.random(mixture.count) if config.importance == "random" else counts[mixture.block]
        left = kept_count(mixture, config.experts)
        keep = sorted(np.argsort(-scores, kind="stable")[:left].tolist())
        smaller, steps, wrong = _without(work, mixture, keep, example)
        used = counts[mixture.block].astype(int).tolist()
        reason = "random control" if config.importance == "random" else f"least used on calibration data: {used} tokens"
        after = mixture.count if wrong else left
        action = "kept" if wrong else "pruned"
        facts.append(
            LayerFact("prune", mixture.block, action, f"{mixture.count} experts", f"{after} experts", wrong or reason)
        )
        if not wrong:
            work, record = smaller, record + steps
    return work, record, facts


def _without(
    work: nn.Module, mixture: Mixture, keep: list[int], example: Batch
) -> tuple[nn.Module, list[dict[str, Any]], str]:
    """The smaller module, its record, and what is wrong with it."""
    from compressor.models.rebuild import replay
    from compressor.models.structure.experts import Without, expert_steps
    from compressor.models.structure.surgery import FORWARD_ERRORS, agree, outputs_of

    steps = expert_steps(work, mixture, keep)
    gone = [number for number in range(mixture.count) if number not in keep]
    try:
        smaller = replay(work, steps)
        found = outputs_of(smaller, example)
    except FORWARD_ERRORS as error:
        return work, [], f"its forward fails with fewer experts ({type(error).__name__}: {error})".split("\n")[0]
    with Without(work, dict.fromkeys(mixture.routers, gone)):
        wanted = outputs_of(work, example)
    wrong = "" if agree(wanted, found) else "with fewer experts it does not compute what it does without the others"
    return smaller, steps, wrong


__all__ = ["drop_experts", "kept_count", "problems_of"]
