"""Page `docs/evidence/public-models.md`: the whole tool on ONNX files that no one here trained."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Command = Callable[..., str]
CLI = [sys.executable, "-m", "compressor.cli"]
HEAD = """# ONNX files that no one here trained

Post-training path only, promise: at most 2 points of agreement lost. `python -m tools.bench public-models`

Nodes: of a file that ships as int8, how many layers are; of one that does not, the layers that alone bring most noise
to the outputs, with the signal-to-noise ratio when only that layer is in int8. Where only speed is missed, the reasons
name the nodes that take longer than in float.

| model | ships | agreement with fp32, test | p50 of fp32 | p50 | speed-up | size | nodes | why not the others |
|---|---|---|---|---|---|---|---|---|
"""


def page(command: Command, work: Path) -> str:
    folder = work / "public"
    command([sys.executable, "-m", "tools.public_models", str(folder)])
    text = HEAD
    for model in sorted(folder.glob("*.onnx")):
        before = model.read_bytes()
        words = ["--model", model, "--data", model.with_suffix(".npz"), "--task", "generic", "--max-drop", "2%"]
        call = [*CLI, "run", *map(str, words), "--profile", "this-machine", "--out", str(work / "runs"), "--json"]
        report = json.loads(command(call, accept=(0, 3)))["report"]
        assert model.read_bytes() == before, f"{model} was changed"
        text += row(model.stem, report) + "\n"
    return text


def row(name: str, report: dict[str, Any]) -> str:
    """The shipped file of one public model beside its fp32 original."""
    rows = report["outcomes"][0]["rows"]
    shipped = next(row for row in rows if row["shipped"])
    teacher = next(row for row in rows if row["artifact"].startswith("teacher"))
    reasons = [
        f"{row['artifact'].removeprefix('student/')}: {row['reason'].removeprefix('rejected: ')}"
        for row in rows
        if "int8" in row["artifact"] and not row["shipped"]
    ]
    reasons += [f"{key.split(': ')[-1]}: {why}" for key, why in report["rejected"].items() if "int8" in key]
    reasons = [reason for reason in reasons if "dynamic" not in reason.split(":")[0]]
    size = f"{teacher['file_bytes']['value'] / 1024:.0f} -> {shipped['file_bytes']['value'] / 1024:.0f} KiB"
    score = shipped["test"]["value"] if "value" in shipped["test"] else float("nan")
    cells = [
        name, shipped["artifact"].removeprefix("student/"), f"{score:.4f}", f"{teacher['latency']['value']:.3f} ms",
        f"{shipped['latency']['value']:.3f} ms", f"{shipped['speedup']['value']:.2f}x", size,
        nodes(report["artifacts"], shipped["artifact"]), "; ".join(reasons).replace("|", "/"),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def nodes(artifacts: dict[str, Any], shipped: str) -> str:
    """Quantized layers of what ships, or the three most sensitive ones of what could not."""
    facts = artifacts[shipped]["facts"]
    count = sum(fact["action"] == "quantized" for fact in facts)
    if count:
        left = [fact["layer"] for fact in facts if fact["action"] == "left-float"]
        return f"{count} in int8" + (f", in float {', '.join(f'`{layer}`' for layer in left[:3])}" if left else "")
    ranked = [fact for item in artifacts.values() for fact in item["facts"] if fact["stage"] == "sensitivity"]
    told = [f"`{fact['layer'].split(';')[0]}` ({fact['reason'].split(': ')[1].split(' at')[0]})" for fact in ranked[:3]]
    return ", ".join(told) or "accuracy holds: see the reasons"
