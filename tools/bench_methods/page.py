"""Runs the rows and writes the page."""

from __future__ import annotations

import statistics
import sys
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from compressor.distil.probes.paired import interval, verdict
from tools.bench_methods import pictures as pixels
from tools.bench_methods import rows as pictures
from tools.bench_methods import text, text_rows
from tools.bench_methods.arms import RATES, Arm, Row
from tools.bench_methods.lab import BATCH, Lab
from tools.bench_methods.networks import fresh
from tools.bench_methods.store import Store
from tools.bench_methods.text import Text
from tools.bench_methods.vision import Vision

HEAD = (
    "| row | claim: ours > twin | ours | twin | difference | wins | 90 % interval | verdict | rates |\n"
    "|---|---|---|---|---|---|---|---|---|"
)
CHECKS = Path(__file__).parents[2] / "tests" / "data" / "objective_checks.toml"
COMMAND = "python -m tools.bench_methods --out docs/evidence/methods.md      # or: python -m tools.bench methods"
VERDICTS = "better", "no difference shown", "worse"


@dataclass(frozen=True)
class Line:
    """One measured row."""

    name: str
    row: Row
    text: str
    verdict: str

    @property
    def won(self) -> bool:
        """Every seed, or an interval above 0."""
        return self.verdict not in VERDICTS[1:]


def rows() -> dict[str, Row]:
    """All rows by name."""
    return {**pictures.robust(), **text_rows.rows(), **pictures.proposals()}


def said(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def measure(name: str, row: Row, lab: Lab, seeds: int) -> Line:
    """One line of the table."""
    pairs = [(lab.value(row, row.ours, seed), lab.value(row, row.theirs, seed) + row.margin) for seed in range(seeds)]
    ours, theirs = (statistics.fmean(side) for side in zip(*pairs, strict=True))
    differences = [a - b for a, b in pairs]
    low, high = interval(differences)
    wins, found = sum(d > 0 for d in differences), verdict(differences)
    rates = ", ".join(f"{lab.rate(arm):g}" for arm in row.arms)
    words = (
        f"| `{name}` ({row.ids}) | {row.claim} | {ours:.2f} | {theirs:.2f} | {ours - theirs:+.2f} | {wins}/{seeds} "
        f"| {low:+.2f} to {high:+.2f} | {found} | {rates} |"
    )
    return Line(name, row, words, found)


def laboratories(work: Path) -> dict[str, Lab]:
    """The fixtures whose input is there."""
    made = {}
    if not pixels.missing():
        made["vision"] = Lab(Vision(work / "vision"), Store(work / "vision.json"), work / "vision", said)
    if not text.missing():
        made["text"] = Lab(Text(work / "text"), Store(work / "text.json"), work / "text", said)
    return made


def page(names: Sequence[str], seeds: int, work: Path, *, stored: bool = False) -> str:
    """Measure the rows, each printed as it is known, and tell them as Markdown.

    ``stored``: train nothing; rows without all their scores are named as not measured.
    """
    labs, known, lines, missing = laboratories(work), rows(), [], []
    for name in names:
        bench = known[name].arms[0].bench
        if bench not in labs:
            said(f"{name} is left out: {text.missing() or pixels.missing()}")
            missing.append(name)
        elif stored and not labs[bench].known(known[name], seeds):
            missing.append(name)
        else:
            lines.append(measure(name, known[name], labs[bench], seeds))
            said(lines[-1].text)
    return document(lines, labs, seeds, missing)


def document(lines: Sequence[Line], labs: Mapping[str, Lab], seeds: int, missing: Sequence[str] = ()) -> str:
    groups = {
        "Rows that the specification calls robust": [line for line in lines if line.row.robust],
        "Proposals that had never been run": [line for line in lines if not line.row.robust],
    }
    parts = ["# Do the methods help?\n", *_summary(groups, missing), *_settings(lines, labs, seeds)]
    for title, found in groups.items():
        parts += [f"## {title}\n", HEAD, *(line.text for line in found), ""] if found else []
    return "\n".join([*parts, *_checks()]) + "\n"


def _summary(groups: Mapping[str, Sequence[Line]], missing: Sequence[str]) -> list[str]:
    parts = []
    for title, lines in groups.items():
        counts = Counter("every seed" if line.verdict not in VERDICTS else line.verdict for line in lines)
        told = ", ".join(f"{counts[word]} {word}" for word in ("every seed", *VERDICTS) if counts[word])
        lost = [f"`{line.name}` ({line.verdict})" for line in lines if not line.won]
        parts += [f"**{title}** ({len(lines)}): {told}.", f"Not shown: {', '.join(lost)}." if lost else "", ""]
    if missing:
        parts.append(f"Not measured yet: {', '.join(f'`{name}`' for name in missing)}.\n")
    parts += [
        "A win on all five of five seeds has probability 1/32 where nothing differs: a row or two of this page may be "
        "chance. Networks and budgets are tiny: signs count, sizes do not carry over.\n",
        "Command (about an hour of one processor core; it goes on where it was stopped):\n",
        f"```\n{COMMAND}\n```\n",
    ]
    return parts


def _settings(lines: Sequence[Line], labs: Mapping[str, Lab], seeds: int) -> list[str]:
    arms = {arm.key: arm for line in lines for arm in line.row.arms if len(arm.rates) > 1}
    upper = sum(labs[arm.bench].rate(arm) == max(arm.rates) for arm in arms.values())
    weights = {name: sum(p.numel() for p in fresh(name, 0).parameters()) for name in ("student", "teacher")}
    example: Arm = pictures.plain(500)
    fixtures = "; ".join(f"{name}: {lab.fixture.teachers()}" for name, lab in labs.items())
    left_out = "" if "text" in labs else f" Movie reviews are left out: {text.missing()}."
    return [
        "## How\n",
        f"{seeds} paired seeds: both sides of a row share student, samples, order and steps, and initial weights "
        "unless these are the claim. `rates`: each arm's learning rate is the better of the same two on a validation "
        "part of a tenth, with a seed that is not one of those compared; the other settings were fixed in advance. The "
        "test set only scores. `5/5`: every seed wins; `better`, `worse`: the 90 % t-interval of the mean difference "
        "lies on one side of 0 (or every seed loses). "
        f"The higher rate won in {upper} of {len(arms)} arms: higher ones might raise both sides.\n",
        f"Pictures: Fashion-MNIST, networks of {weights['student']:,} parameters, teacher of {weights['teacher']:,}, "
        f"{example.steps} steps of {BATCH['vision']}, rates {_both(RATES)}, accuracy in per cent on "
        "10,000 test images. Movie reviews: three layers of a fine-tuned MiniLM-L6 (embeddings frozen), "
        f"{text_rows.STEPS} steps of {BATCH['text']}, rates {_both(text_rows.RATES)}, "
        f"2,063 test sentences.{left_out}\n",
        f"Teachers on test: {fixtures}.\n",
    ]


def _both(rates: Sequence[float]) -> str:
    return " and ".join(f"{rate:g}" for rate in rates)


def _checks() -> list[str]:
    """The index of exact and mechanism checks of every objective."""
    index = tomllib.loads(CHECKS.read_text(encoding="utf-8"))
    head = "| objective | exact | moves |\n|---|---|---|"
    lines = []
    for name, entry in index.items():
        exact = ", ".join(_words(test) for test in entry["exact"])
        lines.append(f"| `{name}` | {exact} | {entry['moves']} ({_words(entry['by'])}) |")
    return [
        "## What the test suite checks of each objective\n",
        "Exact values and identities, and the quantity that moves under gradient steps; `make test` runs them "
        "(`tests/unit/distil`, index `tests/data/objective_checks.toml`).\n",
        head,
        *lines,
    ]


def _words(test: str) -> str:
    return test.removeprefix("test_").replace("_", " ")
