"""Write ``docs/targets.md``: what every target really does with every group of operators, on this machine, today.

    python -m tools.generate_targets [--only TARGET ...]

Each group (tools/operator_groups.py) is compiled, float and int8, by every target that is here, run where it runs, and
compared with ONNX Runtime on the same file. Nothing is assumed: a cell is what happened.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime

from compressor.errors import CompressError
from compressor.profile import HardwareProfile, load_profile, profile_names
from compressor.types import Artifact
from targets import registry
from targets.base import Compiled, Missing, TargetBackend
from tools.operator_groups import GROUPS, NETS, samples, write_group
from tools.target_rules import Combination, breaks, broken, combinations, consequence, describe, emitted

PAGE = Path(__file__).parents[1] / "docs" / "targets.md"
STORE = Path(__file__).parents[1] / "build" / "targets-page.json"
INT8_ERROR = 0.05  # of the largest output, against ONNX Runtime on the same int8 file: kernels round differently


@dataclass(frozen=True)
class Cell:
    """What one target did with one model."""

    word: str
    note: str = ""


def attempt(backend: TargetBackend, profile: HardwareProfile, group: str, artifact: Artifact, out: Path) -> Cell:
    """Compile, run, compare."""
    return tried(backend, profile, group, artifact, out)[0]


def tried(
    backend: TargetBackend, profile: HardwareProfile, group: str, artifact: Artifact, out: Path
) -> tuple[Cell, Compiled | None]:
    """What happened, and what the compiler made."""
    try:
        if problems := backend.check(artifact, profile):
            return Cell("refused", "; ".join(problems)), None
        compiled = backend.compile(artifact, profile, out)
    except CompressError as error:
        return Cell("refused", str(error)), None
    return _answer(backend, profile, group, artifact, compiled), compiled


def _answer(
    backend: TargetBackend, profile: HardwareProfile, group: str, artifact: Artifact, compiled: Compiled
) -> Cell:
    if compiled.placed == 0:
        return Cell("not placed", "; ".join(item.what for item in compiled.over))
    state = registry.probe(backend.name)
    if isinstance(state, Missing) or state.runs is None:
        return Cell("compiled")
    try:
        inputs = samples(group, 3)
        with backend.open(compiled, profile) as session:
            found = session.run(inputs)
    except CompressError as error:
        return Cell("refused", str(error))
    expected = onnxruntime.InferenceSession(str(artifact.path), providers=["CPUExecutionProvider"]).run(None, inputs)[0]
    allowed = INT8_ERROR if artifact.precision.startswith("int8") else backend.float_error * 10
    error = float(np.abs(next(iter(found.values())) - expected).max() / np.abs(expected).max())
    return Cell(str(state.runs)) if error <= allowed else Cell("differs", f"relative error {error:.2g}")


def profile_for(target: str) -> HardwareProfile | None:
    """The first built-in profile of a target; profiles of this machine first."""
    found = [profile for name in profile_names() if (profile := load_profile(name)).target == target]
    return min(found, key=lambda profile: profile.here != "this-machine") if found else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Vendor libraries print a lot."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def examine(target: str) -> dict[str, object]:
    """One target: its state and its cells."""
    state, profile = registry.probe(target), profile_for(target)
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    if isinstance(state, Missing):
        return {"missing": state.reason, "hint": state.hint, "date": today}
    if profile is None:
        return {"missing": "no built-in profile uses it", "hint": "", "date": today}
    backend, cells = registry.get(target), {}
    for group in GROUPS:
        with tempfile.TemporaryDirectory() as folder, quiet():
            plain = write_group(group, Path(folder) / "float.onnx")
            cells[f"{group}|float"] = vars(attempt(backend, profile, group, plain, Path(folder) / "a"))
            try:
                quantized = emitted(group, profile.quantization, Path(folder))
            except CompressError as error:
                cells[f"{group}|int8"] = vars(Cell("no int8 form", str(error)))
                continue
            cells[f"{group}|int8"] = vars(attempt(backend, profile, group, quantized, Path(folder) / "b"))
        print(target, group, cells[f"{group}|float"]["word"], cells[f"{group}|int8"]["word"], flush=True)
    return {
        "cells": cells,
        "rules": [_rules(combination) for combination in combinations() if combination.target == target],
        "profile": profile.name,
        "device": state.device,
        "versions": dict(state.versions),
        "date": today,
    }


def _rules(combination: Combination) -> dict[str, object]:
    """The small nets by these rules, and what the compiler does with files that break each of them."""
    backend, profile = registry.get(combination.target), load_profile(combination.profile)
    nets: dict[str, dict[str, str]] = {}
    least: dict[str, int] = {}
    against: list[dict[str, str]] = []
    for net in NETS:
        with tempfile.TemporaryDirectory() as folder, quiet():
            artifact = emitted(net, combination.rules, Path(folder))
            cell, compiled = tried(backend, profile, net, artifact, Path(folder) / "out")
        nets[net] = vars(cell)
        least[net] = compiled.coverage.quantized if compiled is not None and compiled.coverage is not None else 0
    for case in breaks(combination.rules):
        with tempfile.TemporaryDirectory() as folder, quiet():
            artifact, said = broken(case, combination.rules, Path(folder))
            does, words = consequence(combination.target, artifact, said, profile, least[case.net], Path(folder) / "b")
        against.append({"rule": case.name, "lint": str(said[0]) if said else "", "does": does, "words": words})
    print(combination, {net: cell["word"] for net, cell in nets.items()}, flush=True)
    return {"rules": describe(combination.rules), "nets": nets, "against": against}


def _rules_page(found: dict[str, dict[str, object]]) -> list[str]:
    told = [(name, entry) for name, item in found.items() for entry in item.get("rules", [])]  # type: ignore[attr-defined]
    notes: list[str] = []
    lines = [
        "## Rules of quantization",
        "",
        "Every distinct `[quantization]` table of the built-in profiles (docs/profiles.md): two nets are quantized",
        "by it, pass the lint, and go through the compiler. `tests/contract/test_rules.py` does the same.",
        "",
        f"| target | rules | {' | '.join(NETS)} |",
        "|---" * (2 + len(NETS)) + "|",
    ]
    for name, entry in told:
        cells = " | ".join(_cell(entry["nets"][net], notes) for net in NETS)
        lines.append(f"| `{name}` | {entry['rules']} | {cells} |")
    lines += ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1)), ""]
    lines += [
        "A file that breaks one rule (`opset 17`: also the one to quantize the whole graph): what the lint says first,",
        "and what the compiler does with it when the lint is not asked. Where it takes the file, the rule is there for",
        "speed or for other files.",
        "",
        "| target | broken | the lint | the compiler |",
        "|---|---|---|---|",
    ]
    for name, entry in told:
        for case in entry["against"]:
            does = case["does"] + (f": {_short(case['words'])}" if case["words"] else "")
            lines.append(f"| `{name}` | {case['rule']} | {_short(case['lint']) or 'says nothing'} | {does} |")
    return [*lines, ""]


def _short(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")[:160]


def page(found: dict[str, dict[str, object]]) -> str:
    """The whole page as Markdown."""
    here = [name for name, item in found.items() if "cells" in item]
    lines = [
        "<!-- generated by tools/generate_targets.py; do not edit -->",
        "# What each target really does",
        "",
        "Every group of operators below was compiled by every target that could be installed here, float and int8 (the",
        "first static file that `quantize` makes by the rules of its profile), run where it runs, and compared with",
        "ONNX Runtime on the same file.",
        "`measured`, `simulated`: it ran and agreed; `compiled`: the compiler took it and it cannot run here;",
        "`not placed`: none of it runs on the accelerator; `refused` and `differs` have a note; `not examined`: the "
        "run was stopped.",
        "",
    ]
    if older := [f"`{name}`" for name in here if "rules" not in found[name]]:
        told = "int8 cells are of an earlier day, with files of ONNX Runtime's own quantizer by the same rules."
        lines += [f"{', '.join(older)}: {told}", ""]
    for precision in ("float", "int8"):
        lines += [f"## {precision}", "", f"| | {' | '.join(here)} |", "|---" * (len(here) + 1) + "|"]
        notes: list[str] = []
        for group in GROUPS:
            row = [_cell(found[name]["cells"][f"{group}|{precision}"], notes) for name in here]  # type: ignore[index]
            lines.append(f"| {group} | {' | '.join(row)} |")
        lines += ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1)), ""]
    lines += _rules_page({name: found[name] for name in here})
    lines += ["## Versions", "", "| target | profile | ran on | versions | date |", "|---|---|---|---|---|"]
    for name, item in found.items():
        if "cells" in item:
            versions = ", ".join(f"{key} {value}" for key, value in item["versions"].items())  # type: ignore[attr-defined]
            lines.append(f"| `{name}` | `{item['profile']}` | {item['device']} | {versions} | {item['date']} |")
        else:
            lines.append(f"| `{name}` | | not here: {item['missing']} | | {item['date']} |")
    return "\n".join(lines) + "\n"


def _cell(cell: dict[str, str], notes: list[str]) -> str:
    if not cell["note"]:
        return cell["word"]
    note = " ".join(cell["note"].split()).replace("|", "/")[:300]
    if note not in notes:
        notes.append(note)
    return f"{cell['word']} [{notes.index(note) + 1}]"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=registry.names(), help="examine these again; keep the others")
    options = parser.parse_args(arguments)
    kept = json.loads(STORE.read_text()) if STORE.is_file() else {}
    for name in options.only or registry.names():
        kept[name] = examine(name)
        STORE.parent.mkdir(parents=True, exist_ok=True)
        STORE.write_text(json.dumps(kept, indent=1))
    PAGE.write_text(page({name: kept[name] for name in registry.names() if name in kept}))


if __name__ == "__main__":
    main()
