"""What zeros bring: a digits network with nine of ten weights zero, its speed, its bytes, its recovery."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper


def page(folder: Path, report: Mapping[str, Any]) -> str:
    """The evidence page of a run of ``recipes/sparse-digits.toml``; ``folder`` is the run's."""
    lines = [
        "# Zeros: what they cost and what they bring\n",
        "`python -m tools.bench sparsity`: the digits teacher with 90 % of the weights of its layers zero (magnitude,",
        "one shot), then six epochs of `kd` and `squarehead` with the masks kept; the twin has the same masks and",
        "learns from labels alone.\n",
        "| file | zeros among its weights | p50, ONNX Runtime, 1 thread | speed-up (95 %) | file | deflated | test |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["outcomes"][0]["rows"]:
        path = (folder / report["artifacts"][row["artifact"]]["path"]).resolve()
        lines.append(_line(row, path))
    lines += ["", *_pairs(report)]
    return "\n".join(lines) + "\n"


def _line(row: Mapping[str, Any], path: Path) -> str:
    data, speed = path.read_bytes(), row["speedup"]
    detail = speed.get("detail", {})
    interval = f" ({detail['ci95_low']:.2f} to {detail['ci95_high']:.2f})" if "ci95_low" in detail else ""
    test = f"{row['test']['value']:.2%}" if "value" in row["test"] else "not chosen"
    return (
        f"| {row['artifact']} | {zero_share(path):.1%} | {row['latency']['value']:.4f} ms "
        f"| {speed.get('value', 1.0):.2f}x{interval} | {len(data) / 1024:.1f} KiB "
        f"| {len(zlib.compress(data, 6)) / 1024:.1f} KiB | {test} |"
    )


def zero_share(path: Path) -> float:
    """Share of the elements of all weights (two axes or more) that are zero; of int8 ones those at their zero point."""
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    zeros = total = 0
    for name, array in stored.items():
        if array.ndim < 2 or array.dtype.kind not in "fiu" or array.dtype == np.int64:
            continue
        point = stored.get(name.replace("_quantized", "_zero_point"), np.zeros(1)) if array.dtype.kind != "f" else 0
        zeros += int((array == (point if np.ndim(point) == 0 else 0)).sum())
        total += array.size
    return zeros / max(total, 1)


def _pairs(report: Mapping[str, Any]) -> list[str]:
    found = report.get("paired_seeds")
    if not found or found.get("mean") is None:
        return ["No paired seeds were trained."]
    rows = ", ".join(
        f"{row['student_test']['value']:.2%} against {row['twin_test']['value']:.2%}" for row in found["rows"]
    )
    return [
        f"Paired seeds on {found['split']}, student against twin: {rows}.",
        f"Mean difference {100 * found['mean']:+.2f} points",
        f"(90 % interval {100 * found['low']:+.2f} to {100 * found['high']:+.2f}); verdict: {found['verdict']}.",
    ]
