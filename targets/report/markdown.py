"""``report.md``: the run for a pull request or a terminal pager. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from targets.outcome import ProfileOutcome, Row, RunSummary
from targets.report import figures
from targets.report.compare import twin_verdicts
from targets.report.facts import fact_groups
from targets.report.footnotes import Footnotes
from targets.report.seeds import SEED_HEADERS, seed_rows, seed_sentences
from targets.report.table import (
    HEADERS,
    OVERVIEW,
    compile_text,
    explained_floats,
    headline,
    nearness_text,
    overview_row,
    profile_rows,
)

FEW = 3  # profiles whose verdicts can be read as sentences


def to_markdown(summary: RunSummary) -> str:
    """The report as GitHub-flavoured Markdown. Text from outside is escaped, so that no name can form markup."""
    lines = [
        f"# {escape(summary.name)}",
        "",
        f"{escape(summary.task)}, {summary.created}: `{_code(summary.command)}`",
        "",
    ]
    lines += [f"> **Warning:** {escape(warning)}" for warning in summary.warnings]
    lines += [""] if summary.warnings else []
    if len(summary.outcomes) > FEW:
        lines += _overview(summary)
    else:
        lines += [f"- {escape(headline(outcome, summary.metric))}" for outcome in summary.outcomes]
    for outcome in summary.outcomes:
        lines += ["", *_profile(outcome, summary)]
    lines += (
        _twins(summary)
        + _rejected(summary)
        + _parity(summary)
        + _layers(summary)
        + _data(summary)
        + _integrity(summary)
    )
    return "\n".join([*lines, *_provenance(summary), ""])


def _overview(summary: RunSummary) -> list[str]:
    """What ships on each of many profiles, a line each; the sentences stand with the profiles."""
    found = [overview_row(outcome, summary.metric) for outcome in summary.outcomes]
    return _noted(OVERVIEW, found)


def _noted(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table whose reasons stand below it, each once."""
    notes = Footnotes()

    def short(cell: str) -> str:
        word, separator, reason = cell.partition(": ")
        return f"unavailable ({notes.number(reason)})" if word == "unavailable" and separator else cell

    lines = markdown_table(headers, [[short(cell) for cell in row] for row in rows])
    for number, reason in enumerate(notes.reasons, 1):
        lines += ["", f"({number}) {escape(reason)}"]
    return lines


def _profile(outcome: ProfileOutcome, summary: RunSummary) -> list[str]:
    state = "target missing" if outcome.missing else "promise kept" if outcome.kept else "promise missed"
    lines = [f"## {escape(outcome.title)} (`{_code(outcome.profile)}`): {state}", ""]
    lines += [f"Target `{_code(outcome.target)}`, device: {escape(outcome.device)}. {escape(outcome.verdict)}", ""]
    if outcome.missing:
        lines += [f"Missing: {escape(outcome.missing)}", ""]
    lines += _noted(HEADERS[1:], [row[1:] for row in profile_rows(outcome, summary.metric)])
    for row in outcome.rows:
        told = ", ".join(text for text in (nearness_text(row), compile_text(row)) if text)
        lines += ["", f"{escape(row.artifact.name)}: {escape(told)}."] if row.nearness is not None else []
        lines += _left_float(row)
    return lines + [line for note in outcome.notes for line in ("", escape(note))]


def _left_float(row: Row) -> list[str]:
    """One line for each reason: in a transformer dozens of nodes share one."""
    nodes: dict[str, list[str]] = {}
    for fact in explained_floats(row):
        reason = re.sub(r" \(layer `[^`]*`\)", "", fact.reason)  # a name of each node's own in the compiler
        nodes.setdefault(reason or "not stated", []).append(f"{fact.name} ({fact.operator})")
    name = escape(row.artifact.name)
    return [
        line
        for reason, found in nodes.items()
        for line in ("", f"Left float in {name}, {escape(reason)}: {escape(', '.join(found))}.")
    ]


def _twins(summary: RunSummary) -> list[str]:
    found = twin_verdicts(summary)
    lines = ["", "## What distillation bought", ""]
    if not found:
        return [*lines, "No null twin was trained in this run, so that this question stays open."]
    lines += [f"- {escape(verdict.profile)}: {escape(verdict.sentence)}" for verdict in found]
    return lines + _seeds(summary)


def _seeds(summary: RunSummary) -> list[str]:
    if summary.paired_seeds is None:
        return []
    sentences = [escape(sentence) for sentence in seed_sentences(summary)]
    return ["", "### Paired seeds", "", *markdown_table(SEED_HEADERS, seed_rows(summary)), "", " ".join(sentences)]


def _rejected(summary: RunSummary) -> list[str]:
    if not summary.rejected:
        return []
    rows = [[name, reason or "not stated"] for name, reason in summary.rejected.items()]
    return ["", "## Variants that were never built", "", *markdown_table(["variant", "reason"], rows)]


def _parity(summary: RunSummary) -> list[str]:
    if not summary.parity:
        return []
    rows = [
        [
            row.artifact,
            row.output,
            figures.significant(row.worst) if row.worst >= 1e-4 or row.worst == 0 else f"{row.worst:.1e}",
            f"{row.tolerance:g}",
            str(row.samples),
            "passed" if row.passed else "FAILED",
        ]
        for row in summary.parity
    ]
    headers = ["artifact", "output", "worst difference", "tolerance", "samples", "verdict"]
    return ["", "## Parity of the export", "", *markdown_table(headers, rows)]


def _layers(summary: RunSummary) -> list[str]:
    groups = fact_groups(summary)
    if not groups:
        return []
    rows = [[group.title, ", ".join(f"{count} {action}" for action, count in group.counts)] for group in groups]
    return [
        "",
        "## Layers",
        "",
        *markdown_table(["stage or file", "layers"], rows),
        "",
        "Layer by layer: `report.html`.",
    ]


def _data(summary: RunSummary) -> list[str]:
    data = summary.data
    rows = [[split, f"{size:,}", data.digests.get(split, "not recorded")] for split, size in data.sizes.items()]
    lines = ["", "## Data", "", f"{escape(data.source)}; {data.duplicates_dropped:,} duplicates dropped.", ""]
    return lines + markdown_table(["split", "samples", "digest"], rows) + [f"\n{escape(note)}" for note in data.notes]


def _integrity(summary: RunSummary) -> list[str]:
    if not summary.integrity:
        return []
    rows = [[finding.check, finding.state, finding.text] for finding in summary.integrity]
    return ["", "## Integrity", "", *markdown_table(["check", "state", "finding"], rows)]


def _provenance(summary: RunSummary) -> list[str]:
    lines = ["", "## Provenance", "", f"Run `{summary.digest}`, seed {summary.seed}.", ""]
    for title, values in (("Teacher", summary.teacher), ("Machine", summary.machine), ("Versions", summary.versions)):
        lines += [f"- {title}: {_pairs(values)}"]
    lines += [f"- Teacher {escape(values.get('name', ''))}: {_pairs(values)}" for values in summary.teachers]
    return lines


def _pairs(values: Mapping[str, str]) -> str:
    return (
        "; ".join(f"{escape(key)} {escape(value or 'not stated')}" for key, value in values.items()) or "not recorded"
    )


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(headers) + " |", "|" + " --- |" * len(headers)]
    return lines + ["| " + " | ".join(escape(cell) for cell in row) + " |" for row in rows]


def escape(text: str) -> str:
    """Neutralise what Markdown or its HTML could act on; keep it on one line."""
    flat = " ".join(str(text).split())
    for character in "\\`*_[]|":
        flat = flat.replace(character, "\\" + character)
    return flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _code(text: str) -> str:
    """Text inside backticks: no backtick, no line break."""
    return " ".join(str(text).replace("`", "'").split())
