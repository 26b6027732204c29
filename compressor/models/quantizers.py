"""Quantizers of weights and activations as differentiable functions: what a device will compute, with gradients.

Every quantizer of weights gives integer codes and a scale, and the value in training is ``codes * scale`` in float32,
which is what a DequantizeLinear of the exported file computes. Weights come as rows (R, K): a row shares a scale, it is
an output channel, a group of its inputs, or the whole tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

TERNARY_THRESHOLD = 0.7  # of the mean magnitude (TWN)
SHIFT_STEPS = 64  # a shift is a multiple of a 64th of its scale, so that scale and shift fit into int8 codes together
SHRINKS = 32  # clipping ranges that are tried for the least squared error
TINY = 1e-8  # smallest scale: a dead channel stays finite


class Codes(NamedTuple):
    """Integers (R, K), held as float, and what one of them is worth, (R, 1); ``zero`` (R, 1) is already taken off."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None

    @property
    def value(self) -> Tensor:
        return self.codes * self.scale


@dataclass(frozen=True)
class Range:
    """Codes from ``low`` to ``high``, both included."""

    low: int
    high: int


def signed(bits: int, *, narrow: bool = False, reduced: bool = False) -> Range:
    """Codes of signed weights. ``narrow`` leaves the lowest one out; ``reduced``: seven bits, for x86 without VNNI.

    >>> signed(8, narrow=True), signed(2), signed(8, reduced=True)
    (Range(low=-127, high=127), Range(low=-2, high=1), Range(low=-64, high=64))
    """
    if reduced and bits == 8:
        return Range(-64, 64)
    top = 2 ** (bits - 1) - 1
    return Range(-top if narrow else -top - 1, top)


def round_through(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes as if nothing had been rounded (straight-through)."""
    return x + (x.round() - x).detach()


def through(quantized: Tensor, latent: Tensor) -> Tensor:
    """The quantized value with the latent weight's gradient added to its own (straight-through).

    The second summand is exactly 0, so that the value is bit for bit what the file will hold.
    """
    return quantized + (latent - latent.detach())


def damped(parameter: Tensor, elements: int, levels: int) -> Tensor:
    """A learnt range whose gradient is scaled by 1 / sqrt(elements * levels) (LSQ); the value is unchanged."""
    share = 1.0 / (elements * max(1, levels)) ** 0.5
    return parameter.detach() + (parameter - parameter.detach()) * share


# ------------------------------------------------------------------------------------------------- uniform weights


def lsq(rows: Tensor, scale: Tensor, limits: Range) -> Codes:
    """Symmetric uniform codes with a learnt scale: w_hat = s * clip(round(w / s), low, high).

    The gradient of s is that of LSQ: round(w/s) - w/s inside the range, the limit outside; that of w is 1 inside and 0
    outside.
    """
    return Codes(round_through((rows / scale).clamp(limits.low, limits.high)), scale)


def least_error_scale(rows: Tensor, limits: Range) -> Tensor:
    """The scale (R, 1) with each row's least squared error among ``SHRINKS`` clippings of its largest magnitude."""
    peak = torch.maximum(rows.amax(1, keepdim=True) / limits.high, rows.amin(1, keepdim=True) / limits.low)
    peak = peak.clamp_min(TINY)
    best, least = peak, torch.full_like(peak, float("inf"))
    for share in torch.linspace(0.2, 1.0, SHRINKS).tolist():
        scale = peak * share
        error = ((rows / scale).round().clamp(limits.low, limits.high) * scale - rows).square().sum(1, keepdim=True)
        best, least = torch.where(error <= least, scale, best), torch.minimum(error, least)
    return best


def minmax(rows: Tensor, bits: int) -> Codes:
    """Asymmetric codes from each row's smallest to its largest value, zero included (the 4-bit form of methods Q1).

    Unsigned codes from 0 to 2^bits - 1 are ``codes + zero``; ``codes * scale`` is the weight within half a scale.
    """
    low, high = rows.amin(1, keepdim=True).clamp_max(0), rows.amax(1, keepdim=True).clamp_min(0)
    top = 2**bits - 1
    scale = torch.where(high > low, (high - low) / top, torch.ones_like(high))
    zero = (-low / scale).round().clamp(0, top)
    stored = ((rows / scale).round() + zero).clamp(0, top)
    return Codes((stored - zero).detach(), scale.detach(), zero.detach())


# ------------------------------------------------------------------------------------------------- ternary weights


def twn(rows: Tensor) -> tuple[Codes, Tensor]:
    """Ternary weights (Li et al., 2016; methods Q1): T = sign(w) where |w| > 0.7 mean|w|, scale = mean of those |w|.

    The scale is the least-squares one for these T. Also gives the thresholds (R, 1).

    >>> codes, threshold = twn(torch.tensor([[0.9, -0.1, 0.05, -0.7, 0.3, -0.2]]))
    >>> [round(float(x), 6) for x in (threshold, codes.scale)]
    [0.2625, 0.633333]
    """
    threshold = TERNARY_THRESHOLD * rows.abs().mean(1, keepdim=True)
    kept = rows.abs() > threshold
    scale = (rows.abs() * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp_min(1)
    return Codes(rows.sign() * kept, scale.clamp_min(TINY)), threshold


def dlt_start(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift (R, 1) with the least squared error of ``scale * T + shift``, T that of :func:`twn`.

    For every row the error is at most that of TWN, which is the same without a shift (methods Q2).
    """
    codes = twn(rows)[0].codes
    mean_w, mean_t = rows.mean(1, keepdim=True), codes.mean(1, keepdim=True)
    spread = (codes - mean_t).square().sum(1, keepdim=True)
    together = ((codes - mean_t) * (rows - mean_w)).sum(1, keepdim=True)
    flat = spread < TINY  # all T equal: no slope can be told from the shift
    scale = torch.where(flat, rows.abs().mean(1, keepdim=True), together / spread.clamp_min(TINY)).clamp_min(TINY)
    return scale, mean_w - scale * mean_t


def dlt(rows: Tensor, scale: Tensor, ratio: Tensor, steps: int = SHIFT_STEPS) -> Codes:
    """Ternary weights with a learnt scale and shift (methods Q2): w_hat = scale * (T + ratio), T that of :func:`twn`.

    ``ratio`` = shift / scale is rounded to multiples of 1 / ``steps`` (straight-through), so that w_hat = (scale /
    steps) * (steps * T + m) has three int8 codes a row. The gradient reaches the latent weight as it is.
    """
    codes = twn(rows.detach())[0].codes.detach()
    shift = round_through((ratio * steps).clamp(1 - steps, steps - 1))
    return Codes(codes * steps + shift, scale / steps)


# ------------------------------------------------------------------------------------------------- activations


def fake_activation(x: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """(clip(round(x / s) + z, 0, top) - z) * s with integer z; learnt s and z get LSQ's and LSQ+'s gradients."""
    point = round_through(zero)
    return ((round_through(x / scale) + point).clamp(0, top) - point) * scale


def activation_start(low: float, high: float, bits: int, *, symmetric: bool) -> tuple[float, float]:
    """Scale and zero point (unsigned convention) that cover a range; a symmetric one has its zero in the middle.

    >>> activation_start(0.0, 25.5, 8, symmetric=False), activation_start(-2.54, 1.0, 8, symmetric=True)
    ((0.1, 0.0), (0.02, 128.0))
    """
    top = 2**bits - 1
    if symmetric:
        middle = 2 ** (bits - 1)
        return max(-low, high, TINY) / (middle - 1), float(middle)
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(high - low, TINY) / top
    return scale, float(min(max(round(-low / scale), 0), top))
