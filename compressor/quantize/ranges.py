"""Activation ranges from calibration data: one pass for min-max, a second for histograms, one small batch in memory.

ONNX Runtime's own calibrators keep every activation of every sample until the end, which on pictures of 224 pixels is
gigabytes; here nothing but two numbers and a histogram per tensor outlives a batch.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import ModelProto

from compressor.errors import StageError, sdk_errors
from compressor.models.onnx_graph import save_model
from compressor.types import Array, Inputs, array_digest, write_atomic

Method = Literal["minmax", "percentile", "entropy"]
Calibration = Callable[[], Iterator[Inputs]]
Ranges = Mapping[str, tuple[float, float]]

CHUNK = 8  # samples run at once
BINS = 2048  # as in TensorRT's entropy calibration
LEVELS = 128  # positive int8 levels
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
    with tempfile.TemporaryDirectory(prefix="calibrate-") as folder:
        run = _runner(model, Path(folder))
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


def _runner(model: ModelProto, folder: Path) -> Callable[[Inputs], Iterator[tuple[str, Array]]]:
    """A function from inputs to every float activation of the graph."""
    import onnxruntime

    watched = ModelProto()
    watched.CopyFrom(model)
    taken = {value.name for value in model.graph.output}
    for node in model.graph.node:
        watched.graph.output.extend(
            onnx.ValueInfoProto(name=name) for name in node.output if name and name not in taken
        )
    path = folder / "watched.onnx"
    save_model(watched, path)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    with sdk_errors(StageError, "load the model for calibration", hint="Does the fp32 file run in ONNX Runtime?"):
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    floats = [value.name for value in session.get_outputs() if value.type == "tensor(float)"]
    fed = {value.name for value in session.get_inputs()}

    def run(inputs: Inputs) -> Iterator[tuple[str, Array]]:
        known = {name: array for name, array in inputs.items() if name in fed}
        with sdk_errors(StageError, "run the calibration data", hint="Calibration inputs must fit the model's inputs."):
            results = session.run(floats, known)
        yield from ((name, array) for name, array in known.items() if array.dtype == np.float32)
        yield from zip(floats, results, strict=True)

    return run


def chunks(calibration: Calibration, dims: int = CHUNK) -> Iterator[Inputs]:
    """Batches cut to at most ``dims`` samples."""
    for batch in calibration():
        size = max((len(array) for array in batch.values()), default=0)
        even = all(len(array) == size for array in batch.values())
        if not even:
            yield batch
            continue
        for start in range(0, size, dims):
            yield {name: np.ascontiguousarray(array[start : start + dims]) for name, array in batch.items()}


def _minmax(
    run: Callable[[Inputs], Iterator[tuple[str, Array]]], calibration: Calibration
) -> dict[str, tuple[float, float]]:
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
    run: Callable[[Inputs], Iterator[tuple[str, Array]]],
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
    choose = percentile_range if method == "percentile" else entropy_range
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
    best, threshold = np.inf, BINS
    for size in range(LEVELS, BINS + 1, 16):
        loss = _divergence(folded, size)
        if loss < best:
            best, threshold = loss, size
    limit = peak * threshold / BINS
    return max(low, -limit), min(high, limit)


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
