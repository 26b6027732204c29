"""Which point of the grid each weight takes, by what the layer's *output* loses on calibration data.

A layer with inputs X (rows: samples and positions) and weight W loses ||X W - X Q||^2 = sum of D * (H D) with
D = W - Q and H = X'X. Everything here needs H alone, (K, K), whatever the number of samples. Rows of X have the same
root mean square (:meth:`compressor.quantize.weights.stream.Stream.inputs`), so that no position outweighs the rest.

GPTQ: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022 (at ICLR
2023 as "OPTQ: Accurate Quantization for Generative Pre-trained Transformers"), algorithm 1. AWQ: Lin et al., "AWQ:
Activation-aware Weight Quantization for On-Device LLM Compression and Acceleration", MLSys 2024, section 3.2. The
fit of scales is the same loss with the codes held fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from compressor.errors import StageError
from compressor.quantize.weights.grid import Bits, Codes, columns, dequantized, grouped, round_to_nearest, spans
from compressor.types import Array

Method = Literal["rtn", "scale-estimation", "gptq", "awq", "awq-gptq"]
METHODS: tuple[Method, ...] = ("rtn", "scale-estimation", "gptq", "awq", "awq-gptq")
WITH_AWQ = ("awq", "awq-gptq")
DAMPING = 0.01  # of the mean diagonal of H, as in the paper
LAZY = 128  # input rows whose errors are gathered before they reach the rest, as in the paper
GRID = 20  # exponents from 0 up to 1 that AWQ tries, as in the paper
SEARCHED = 512  # output columns that AWQ's search looks at
SWEEPS = 2  # over the groups, when scales are fitted
LARGEST = 1e4  # of an AWQ factor; beyond it a channel that is never active would shrink to nothing


@dataclass(frozen=True)
class Inputs:
    """What calibration says of a layer's inputs X: X'X, float32 (K, K), and the mean magnitude per channel, (K,)."""

    gram: Array
    mean: Array

    def scaled(self, factor: Array) -> Inputs:
        """The same inputs divided by ``factor`` (K,)."""
        return Inputs(self.gram / factor[:, None] / factor[None], self.mean / factor)


def quantized(weight: Array, inputs: Inputs | None, method: Method, bits: Bits, block: int) -> Codes:
    """The weight (K, N) on the grid. AWQ's factor is the caller's: ``weight`` and ``inputs`` are scaled already.

    Raises :class:`StageError` for inputs that are not finite, or where H has no factor in float64.
    """
    if inputs is None or method == "rtn":
        return _pieces(weight, lambda piece: round_to_nearest(piece, bits, block))
    if not np.isfinite(inputs.gram).all():
        raise StageError("a layer's inputs are not finite", hint="The fp32 model gives NaN or infinity on this data.")
    if method in ("gptq", "awq-gptq"):
        factor, order = inverse_factor(inputs.gram)
        return _pieces(weight, lambda piece: gptq(piece, factor, order, bits, block))
    if method == "scale-estimation":
        return _pieces(weight, lambda piece: fit_scales(piece, round_to_nearest(piece, bits, block), inputs.gram))
    return _pieces(weight, lambda piece: round_to_nearest(piece, bits, block))


def _pieces(weight: Array, make: Callable[[Array], Codes]) -> Codes:
    made = [make(piece) for _, piece in columns(weight)]
    return made[0] if len(made) == 1 else Codes(*(np.concatenate(parts) for parts in zip(*made, strict=True)))


def output_error(weight: Array, made: Codes, gram: Array, factor: Array | None = None) -> float:
    """||X (W - Q)||^2 from H = X'X. ``factor`` (K,): the codes stand for the weight times it."""
    total = 0.0
    for piece, part in columns(weight):
        points = dequantized(made.codes[piece], made.scale[piece], made.zero[piece], len(weight))
        lost = part - (points if factor is None else points / factor[:, None])
        total += float(np.vdot(lost, gram @ lost))
    return max(0.0, total)


def inverse_factor(gram: Array, damping: float = DAMPING) -> tuple[Array, Array]:
    """The upper Cholesky factor U of H^-1 = U'U, H damped and its rows by falling diagonal, and that order.

    Large diagonals first: their errors can still be made good by the rest (the paper's ``act-order``). From
    J H J = L L' with J the reversal, U = (J L J)^-1: no inverse of H is formed.
    """
    order = np.argsort(-np.diag(gram), kind="stable")
    hessian = gram[np.ix_(order, order)].astype(np.float64)
    level = float(np.mean(np.diag(hessian))) or 1.0  # inputs that are always zero: H is the identity
    hessian[np.diag_indices_from(hessian)] += damping * level
    try:
        lower = np.linalg.cholesky(hessian[::-1, ::-1])
    except np.linalg.LinAlgError as error:
        hint = "Give more calibration samples, or another `weight_method`."
        raise StageError("a layer's inputs have no positive definite Hessian", hint=hint) from error
    return np.linalg.inv(lower[::-1, ::-1]).astype(np.float32), order


def gptq(
    weight: Array,
    factor: Array,
    order: Array,
    bits: Bits,
    block: int,
    grid: tuple[Array, Array] | None = None,
) -> Codes:
    """GPTQ on the groups' own grid: row by row of inputs, each one's error spread over those that come after.

    ``factor`` and ``order`` are :func:`inverse_factor`'s. Scales and zero points are fixed before, from the weight
    itself or as ``grid`` (both (N, G)), so that any order of rows keeps the groups together in the file. With
    H = identity it rounds to nearest.
    """
    inputs, outputs = weight.shape
    scale, zero = spans(grouped(weight, block), bits) if grid is None else grid
    group = order // block
    step, shift = scale.T[group], zero.T[group].astype(np.float32)  # (K, N), in the order of work
    rows = np.array(weight[order], np.float32)
    codes = np.empty((inputs, outputs), np.uint8)
    for start in range(0, inputs, LAZY):
        stop = min(start + LAZY, inputs)
        errors = np.empty((stop - start, outputs), np.float32)
        for row in range(start, stop):
            code = np.clip(np.round(rows[row] / step[row]) + shift[row], 0, 2**bits - 1)
            error = (rows[row] - (code - shift[row]) * step[row]) / factor[row, row]
            rows[row + 1 : stop] -= factor[row, row + 1 : stop, None] * error
            errors[row - start], codes[order[row]] = error, code
        rows[stop:] -= factor[start:stop, stop:].T @ errors
    whole = np.repeat(zero, block, axis=1)  # rows that fill the last group up stand for 0
    whole[:, :inputs] = codes.T
    return Codes(whole.reshape(outputs, -1, block), scale, zero)


def fit_scales(weight: Array, made: Codes, gram: Array, sweeps: int = SWEEPS) -> Codes:
    """The scales that lose least with these codes: group after group the exact minimum, so that no step ever loses.

    For group g of one output column, with integers c and D = W - Q: scale += c'(H D)_g / c'H_gg c.
    """
    inputs, outputs = weight.shape
    block = made.codes.shape[2]
    scale = made.scale.copy()
    whole = (made.codes.astype(np.float32) - made.zero[..., None]).reshape(outputs, -1)[:, :inputs].T  # (K, N)
    lost = weight - dequantized(*made, inputs)
    pull = gram @ lost
    for _ in range(sweeps):
        for number, start in enumerate(range(0, inputs, block)):
            rows = slice(start, min(start + block, inputs))
            points = whole[rows]
            weightiness = np.sum(points * (gram[rows, rows] @ points), axis=0)
            wanted = np.sum(points * pull[rows], axis=0)
            change = np.divide(wanted, weightiness, out=np.zeros(outputs, np.float32), where=weightiness > 0)
            change[(scale[:, number] + change) <= 0] = 0  # a scale stays positive
            scale[:, number] += change
            pull -= gram[:, rows] @ (points * change)
    return Codes(made.codes, scale, made.zero)


def awq_factor(weights: Iterable[Array], inputs: Inputs, bits: Bits, block: int) -> Array:
    """The factor (K,) per input channel that loses least over all ``weights`` that read these inputs.

    ``factor = mean|x| ^ a``, its geometric middle at 1; weights are multiplied and inputs divided by it. a = 0, that
    is no factor, is among those tried. Of each weight about ``SEARCHED`` output columns, evenly spread, are looked at.
    """
    candidates = [_candidate(inputs.mean, number / GRID) for number in range(GRID)]
    losses = np.zeros(GRID)
    for whole in weights:
        weight = whole[:, :: max(1, whole.shape[1] // SEARCHED)]
        for number, factor in enumerate(candidates):
            made = quantized(weight * factor[:, None], None, "rtn", bits, block)
            losses[number] += output_error(weight, made, inputs.gram, factor)
    return candidates[int(np.argmin(losses))]


def _candidate(mean: Array, exponent: float) -> Array:
    floor = float(mean.max(initial=0.0)) * 1e-4 or 1.0
    factor = np.maximum(mean, floor).astype(np.float64) ** exponent
    factor /= np.sqrt(factor.max() * factor.min())
    return np.asarray(np.clip(factor, 1 / LARGEST, LARGEST), np.float32)
