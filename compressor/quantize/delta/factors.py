"""A matrix of changes as few vectors of few bits, or as its largest entries: what a delta stores of one tensor.

GraftLLM's SkillPack (Du et al., "Knowledge Grafting of Large Language Models", 2025): low rank for matrices, magnitude
pruning where few entries change, and more bits for the leading singular vectors. Where its code rounds singular
vectors by GPTQ on calibration data, here each pair of vectors is fitted to what the pairs before it, as rounded, have
left over; that needs no data, and no pair can make the error larger, whatever its bits.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compressor.delta_file import SKIP
from compressor.types import Array

BITS = (2, 3, 4, 6, 8)
EXACT_BITS = 32
# Relative squared error of a Gaussian vector, rounded to 2^(b-1)-1 steps either side at the best scale, and the bits
# that Huffman codes of these numbers take (tests/unit/quantize/test_delta.py measures both again).
NOISE = {2: 0.190, 3: 0.0466, 4: 0.0128, 6: 0.0010, 8: 0.00007, EXACT_BITS: 0.0}
STORED_BITS = {2: 1.6, 3: 2.7, 4: 3.6, 6: 5.4, 8: 7.3, EXACT_BITS: 30.0}
CLIPS = np.linspace(0.25, 1.0, 16)  # shares of the largest magnitude at which rounding may cut off

Parts = tuple[tuple[int, int], ...]  # (bits, rank), leading vectors first


@dataclass(frozen=True)
class Stored:
    """A tensor's entry in the header and its numbers."""

    entry: dict[str, object]
    data: bytes


@dataclass(frozen=True)
class Spectrum:
    """Squared singular values, largest first, and the singular vectors of the shorter side as columns."""

    energies: Array
    vectors: Array


def spectrum(delta: Array) -> Spectrum:
    """Of a (rows, columns) matrix, through the Gram matrix of its shorter side in float64."""
    short = delta if delta.shape[1] <= delta.shape[0] else delta.T
    gram = np.zeros((short.shape[1], short.shape[1]))
    for start in range(0, len(short), 4096):  # no float64 copy of a whole embedding table
        part = short[start : start + 4096].astype(np.float64)
        gram += part.T @ part
    values, vectors = np.linalg.eigh(gram)
    return Spectrum(np.maximum(values[::-1], 0.0), vectors[:, ::-1].astype(np.float32))


def round_vector(vector: Array, bits: int) -> Array:
    """float32 whole numbers whose multiple is nearest to the vector, over a row of cut-offs."""
    largest = float(np.abs(vector).max(initial=0.0))
    if bits == EXACT_BITS or largest == 0.0:
        return vector.astype(np.float32)
    top = 2 ** (bits - 1) - 1
    best, most = np.zeros_like(vector), -1.0
    for clip in CLIPS if bits < 8 else CLIPS[-4:]:
        codes = np.clip(np.rint(vector * np.float32(top / (largest * clip))), -top, top)
        norm = float(codes @ codes)
        explained = float(vector @ codes) ** 2 / norm if norm else 0.0
        if explained > most:
            best, most = codes, explained
    return best


def low_rank(name: str, delta: Array, found: Spectrum, parts: Parts) -> Stored:
    """Store ``delta`` (rows, columns) as the sum of ``scale * left (x) right`` over all ranks of all parts."""
    left_over = delta.astype(np.float32, copy=True)
    groups: list[list[tuple[float, Array, Array]]] = []
    at = 0
    for bits, rank in parts:
        groups.append([_pair(left_over, found.vectors[:, place], bits) for place in range(at, at + rank)])
        at += rank
    data = b"".join(_packed(group, bits) for group, (bits, _) in zip(groups, parts, strict=True))
    return Stored({"name": name, "kind": "low-rank", "parts": [list(part) for part in parts]}, data)


def _pair(left_over: Array, vector: Array, bits: int) -> tuple[float, Array, Array]:
    """A scale and two rounded vectors that explain most of what is left; it is taken off ``left_over`` in place.

    The singular vector takes one power step on what is left and is rounded; the other side is the least-squares answer
    to the rounded one. The scale is the least-squares one, so that the error never grows.
    """
    rows, columns = left_over.shape
    if columns <= rows:
        right = round_vector(_unit(left_over.T @ (left_over @ vector)), bits)
        left = round_vector(_unit(left_over @ right), bits)
    else:
        left = round_vector(_unit(left_over @ (left_over.T @ vector)), bits)
        right = round_vector(_unit(left_over.T @ left), bits)
    norm = float(left @ left) * float(right @ right)
    scale = np.float32(float(left @ (left_over @ right)) / norm if norm else 0.0)
    for start in range(0, rows, 4096):
        left_over[start : start + 4096] -= np.outer(left[start : start + 4096] * scale, right)
    return float(scale), left, right


def _unit(vector: Array) -> Array:
    norm = float(np.linalg.norm(vector))
    return vector / np.float32(norm) if norm else vector


def _packed(group: Sequence[tuple[float, Array, Array]], bits: int) -> bytes:
    scales = np.array([scale for scale, _, _ in group], "<f4")
    sides = [np.concatenate([item[side] for item in group]) for side in (1, 2)]
    return scales.tobytes() + b"".join(packed_vectors(side, bits) for side in sides)


def packed_vectors(codes: Array, bits: int) -> bytes:
    """As :meth:`compressor.delta_file.Reader.vectors` reads them."""
    if bits == EXACT_BITS:
        return codes.astype("<f4").tobytes()
    if bits > 2:
        return codes.astype(np.int8).tobytes()
    digits = np.concatenate([codes, np.zeros(len(codes) % 2, codes.dtype)]).astype(np.int64) + 1
    return (digits[0::2] * 3 + digits[1::2]).astype(np.uint8).tobytes()


def sparse(name: str, delta: Array, count: int, bits: int) -> Stored:
    """Store the ``count`` entries of largest magnitude, as whole multiples of one scale."""
    flat = delta.reshape(-1)
    places = np.sort(np.argpartition(np.abs(flat), flat.size - count)[flat.size - count :])
    kept = flat[places]
    codes = round_vector(kept, bits)
    norm = float(codes @ codes)
    scale = np.array([float(kept @ codes) / norm if norm else 0.0], "<f4")
    gaps = gap_bytes(places)
    entry = {"name": name, "kind": "sparse", "count": count, "gaps": len(gaps), "bits": bits}
    return Stored(entry, scale.tobytes() + gaps.tobytes() + codes.astype(np.int8).tobytes())


def gap_bytes(places: Array) -> Array:
    """How many entries are skipped before each kept one, in bytes; 255 stands for a gap that is not over yet."""
    gaps = np.diff(places, prepend=-1) - 1
    skips, rest = np.divmod(gaps, SKIP)
    made = np.full(int(skips.sum()) + len(gaps), SKIP, np.uint8)
    made[np.cumsum(skips + 1) - 1] = rest
    return made


def exact(name: str, base: Array, new: Array) -> Stored:
    """Store the bits that differ, byte planes apart."""
    width = base.dtype.itemsize
    old, fresh = (np.frombuffer(array.tobytes(), np.uint8).reshape(-1, width) for array in (base, new))
    return Stored({"name": name, "kind": "exact"}, (old ^ fresh).T.tobytes())


def deflated(numbers: bytes) -> bytes:
    """A zlib stream, by whichever of two strategies is shorter: small whole numbers have uneven frequencies but hardly
    any repetitions, which only mislead the search for them; bits that differ have both."""
    made = []
    for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY):
        stream = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 9, strategy)
        made.append(stream.compress(numbers) + stream.flush())
    return min(made, key=len)
