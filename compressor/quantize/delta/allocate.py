"""How many bytes each tensor gets: one price of a byte for all of them, and the form that is cheapest at that price.

Reverse water-filling (Cover and Thomas, *Elements of Information Theory*, 10.3.3) over tensors and their singular
vectors: at a price, a pair of vectors takes the bits at which squared error plus price times bytes is least; leading
pairs get more bits than later ones, and those below the water line none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np

from compressor.quantize.delta.changes import Change
from compressor.quantize.delta.factors import (
    BITS,
    EXACT_BITS,
    NOISE,
    STORED_BITS,
    Parts,
    Spectrum,
    Stored,
    deflated,
    exact,
    low_rank,
    sparse,
    spectrum,
)
from compressor.types import Array

ENTRY_BYTES = 60  # of a tensor in the header, deflated
SPARSE_BITS = (4, 6, 8)
DENSITIES = tuple(2.0**-power for power in range(1, 15))
ROUNDS = 60  # halvings of the range of prices


@dataclass(frozen=True)
class Choice:
    """One form of one tensor: its estimated bytes and squared error (of elements, not weighted)."""

    kind: str  # none, low-rank, sparse, exact
    cost: float
    error: float
    parts: Parts = ()
    count: int = 0
    bits: int = 0


class Tensor:
    """A change with what is needed to choose its form: spectrum, largest entries, bytes of the exact form."""

    def __init__(self, change: Change) -> None:
        self.change = change

    @cached_property
    def exact(self) -> Choice:
        """Bytes of the exact form, from a part of it when it is long."""
        stored = exact(self.change.name, self.change.base, self.change.new).data
        part = stored[:: max(1, len(stored) >> 20)] if len(stored) > 2 << 20 else stored
        return Choice("exact", ENTRY_BYTES + len(deflated(part)) * len(stored) / len(part), 0.0)

    @cached_property
    def spectrum(self) -> Spectrum:
        return spectrum(self.change.delta)

    @cached_property
    def pairs(self) -> tuple[Array, Array]:
        """Squared error and bytes of each pair of vectors, (1 + len(BITS), ranks); row 0 leaves the pair out."""
        energies, sides = self.spectrum.energies, sum(self.change.delta.shape)
        noise = np.array([1.0, *(2 * NOISE[bits] for bits in BITS)])
        cost = np.array([0.0, *(sides * STORED_BITS[bits] / 8 + 4 for bits in BITS)])
        return noise[:, None] * energies, np.broadcast_to(cost[:, None], (len(cost), len(energies)))

    @cached_property
    def sparse(self) -> tuple[Choice, ...]:
        """The largest entries at a row of densities."""
        squares = np.sort(np.square(self.change.delta.reshape(-1)))[::-1]
        kept = np.cumsum(squares, dtype=np.float64)
        found = []
        for density in DENSITIES:
            count = max(1, int(len(squares) * density))
            gap = np.log2(np.e / density)  # entropy of a geometric gap
            for bits in SPARSE_BITS:
                rounding = count * squares[0] / (2 ** (bits - 1) - 1) ** 2 / 12
                error = kept[-1] - kept[count - 1] + min(rounding, kept[count - 1])
                cost = ENTRY_BYTES + count * (STORED_BITS[bits] + gap) / 8
                found.append(Choice("sparse", float(cost), float(error), count=count, bits=bits))
        return tuple(found)

    def at(self, price: float) -> Choice:
        """The form with the least error plus price times bytes."""
        if not self.change.lossy:
            return self.exact
        options = [Choice("none", 0.0, self.change.energy), self._low_rank(price), *self.sparse, self.exact]
        return min(options, key=lambda item: self.change.unit * item.error + price * item.cost)

    def _low_rank(self, price: float) -> Choice:
        errors, costs = self.pairs
        best = np.argmin(self.change.unit * errors + price * costs, axis=0)
        ranks = np.arange(len(best))
        spent = ENTRY_BYTES + float(costs[best, ranks].sum())
        used = best[: int(np.argmax(best == 0)) if (best == 0).any() else len(best)]
        parts = tuple((BITS[index - 1], len(list(group))) for index, group in groupby(used.tolist()))
        kind = "low-rank" if parts else "none"
        return Choice(kind, spent, float(errors[best, ranks].sum()), parts=parts)

    def within(self, error: float) -> Choice:
        """The smallest form whose squared error is at most that."""
        if not self.change.lossy or error <= 0:
            return self.exact
        found = _dearest(lambda price: self.at(price).error <= error)
        return self.at(found)

    def stored(self, choice: Choice) -> Stored | None:
        """The tensor in that form; None when it stays as it is in the base."""
        change = self.change
        if choice.kind == "none":
            return None
        if choice.kind == "exact":
            return exact(change.name, change.base, change.new)
        if choice.kind == "sparse":
            return sparse(change.name, change.delta, choice.count, choice.bits)
        return low_rank(change.name, change.delta, self.spectrum, choice.parts)

    def full(self) -> Choice:
        """All ranks in float32: the tensor but for the last places."""
        ranks = len(self.spectrum.energies)
        return Choice("low-rank", 0.0, 0.0, parts=((EXACT_BITS, ranks),))


def _dearest(holds: Callable[[float], bool]) -> float:
    """The highest price at which something that gets harder with the price still holds; 0 when it never does."""
    low, high = -80.0, 80.0  # binary exponents
    if not holds(2.0**low):
        return 0.0
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(2.0**middle) else (low, middle)
    return float(2.0**low)


def spend(tensors: Sequence[Tensor], budget: float) -> list[Choice]:
    """Forms that together cost at most ``budget`` bytes, at one price for all; the cheapest forms when none do."""
    low, high = -80.0, 80.0
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        fits = sum(tensor.at(2.0**middle).cost for tensor in tensors) <= budget
        low, high = (low, middle) if fits else (middle, high)
    return [tensor.at(2.0**high) for tensor in tensors]


def smallest(tensors: Sequence[Tensor]) -> float:
    """Bytes of what cannot be approximated."""
    return sum(tensor.exact.cost for tensor in tensors if not tensor.change.lossy)
