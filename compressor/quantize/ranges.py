"""Activation ranges from calibration data: one pass for min-max, a second for histograms, one small batch in memory.

ONNX Runtime's own calibrators keep every activation of every sample until the end, which on pictures of 224 pixels is
gigabytes; here nothing but two numbers and a histogram per tensor outlives a batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from onnx import ModelProto

from compressor.errors import StageError
from compressor.quantize.watch import Calibration, Watched, chunks, watch
from compressor.types import Array, array_digest, write_atomic

Method = Literal["minmax", "percentile", "entropy", "mse"]
METHODS: tuple[Method, ...] = ("minmax", "percentile", "entropy", "mse")
Ranges = Mapping[str, tuple[float, float]]

BINS = 2048  # as in TensorRT's entropy calibration
LEVELS = 128  # positive int8 levels
SHRINKS = 32  # steps of the search for the least squared error
PERCENTILE = 99.99  # share of values kept; the usual choice since TensorRT's guide


def collect(model: ModelProto, calibration: Calibration, method: Method, cache: Path | None = None) -> Ranges:
    """Lowest and highest value per float tensor (always enclosing zero).

    With ``cache`` (a folder), ranges are stored under the digests of model, data and method, so that per-tensor and
    per-channel variants share one calibration. Raises :class:`StageError` for empty data, NaN or infinite activations.
    """
    stored = None
    if cache is not None:
        stored = cache / f"ranges-{_key(model, calibration, method)}.json"
        if stored.is_file():
            return {name: (low, high) for name, (low, high) in json.loads(stored.read_text()).items()}
    run = watch(model)
    ranges = _minmax(run, calibration)
    if method != "minmax":
        ranges = _clipped(run, calibration, ranges, method)
    if stored is not None:
        write_atomic(stored, json.dumps(ranges, sort_keys=True))
    return ranges


def _key(model: ModelProto, calibration: Calibration, method: Method) -> str:
    digest = hashlib.sha256(model.SerializeToString(deterministic=True))
    digest.update(method.encode())
    for batch in calibration():
        for name in sorted(batch):
            digest.update(f"{name}{array_digest(batch[name])}".encode())
    return digest.hexdigest()[:32]


def _minmax(run: Watched, calibration: Calibration) -> dict[str, tuple[float, float]]:
    ranges: dict[str, tuple[float, float]] = {}
    seen = False
    for inputs in chunks(calibration):
        seen = True
        for name, array in run(inputs):
            low, high = ranges.get(name, (0.0, 0.0))
            if array.size:
                # np.minimum keeps a NaN, which Python's min would drop
                low, high = float(np.minimum(low, array.min())), float(np.maximum(high, array.max()))
            ranges[name] = (low, high)
    if not seen:
        raise StageError("there is no calibration data", hint="Raise `data.calibration`, or give more samples.")
    bad = next((name for name, pair in ranges.items() if np.isnan(pair).any()), None)
    if bad is not None:
        hint = "The fp32 model itself gives NaN on this data; check the preprocessing."
        raise StageError(f"activation `{bad}` is NaN on the calibration data", hint=hint)
    # Infinite scores are masks; float32's end is as good as infinity to a quantizer and keeps the arithmetic finite.
    edge = float(np.finfo(np.float32).max) / 4
    return {name: (max(low, -edge), min(high, edge)) for name, (low, high) in ranges.items()}


def _clipped(
    run: Watched,
    calibration: Calibration,
    ranges: Mapping[str, tuple[float, float]],
    method: Method,
) -> dict[str, tuple[float, float]]:
    """Second pass: histograms over the known ranges, then the best threshold per tensor."""
    counts: dict[str, Array] = {}
    for inputs in chunks(calibration):
        for name, array in run(inputs):
            low, high = ranges[name]
            if high > low:
                made = np.histogram(array, bins=BINS, range=(low, high))[0]
                counts[name] = counts.get(name, np.zeros(BINS, np.int64)) + made
    choose = {"percentile": percentile_range, "entropy": entropy_range, "mse": mse_range}[method]
    return {name: choose(counts[name], *pair) if name in counts else pair for name, pair in ranges.items()}


def percentile_range(counts: Array, low: float, high: float, share: float = PERCENTILE) -> tuple[float, float]:
    """Cut ``(100 - share) / 2`` percent off each end; zero stays inside."""
    total = np.cumsum(counts) / max(1, counts.sum())
    tail = (100 - share) / 200
    edges = np.linspace(low, high, len(counts) + 1)
    first = int(np.searchsorted(total, tail, side="right"))
    last = int(np.searchsorted(total, 1 - tail, side="left"))
    return min(0.0, float(edges[first])), max(0.0, float(edges[min(last + 1, len(counts))]))


def entropy_range(counts: Array, low: float, high: float) -> tuple[float, float]:
    """The threshold T that loses the least information when |x| > T is clipped: least KL divergence between the
    histogram of |x| and its ``LEVELS``-level version (Migacz, 8-bit inference with TensorRT, 2017)."""
    peak = max(-low, high)
    centres = np.abs((np.arange(len(counts)) + 0.5) * (high - low) / len(counts) + low)
    folded = np.histogram(centres, bins=BINS, range=(0.0, peak), weights=counts)[0]
    folded[0] = min(folded[0], folded[1])  # zeros behind a ReLU would drown the rest, and they are exact at any scale
    best, threshold = np.inf, BINS
    for size in range(LEVELS, BINS + 1, 16):
        loss = _divergence(folded, size)
        if loss < best:
            best, threshold = loss, size
    limit = peak * threshold / BINS
    return max(low, -limit), min(high, limit)


def mse_range(counts: Array, low: float, high: float) -> tuple[float, float]:
    """The ends that give the least mean squared error after rounding to 256 levels; zero stays inside.

    Each end is pulled in over ``SHRINKS`` steps, the upper one first, then the lower one with the upper one known.
    """
    centres = (np.arange(len(counts)) + 0.5) * (high - low) / len(counts) + low
    best = (low, high)
    for end in (1, 0):
        tried = [best]
        for share in np.linspace(0.2, 1.0, SHRINKS, endpoint=False):
            tried.append((low, high * share) if end else (low * share, best[1]))
        best = min(tried, key=lambda pair: _squared_error(counts, centres, *pair))
    return float(best[0]), float(best[1])


def _squared_error(counts: Array, centres: Array, low: float, high: float) -> float:
    if high <= low:
        return float("inf")
    step = (high - low) / 255
    rounded = np.clip(np.round((centres - low) / step), 0, 255) * step + low
    return float(counts @ (rounded - centres) ** 2)


def _divergence(folded: Array, size: int) -> float:
    reference = folded[:size].astype(np.float64)
    reference[-1] += folded[size:].sum()
    level = np.arange(size) * LEVELS // size
    filled = folded[:size] > 0
    sums = np.bincount(level, weights=folded[:size], minlength=LEVELS)
    used = np.bincount(level, weights=filled, minlength=LEVELS)
    coarse = np.where(filled, sums[level] / np.maximum(used[level], 1), 0.0)
    shown = reference > 0
    if not coarse.sum() or not reference.sum():
        return float("inf")
    p, q = reference[shown] / reference.sum(), coarse[shown] / coarse.sum()
    return float(np.sum(p * np.log(p / np.maximum(q, 1e-10))))
