"""A text teacher made five times faster by structure alone: learnt masks, Minitron's cut, plain truncation.

Three recipes with the same data and as many steps; the figures are those of their reports.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RECIPES = {
    "text-structure": "learnt masks (CoFi)",
    "text-minitron": "three layers, cut by activation (Minitron)",
    "text-truncation": "first layer alone (truncation)",
}


def page(run: Callable[[str], Path], load: Callable[[Path], Mapping[str, Any]]) -> str:
    """Run every recipe (``run``: its file -> the run's folder) and put their figures side by side."""
    reports = {name: load(run(f"recipes/{name}.toml")) for name in RECIPES}
    lines = [
        "# A text teacher, smaller by structure alone\n",
        "fp32 to fp32, ONNX Runtime, 1 thread. `python -m tools.bench text-structure` runs the three recipes;",
        "asked: at least 5x lower p50 than the teacher, at most 1.0 point of test accuracy below it,",
        "and better than plain truncation.\n",
        "| student | steps | multiply-accumulates | p50 | speed-up (95 %) | validation | test | to teacher |",
        "|---|---|---|---|---|---|---|---|",
        _teacher_line(reports["text-structure"]),
        *(_line(RECIPES[name], report) for name, report in reports.items()),
    ]
    for name, report in reports.items():
        lines += ["", f"## {RECIPES[name]}\n", *_structure(report)]
    return "\n".join(lines) + "\n"


def _row(report: Mapping[str, Any], artifact: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(row for row in report["outcomes"][0]["rows"] if row["artifact"] == artifact)
    return found


def _value(figure: Mapping[str, Any]) -> float:
    return float(figure.get("value", float("nan")))


def _macs(report: Mapping[str, Any], stage: str) -> float:
    return float(next(s["metrics"]["macs"] for s in report["stages"] if s["stage"] == stage))


def _teacher_line(report: Mapping[str, Any]) -> str:
    row = _row(report, "teacher/fp32")
    scores = " | ".join(f"{_value(row[part]):.2%}" for part in ("validation", "test"))
    return f"| teacher | | 1x | {_value(row['latency']):.2f} ms | 1x | {scores} | |"


def _line(title: str, report: Mapping[str, Any]) -> str:
    row, teacher = _row(report, "student/fp32"), _row(report, "teacher/fp32")
    detail = row["speedup"]["detail"]
    steps = sum(int(s["metrics"]["steps"]) for s in report["stages"] if s["stage"] == "distil")
    fewer = _macs(report, "export-teacher") / _macs(report, "export-student")
    drop = 100 * (_value(row["test"]) - _value(teacher["test"]))
    speed = f"{_value(row['speedup']):.2f}x ({detail['ci95_low']:.2f} to {detail['ci95_high']:.2f})"
    scores = " | ".join(f"{_value(row[part]):.2%}" for part in ("validation", "test"))
    latency = f"{_value(row['latency']):.2f} ms"
    return f"| {title} | {steps} | {fewer:.1f}x fewer | {latency} | {speed} | {scores} | {drop:+.2f} |"


def _structure(report: Mapping[str, Any]) -> list[str]:
    """What each stage did, layer by layer."""
    lines = []
    for stage in report["stages"]:
        if stage["stage"].startswith("export"):
            continue
        for fact in stage["facts"]:
            if fact["action"] in ("pruned", "dropped", "narrowed", "copied") and fact["before"] != fact["after"]:
                lines.append(f"- {fact['layer']}: {fact['before']} -> {fact['after'] or 'nothing'}")
    reasons = Counter(f["reason"] for s in report["stages"] for f in s["facts"] if "learnt masks" in f["reason"])
    return [*lines, *(f"- {reason}" for reason, _ in reasons.most_common(1))]
