"""The evidence page of the encoder-decoder example, from a finished run: figures of the report, words, writing times.

python -m tools.grapheme_to_phoneme RUN_FOLDER        (RUN_FOLDER holds report.json and packages/this-machine)
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import time
from pathlib import Path
from typing import Any

from targets.package import infer

ROOT = Path(__file__).parents[1]
WORDS = 100  # of the test set, timed one by one
SHOWN = 12


def page(run: Path) -> str:
    """Markdown."""
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    (outcome,) = report["outcomes"]
    rows = {row["artifact"]: row for row in outcome["rows"]}
    package = infer.Package(run / "packages" / outcome["profile"])
    with (ROOT / "build/g2p/test.csv").open(newline="", encoding="utf-8") as stream:
        test = [(row["word"], row["phonemes"]) for row in csv.DictReader(stream)]
    files = {name: (run / report["artifacts"][name]["path"]).resolve() for name in rows if name in report["artifacts"]}
    sessions = {name: infer.open_session(path, package.manifest["runtime"]) for name, path in files.items()}
    step = len(test) // WORDS
    times = writing_ms(package, sessions, [word for word, _ in test[::step][:WORDS]])
    shipped = next(name for name, row in rows.items() if row["shipped"])
    lines = [HEAD.format(samples=f"{len(test):,}", verdict=outcome["verdict"], shipped=shipped), *TABLE]
    lines += [_row(name, row, times) for name, row in rows.items()]
    lines += ["", f"Standard errors are of a bootstrap over the {len(test):,} test words.", "", "## What it writes", ""]
    lines += ["| word | dictionary | what ships | |", "|---|---|---|---|"]
    for word, right in test[:: len(test) // SHOWN][:SHOWN]:
        said = package.written(sessions[shipped], package.tokens(word), None)["text"]
        lines.append(f"| {word} | {right} | {said} | {'' if said == right else 'wrong'} |")
    return "\n".join(lines) + "\n"


HEAD = """# Grapheme to phoneme: an encoder-decoder model

`python -m tools.bench grapheme-to-phoneme` ([report](report.md), [page](report.png), [recipe](recipe.toml)): words of
the CMU Pronouncing Dictionary to phonemes without stress. One seed. No training word differs from one of the {samples}
test words by a final -s, -ed or -ing alone. Teacher: a T5 with 3 + 3 layers of width 128, trained by
`examples/grapheme_to_phoneme/train_teacher.py`; the student keeps the encoder and one decoder layer.

Verdict: {verdict}. What ships: `{shipped}`.

Phoneme error rate: edits by phonemes, of greedily written text. Word: all phonemes right. Pass: p50 of one pass over a
word and its whole target, as in the report. Writing: median of a whole word through the packaged `infer.py`, 100 test
words one by one, the files in turn, one thread.
"""
TABLE = (
    "| file | phoneme error rate, test | words right | perplexity | pass | writing a word | size |",
    "|---|---|---|---|---|---|---|",
)


def _row(name: str, row: dict[str, Any], times: dict[str, float]) -> str:
    split = "test" if "value" in row["test"] else "validation"
    figure = row[split]
    if "value" not in figure:
        return f"| {name} | {figure['reason']} | | | | | |"
    detail = figure["detail"]
    rate = f"{100 * detail['word_error_rate']:.2f} ± {100 * detail['standard_error']:.2f} %"
    rate += " (validation)" if split == "validation" else ""
    latency = f"{row['latency']['value']:.2f} ms" if "value" in row["latency"] else "-"
    writing = f"{times[name]:.2f} ms" if name in times else "-"
    return (
        f"| {name} | {rate} | {100 * detail['exact_match']:.1f} % | {detail['perplexity']:.3f} | {latency} | {writing} "
        f"| {row['file_bytes']['value'] / 2**20:.2f} MiB |"
    )


def writing_ms(package: infer.Package, sessions: dict[str, Any], words: list[str]) -> dict[str, float]:
    """Median time of writing one word, by file; the files take turns."""
    for session in sessions.values():
        package.written(session, package.tokens(words[0]), None)
    found: dict[str, list[float]] = {name: [] for name in sessions}
    for word in words:
        for name, session in sessions.items():
            inputs = package.tokens(word)
            began = time.perf_counter()
            package.written(session, inputs, None)
            found[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    print(page(parser.parse_args().run))


if __name__ == "__main__":
    main()
