"""Runs the rows and writes the page."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.bench_methods import rows as pictures
from tools.bench_methods import text, text_rows
from tools.bench_methods.arms import Row
from tools.bench_methods.lab import Lab
from tools.bench_methods.store import Store
from tools.bench_methods.text import Text
from tools.bench_methods.verdicts import interval, verdict
from tools.bench_methods.vision import Vision

HEAD = "| row | claim | ours | twin | difference | wins | 90 % interval | verdict |\n|---|---|---|---|---|---|---|---|"


def rows() -> dict[str, Row]:
    """All rows by name."""
    return {**pictures.rows(), **text_rows.rows()}


def said(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(name: str, row: Row, lab: Lab, seeds: int) -> tuple[str, str]:
    """One line of the table, and its verdict."""
    pairs = [(lab.value(row, row.ours, seed), lab.value(row, row.theirs, seed) + row.margin) for seed in range(seeds)]
    ours, theirs = (statistics.fmean(side) for side in zip(*pairs, strict=True))
    differences = [a - b for a, b in pairs]
    low, high = interval(differences)
    wins, found = sum(d > 0 for d in differences), verdict(differences)
    return (
        f"| `{name}` ({row.ids}) | {row.claim} | {ours:.2f} | {theirs:.2f} | {ours - theirs:+.2f} | {wins}/{seeds} "
        f"| {low:+.2f} to {high:+.2f} | {found} |"
    ), found


def page(names: Sequence[str], seeds: int, work: Path) -> str:
    """The whole table as Markdown."""
    labs = {"vision": Lab(Vision(work / "vision"), Store(work / "vision.json"), work / "vision", said)}
    if not text.missing():
        labs["text"] = Lab(Text(work / "text"), Store(work / "text.json"), work / "text", said)
    known = rows()
    lines = []
    for name in names:
        bench = known[name].arms[0].bench
        if bench not in labs:
            said(f"{name} is left out: {text.missing()}")
            continue
        line, _ = measure(name, known[name], labs[bench], seeds)
        said(line)
        lines.append(line)
    return "\n".join([HEAD, *lines]) + "\n"
