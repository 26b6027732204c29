"""What quantization-aware training leaves of a layer, as plain numbers for a file. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from compressor.qat import BITS, Precision, Quantizer
from compressor.types import Array


@dataclass(frozen=True)
class Ends:
    """A rounded activation: what a step is worth (a float32), the code of 0 in the unsigned convention, bits."""

    scale: float
    zero: int
    bits: int


@dataclass(frozen=True)
class RoundedLayer:
    """One layer. ``value`` = ``codes`` x ``scale``, bit for bit, is its weight as trained.

    ``value``, ``codes``: of the weight's shape, outputs first; ``scale`` (R): for each output, for the whole tensor, or
    for each group of ``per`` inputs of each output. ``zero`` (R): what unsigned codes have on top, asymmetric schemes
    only. ``steps``: ternary codes are multiples of it, plus the shift.
    """

    name: str
    precision: Precision
    method: Quantizer
    per: str
    value: Array
    codes: Array
    scale: Array
    zero: Array | None = None
    steps: int = 1
    bias_codes: Array | None = None
    bias_scale: Array | None = None
    reads: Ends | None = None
    gives: Ends | None = None

    @property
    def bits(self) -> float:
        """Of information in a weight: log2 of 3 for ternary ones, whatever container a file takes."""
        return math.log2(3) if self.precision == "ternary" else float(BITS[self.precision])
