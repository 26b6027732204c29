"""Optimisers, learning-rate schedules and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

from compressor.recipe import DistilStage

MOMENTUM = 0.9
ONE_CYCLE_START = 0.3  # share of the steps in which one-cycle rises (Smith and Topin, "Super-Convergence", 2017)
ONE_CYCLE_LOW = 1 / 25  # its first learning rate over the highest


def optimiser(student: nn.Module, extra: Iterable[nn.Parameter], config: DistilStage) -> torch.optim.Optimizer:
    """AdamW or SGD (Nesterov, momentum 0.9); no weight decay on biases, norms and projectors.

    Uses torch's fused kernels, which update all parameters in one call.
    """
    trained = [p for p in student.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [*(p for p in trained if p.dim() < 2), *extra], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimiser == "sgd":
        # the fused kernel cannot take parameters that join later, without a momentum of their own yet
        fused = not config.unfreeze
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=MOMENTUM, nesterov=True, fused=fused)
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def learning_rate(step: int, total: int, config: DistilStage) -> float:
    """Learning rate of a step (from 0): a pure function, so that a resumed run needs no scheduler state."""
    peak = config.learning_rate
    if config.schedule == "one-cycle":
        rise = max(1.0, ONE_CYCLE_START * total)
        if step < rise:
            return peak * (ONE_CYCLE_LOW + (1 - ONE_CYCLE_LOW) * 0.5 * (1 - math.cos(math.pi * step / rise)))
        return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1.0, total - rise)))
    warm = int(config.warmup * total)
    if step < warm:
        return peak * (step + 1) / warm
    done = (step - warm) / max(1, total - warm)
    if config.schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    return peak * (1 - done) if config.schedule == "linear" else peak


def freeze(student: nn.Module, patterns: Iterable[str]) -> tuple[list[nn.Parameter], list[nn.Module]]:
    """Stop the gradient of parameters whose names match; returns them, and the modules that they make constant.

    A module all of whose own parameters are frozen must stay in evaluation mode, or its batch statistics would move.
    """
    wanted = tuple(patterns)
    frozen = [p for name, p in student.named_parameters() if p.requires_grad and any(fnmatch(name, w) for w in wanted)]
    for parameter in frozen:
        parameter.requires_grad_(False)
    still = [m for m in student.modules() if frozen and _all_frozen(m)]
    return frozen, still


class Thaw:
    """Gradual unfreezing: groups of parameters join the training one by one, a pure function of the step.

    Source: Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification", 2018;
    XtremeDistilTransformers (methods T3) unfreezes from the top down in the same way.
    """

    def __init__(self, student: nn.Module, patterns: Sequence[str], by: float) -> None:
        """``patterns``: one a group, the first trains at once; a parameter belongs to the first that matches it.

        Patterns that match nothing are no groups, so that something trains from the first step on.
        """
        self._student, self._by = student, by
        self._open = -1
        groups = [(next((i for i, w in enumerate(patterns) if fnmatch(n, w)), 0), p) for n, p in _trained(student)]
        found = ([p for number, p in groups if number == group] for group in range(len(patterns)))
        self._groups = [group for group in found if group]
        self._count = len(self._groups)

    def at(self, step: int, total: int) -> bool:
        """Open what trains at this step; did that change something?"""
        done = step / max(1, total - 1)
        count = sum(self._by * group <= done * max(1, self._count - 1) for group in range(self._count))
        if count == self._open:
            return False
        self._open = count
        for number, group in enumerate(self._groups):
            for parameter in group:
                parameter.requires_grad_(number < count)
        return True

    def still(self) -> list[nn.Module]:
        """Modules that are constant at this step."""
        return [m for m in self._student.modules() if _all_frozen(m)]

    def release(self) -> None:
        """All groups can be trained again."""
        for group in self._groups:
            for parameter in group:
                parameter.requires_grad_(True)


def _trained(student: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in student.named_parameters() if p.requires_grad]


def _all_frozen(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return bool(own) and not any(p.requires_grad for p in own)


class MovingAverage:
    """Exponential moving average of parameters and floating-point buffers; early steps use a smaller decay."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._live = {n: t for n, t in module.state_dict(keep_vars=False).items() if t.is_floating_point()}
        self.values = {name: tensor.detach().clone() for name, tensor in self._live.items()}

    def update(self, step: int) -> None:
        """Move the average towards the live weights after a step (from 0)."""
        with torch.no_grad():
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(self.values.values()), list(self._live.values()), 1 - decay)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take the average from a checkpoint."""
        with torch.no_grad():
            for name, tensor in values.items():
                self.values[name].copy_(tensor)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module has the averaged weights inside the ``with``."""
        kept = {name: tensor.detach().clone() for name, tensor in self._live.items()}
        self._copy(self.values)
        try:
            yield
        finally:
            self._copy(kept)

    def _copy(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in values.items():
                self._live[name].copy_(tensor)
