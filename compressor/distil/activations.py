"""Gradient checkpointing: blocks are computed again in the backward pass instead of keeping what is inside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from compressor.errors import StageError


def blocks(module: nn.Module) -> list[nn.Module]:
    """What is computed as one: the elements of the outermost module lists, and the outermost ``Sequential`` modules."""
    found: list[nn.Module] = []
    for child in module.children() if not isinstance(module, nn.Sequential) else [module]:
        if isinstance(child, nn.ModuleList) and len(child) > 1:
            found += list(child)
        elif isinstance(child, nn.Sequential) and len(child) > 1 and _trainable(child):
            found.append(child)
        elif child is not module:
            found += blocks(child)
    return found


def _trainable(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


@contextmanager
def checkpointed(module: nn.Module) -> Iterator[None]:
    """Inside the ``with`` the blocks of ``module`` keep only their inputs while it trains.

    A ``Sequential`` is cut into about sqrt(n) segments (Chen et al., "Training Deep Nets with Sublinear Memory Cost",
    2016). Gradients are those of the plain module, dropout included; batch statistics are counted once.

    Raises:
        StageError: the module has no such blocks.
    """
    found = blocks(module)
    if not found:
        raise StageError(
            "checkpoint_activations finds no blocks: the student has neither a list of layers nor a Sequential",
            hint="Set checkpoint_activations = false; `accumulate` saves memory too.",
        )
    for block in found:
        block.forward = _segmented(block) if isinstance(block, nn.Sequential) else _again(block.forward, [block])
    try:
        yield
    finally:
        for block in found:
            del block.forward  # the class's own method is seen again


def _again(forward: Callable[..., Any], parts: Sequence[nn.Module]) -> Callable[..., Any]:
    norms = [m for part in parts for m in part.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _uncounted(norms)

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or not parts[0].training:
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return run


def _segmented(block: nn.Sequential) -> Callable[[Tensor], Tensor]:
    children = list(block)
    size = math.isqrt(len(children))
    segments = [children[start : start + size] for start in range(0, len(children), size)]

    def chain(parts: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            for part in parts:
                x = part(x)
            return x

        return forward

    runs = [_again(chain(parts), parts) for parts in segments]

    def forward(input: Tensor) -> Tensor:
        for run in runs:
            input = run(input)
        return input

    return forward


@contextmanager
def _uncounted(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """The second pass must not move the running statistics again."""
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, momentum, tracked in kept:
            norm.momentum = momentum
            norm.num_batches_tracked = tracked
