"""Which elements of a weight stay, by magnitude and pattern. Arrays only: torch and ONNX weights alike.

A weight is seen as (outputs, ..., inputs): what lies between are the places of a convolution's kernel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from compressor.masks import BLOCK, Zeros, n_of_m

Floats = npt.NDArray[np.floating[Any]]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Axes:
    """Where a layer keeps its outputs and inputs."""

    output: int = 0
    input: int = 1


def why_not(shape: tuple[int, ...], axes: Axes, zeros: Zeros) -> str:
    """Why a weight of this shape cannot take the pattern; empty when it can."""
    fixed = n_of_m(zeros.pattern)
    inputs = shape[axes.input]
    if fixed and inputs % fixed[1]:
        return f"{inputs} inputs are no multiple of {fixed[1]}"
    return ""


def kept(weights: Mapping[str, Floats], axes: Mapping[str, Axes], zeros: Zeros, share: float = 1.0) -> dict[str, Bools]:
    """True where an element stays, for each weight in its own shape.

    ``share``: of the final sparsity; a schedule that grows. Of equal elements the first stay. Exactly round(sparsity *
    elements) go with ``unstructured`` (of each weight, or of all with the scope ``global``), exactly M - N of every M
    neighbours along the inputs with ``N:M`` (fewer while it grows), blocks of least mean magnitude with ``block``.
    """
    seen = {name: np.moveaxis(w, (axes[name].output, axes[name].input), (0, -1)) for name, w in weights.items()}
    fixed = n_of_m(zeros.pattern)
    if fixed:
        gone = math.floor(share * (fixed[1] - fixed[0]) + 1e-9)
        made = {name: _in_groups(w, fixed[1], fixed[1] - gone) for name, w in seen.items()}
    else:
        block = zeros.block if zeros.pattern == BLOCK else (1, 1)
        scores = {name: _scores(w, block) for name, w in seen.items()}
        chosen = _largest(scores, zeros.sparsity * share, pooled=zeros.scope == "global")
        made = {name: _spread(chosen[name], block, w.shape) for name, w in seen.items()}
    return {
        name: np.ascontiguousarray(np.moveaxis(mask, (0, -1), (axes[name].output, axes[name].input)))
        for name, mask in made.items()
    }


def cubic(done: float, start: float, end: float) -> float:
    """Share of the final sparsity when ``done`` of the run is over: 1 - (1 - t)^3 between ``start`` and ``end``.

    >>> [round(cubic(done, 0.0, 0.5), 3) for done in (0.0, 0.125, 0.25, 0.5, 1.0)]
    [0.0, 0.578, 0.875, 1.0, 1.0]
    """
    if done >= end:
        return 1.0
    if done <= start:
        return 0.0
    return 1 - (1 - (done - start) / (end - start)) ** 3


def _in_groups(weight: Floats, size: int, stay: int) -> Bools:
    """The ``stay`` largest of every ``size`` neighbours along the last axis."""
    groups = np.abs(weight).reshape(-1, size)
    order = np.argsort(-groups, axis=1, kind="stable")[:, :stay]
    found = np.zeros(groups.shape, dtype=np.bool_)
    np.put_along_axis(found, order, True, axis=1)
    return found.reshape(weight.shape)


def _scores(weight: Floats, block: tuple[int, int]) -> Floats:
    """Mean magnitude of every block (rows of blocks, kernel places, columns of blocks); smaller ones at the edges."""
    if block == (1, 1):
        return np.abs(weight)
    rows, columns = (
        np.arange(0, size, step) for size, step in zip((weight.shape[0], weight.shape[-1]), block, strict=True)
    )
    sums = np.add.reduceat(np.add.reduceat(np.abs(weight), rows, axis=0), columns, axis=-1)
    heights = np.diff(np.append(rows, weight.shape[0])).reshape(-1, *(1,) * (weight.ndim - 1))
    widths = np.diff(np.append(columns, weight.shape[-1]))
    found: Floats = sums / (heights * widths)
    return found


def _largest(scores: Mapping[str, Floats], sparsity: float, *, pooled: bool) -> dict[str, Bools]:
    """All but the smallest share, of each array or of all together."""
    if not pooled:
        return {name: _all_but(values.reshape(-1), sparsity).reshape(values.shape) for name, values in scores.items()}
    whole = _all_but(np.concatenate([values.reshape(-1) for values in scores.values()]), sparsity)
    found, at = {}, 0
    for name, values in scores.items():
        found[name] = whole[at : at + values.size].reshape(values.shape)
        at += values.size
    return found


def largest(values: Floats, share: float) -> Bools:
    """True for the round(share * n) largest of flat ``values``; of equal ones the first."""
    return _all_but_smallest(values, values.size - math.floor(share * values.size + 0.5))


def _all_but(values: Floats, share: float) -> Bools:
    """True for all but the round(share * n) smallest; of equal values the first stay."""
    return _all_but_smallest(values, math.floor(share * values.size + 0.5))


def _all_but_smallest(values: Floats, gone: int) -> Bools:
    if gone == 0:
        return np.ones(values.size, dtype=np.bool_)
    if gone >= values.size:
        return np.zeros(values.size, dtype=np.bool_)
    edge = np.partition(values, gone - 1)[gone - 1]
    found: Bools = values > edge
    equal = np.flatnonzero(values == edge)
    found[equal[: values.size - gone - int(found.sum())]] = True
    return found


def _spread(chosen: Bools, block: tuple[int, int], shape: tuple[int, ...]) -> Bools:
    wide = np.repeat(np.repeat(chosen, block[0], axis=0), block[1], axis=-1) if block != (1, 1) else chosen
    return wide[: shape[0], ..., : shape[-1]]


__all__ = ["Axes", "cubic", "kept", "largest", "why_not"]
