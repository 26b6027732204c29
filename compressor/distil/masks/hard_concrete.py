"""The hard-concrete distribution: a mask in [0, 1] that is exactly 0 or 1 with a probability that can be learnt.

Louizos et al., "Learning Sparse Neural Networks through L0 Regularization", 2018, with CoFi's constants (methods U2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TEMPERATURE = 2 / 3
LOW, HIGH = -0.1, 1.1  # the stretch
SHARPNESS = 0.8  # of the masks that stay ("magical number" of CoFi)
_EDGE = 1e-6  # noise is drawn from (edge, 1 - edge), as log 0 is not finite


def noise(units: int, generator: torch.Generator) -> Tensor:
    """Uniform noise for one mask, float32 (units)."""
    return torch.rand(units, generator=generator) * (1 - 2 * _EDGE) + _EDGE


def sampled(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """z = clip(sigmoid((log u - log(1 - u) + log alpha) / beta) (high - low) + low, 0, 1), shape of ``log_alpha``."""
    soft = torch.sigmoid((uniform.log() - torch.log1p(-uniform) + log_alpha) / TEMPERATURE)
    return (soft * (HIGH - LOW) + LOW).clamp(0, 1)


def open_probability(log_alpha: Tensor) -> Tensor:
    """P(z > 0) = sigmoid(log alpha - beta log(-low / high))."""
    return torch.sigmoid(log_alpha - TEMPERATURE * math.log(-LOW / HIGH))


def settled(log_alpha: Tensor, multiple: int = 1) -> Tensor:
    """The mask without noise: the least likely units are 0, the others keep sigmoid(log alpha / beta * 0.8).

    As many units are 0 as are expected to be, units - sum P(z > 0); the number that stays is rounded to ``multiple``.
    """
    soft = torch.sigmoid(log_alpha.detach() / TEMPERATURE * SHARPNESS)
    units = soft.numel()
    wanted = float(open_probability(log_alpha.detach()).sum())
    kept = min(units, math.floor(wanted / multiple + 0.5) * multiple)
    found = torch.zeros_like(soft)
    chosen = torch.argsort(soft, descending=True, stable=True)[:kept]
    found[chosen] = soft[chosen]
    return found


def log_alpha_of(probability: float) -> float:
    """log alpha of a mask whose gate is open with this probability before the stretch: log(p / (1 - p))."""
    return math.log(probability) - math.log1p(-probability)
