"""The grid of few-bit weights: codes, scales and zero points in groups along the input, and the nearest point on it.

A group of ``block`` neighbouring input rows of one output column shares a scale and a zero point:
``weight = (code - zero) * scale``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from compressor.types import Array

Bits = Literal[4, 8]
COLUMNS = 2048  # output columns worked on at once: what bounds the scratch memory of a layer


class Codes(NamedTuple):
    """A quantized (K, N) weight: codes uint8 (N, G, block), scales float32 (N, G), zero points uint8 (N, G)."""

    codes: Array
    scale: Array
    zero: Array


def round_to_nearest(weight: Array, bits: Bits, block: int) -> Codes:
    """Codes (N, G, block), scales (N, G) and zero points (N, G) of a (K, N) weight; K is filled up with zeros.

    A group spans from its smallest to its largest value, zero included; ``weight = (code - zero) * scale`` within half
    a scale.
    """
    rows = grouped(weight, block)
    scale, zero = spans(rows, bits)
    top = 2**bits - 1
    codes = np.clip(np.round(rows / scale[..., None]) + zero[..., None], 0, top).astype(np.uint8)
    return Codes(codes, scale, zero)


def grouped(weight: Array, block: int) -> Array:
    """A (K, N) weight as float32 (N, G, block), filled up with zeros."""
    inputs, outputs = weight.shape
    groups = -(-inputs // block)
    rows = np.zeros((outputs, groups * block), np.float32)
    rows[:, :inputs] = weight.T
    return rows.reshape(outputs, groups, block)


def spans(rows: Array, bits: Bits) -> tuple[Array, Array]:
    """Scale (N, G) and zero point (N, G) of each group of (N, G, block)."""
    low, high = np.minimum(rows.min(axis=2), 0), np.maximum(rows.max(axis=2), 0)
    top = 2**bits - 1
    scale = np.where(high > low, (high - low) / top, 1.0).astype(np.float32)
    zero = np.clip(np.round(-low / scale), 0, top).astype(np.uint8)
    return scale, zero


def dequantized(codes: Array, scale: Array, zero: Array, inputs: int) -> Array:
    """The (K, N) float weight that the codes stand for."""
    rows = (codes.astype(np.float32) - zero[..., None]) * scale[..., None]
    made: Array = rows.reshape(len(rows), -1)[:, :inputs].T
    return made


def packed(values: Array, bits: Bits) -> Array:
    """Bytes along the last axis; two 4-bit values a byte, the first one in the low half (an odd last one alone)."""
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros((*values.shape[:-1], 1), values.dtype)], axis=-1)
    return np.asarray(values[..., 0::2] | (values[..., 1::2] << 4), np.uint8)


def columns(weight: Array) -> Iterator[tuple[slice, Array]]:
    """The weight (K, N) in pieces of ``COLUMNS`` outputs, which no method here mixes."""
    for start in range(0, weight.shape[1], COLUMNS):
        piece = slice(start, min(start + COLUMNS, weight.shape[1]))
        yield piece, weight[:, piece]
