"""The report keeps every figure, says why one is missing, and lets no name become markup."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from compressor.errors import ConfigError
from compressor.types import Artifact, Measurement, Origin, Unavailable
from targets.outcome import Nearness, ParityRow, RunSummary
from targets.report import from_json, read_report, to_html, to_json, to_markdown, write_report
from targets.report.markdown import escape
from targets.report.serialise import read_outcome, write_outcome
from targets.report.table import HEADERS, OVERVIEW, headers, headline, rows
from tools.generate_report_schema import PATH, text

ROOT = Path(__file__).parents[4]


def reasons_of(summary: RunSummary) -> set[str]:
    figures = [
        getattr(row, name)
        for outcome in summary.outcomes
        for row in outcome.rows
        for name in ("validation", "test", "latency", "speedup", "file_bytes", "peak_memory")
    ]
    return {figure.reason for figure in figures if isinstance(figure, Unavailable)}


def test_json_round_trip_gives_the_same_summary(summary: RunSummary, tmp_path: Path) -> None:
    assert from_json(to_json(summary)) == summary
    assert from_json(to_json(summary, tmp_path), tmp_path) == summary


def test_paths_move_with_the_run_folder(summary: RunSummary, tmp_path: Path) -> None:
    written = to_json(summary, tmp_path)
    assert str(tmp_path) not in written
    moved = from_json(written, Path("/elsewhere"))
    assert moved.outcomes[0].rows[0].artifact.path == Path("/elsewhere/artifacts/teacher-fp32.onnx")
    assert moved.stages[1].folder == Path("/elsewhere/02-prune")


def test_each_artifact_stands_once_and_a_changed_namesake_is_kept(
    summary: RunSummary, artifacts: dict[str, Artifact]
) -> None:
    assert json.loads(to_json(summary))["artifacts"].keys() == artifacts.keys()
    first, second, *others = summary.outcomes
    other = dataclasses.replace(second.rows[0].artifact, digest="sha256:other")
    changed = (dataclasses.replace(second.rows[0], artifact=other), *second.rows[1:])
    twice = dataclasses.replace(summary, outcomes=(first, dataclasses.replace(second, rows=changed), *others))
    assert from_json(to_json(twice)) == twice


def test_numbers_that_are_not_finite_become_reasons(summary: RunSummary) -> None:
    first, *others = summary.outcomes
    row = dataclasses.replace(
        first.rows[1],
        latency=Measurement(math.nan, "ms", Origin.MEASURED, "here"),
        speedup=Measurement(2.0, "x", Origin.MEASURED, "here", {"ci95_low": math.nan}),
        agreement=math.inf,
    )
    broken = dataclasses.replace(
        summary,
        outcomes=(dataclasses.replace(first, rows=(first.rows[0], row)), *others),
        parity=(ParityRow("student/fp32", "logits", math.nan, 1e-4, 8, True),),
    )
    written = to_json(broken)
    assert not re.search(r"\b(nan|inf|infinity)\b", written, re.IGNORECASE)
    read = from_json(written)
    assert read.outcomes[0].rows[1].latency == Unavailable("the number from here was not finite")
    assert read.outcomes[0].rows[1].agreement is None
    assert read.parity[0].worst == math.inf
    assert not read.parity[0].passed
    assert "not finite" in to_markdown(read)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda data: data.update(schema_version="2.0"), "schema_version"),
        (lambda data: data.pop("schema_version"), "schema_version"),
        (lambda data: data.pop("artifacts"), "structure"),
        (lambda data: data.update(seed="seven"), "seed"),
        (lambda data: data["outcomes"][0]["rows"][0].update(artifact="nobody"), "structure"),
    ],
)
def test_what_is_not_a_report_is_refused(summary: RunSummary, change, where: str) -> None:  # type: ignore[no-untyped-def]
    data = json.loads(to_json(summary))
    change(data)
    with pytest.raises(ConfigError) as caught:
        from_json(json.dumps(data))
    assert [problem.where for problem in caught.value.problems] == [where]


@pytest.mark.parametrize("broken", ["", "{", "[]", "null"])
def test_a_damaged_file_is_refused(broken: str) -> None:
    with pytest.raises(ConfigError):
        from_json(broken)


def test_a_later_minor_version_with_new_keys_is_read(summary: RunSummary) -> None:
    data = json.loads(to_json(summary)) | {"schema_version": "1.9", "novelty": 3}
    assert from_json(json.dumps(data)) == summary


def test_written_files_render_again_without_computing(summary: RunSummary, tmp_path: Path) -> None:
    written = write_report(summary, tmp_path)
    assert set(written) == {"json", "md", "html"}
    again = read_report(tmp_path)
    assert again == summary
    assert to_html(again) == written["html"].read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []
    with pytest.raises(ConfigError, match="cannot be read"):
        read_report(tmp_path / "nowhere")


def test_an_outcome_is_kept_under_its_key(summary: RunSummary, tmp_path: Path) -> None:
    path = tmp_path / "targets" / "this-machine" / "outcome.json"
    for outcome in summary.outcomes:
        write_outcome(path, outcome, "key")
        assert str(tmp_path) not in path.read_text(encoding="utf-8")
        assert read_outcome(path, "key") == outcome
        assert read_outcome(path, "another") is None
    path.write_text(path.read_text(encoding="utf-8")[:-9], encoding="utf-8")
    assert read_outcome(path, "key") is None
    assert read_outcome(tmp_path / "nothing", "key") is None
    assert headers(summary) == HEADERS


def test_every_cell_says_something(summary: RunSummary) -> None:
    table = rows(summary)
    assert len(table) == 7 + 7 + 5 + 1
    for cells in table:
        assert len(cells) == len(HEADERS)
        assert all(cell.strip() for cell in cells)
        assert not any(cell in {"-1", "0", "nan", "None"} for cell in cells)
    shipped = next(cells for cells in table if cells[1] == "student/int8-static-per-channel (ships)")
    assert shipped[2:6] == ["93.68 %", "93.52 %", "−0.29 (test)", "0.271 ms"]
    assert shipped[8:13] == ["14.8x", "0.116 MiB", "36.3x", "45.2 MiB", "6 of 7"]


def test_headline_names_what_ships_and_its_origin(summary: RunSummary) -> None:
    assert headline(summary.outcomes[0], "accuracy") == (
        "This machine: student/int8-static-per-channel ships with 93.52 % accuracy (test, measured), p50 0.271 ms "
        "(14.8x the teacher's speed), 0.116 MiB (36.3x smaller). Fifteen times faster for 0.29 points."
    )
    assert "latency unavailable: no Raspberry Pi 5 is attached" in headline(summary.outcomes[1], "accuracy")
    assert "nothing ships" in headline(summary.outcomes[3], "accuracy")


def test_markdown_has_every_row_and_reason_and_escapes(summary: RunSummary) -> None:
    page = to_markdown(summary)
    for reason in reasons_of(summary):
        assert f") {escape(reason)}" in page, "below its table"
    assert "| unavailable (1) |" in page
    assert "<script" not in page
    assert "<img" not in page
    assert "the Vela compiler is not installed" in page
    assert "Distillation bought +1.32 points of accuracy on test" in page
    lines = [line for line in page.splitlines() if line.startswith("| student/int8-static-per-channel (ships)")]
    assert len(lines) == 2
    assert {line.count("|") for line in lines} == {len(HEADERS)}


def test_many_profiles_begin_with_one_line_each(summary: RunSummary) -> None:
    first, *others = summary.outcomes
    near = Nearness(worst=0.012, reach=14.5, samples=400, argmax=0.9975)
    shipped = tuple(dataclasses.replace(row, nearness=near) if row.shipped else row for row in first.rows)
    told = dataclasses.replace(summary, outcomes=(dataclasses.replace(first, rows=shipped), *others))
    page = to_markdown(told)
    table = page[page.index("| profile | ships |") :].split("\n\n")[0].splitlines()
    assert len(table) == 2 + len(summary.outcomes)
    assert {line.count("|") for line in table} == {len(OVERVIEW) + 1}
    assert "| 93.52 % (measured) |" in table[2]
    assert "| 99.75 % | 0.0120 of 14.5 |" in table[2]
    sentence = "beside ONNX Runtime on the same file (400 test samples): same class 99.75 %, worst difference 0.0120"
    assert sentence in page
    assert sentence in to_html(told)
    one = dataclasses.replace(told, outcomes=told.outcomes[:1])
    assert "| profile | ships |" not in to_markdown(one)
    assert f"- {escape(headline(first, 'accuracy'))}" in to_markdown(one)


def test_a_compiler_s_estimate_stands_where_nothing_could_be_measured(summary: RunSummary) -> None:
    first = summary.outcomes[0]
    row = first.shipped
    assert row is not None
    assert row.compiled is not None
    whole = Measurement(0.29, "ms", Origin.ESTIMATED, "Vela", {"counted": "14 operations"})
    part = dataclasses.replace(whole, detail={"counted": "lower bound: 7 of 13 operations counted"})

    def shown(figure: Measurement) -> str:
        compiled = dataclasses.replace(row.compiled, estimates=(figure,))
        told = dataclasses.replace(row, latency=Unavailable("no board"), compiled=compiled)
        outcome = dataclasses.replace(first, rows=tuple(told if item is row else item for item in first.rows))
        assert "estimated" in to_html(dataclasses.replace(summary, outcomes=(outcome,)))
        return headline(outcome, "accuracy")

    assert "latency 0.290 ms (estimated), " in shown(whole)
    assert "latency 0.290 ms (estimated, a lower bound), " in shown(part)


class Loads(HTMLParser):
    """Collects tags, text and whatever a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        wanted = {"src", "href", "xlink:href", "data", "srcset", "poster", "action"}
        self.fetched += [value or "" for name, value in attrs if name in wanted]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_html_loads_nothing_and_lets_no_name_be_markup(summary: RunSummary) -> None:
    page = to_html(summary)
    parser = Loads()
    parser.feed(page)
    assert all(value.startswith("#profile-") for value in parser.fetched)
    assert "script" not in parser.tags
    assert "img" not in parser.tags
    assert "url(" not in page
    assert "@import" not in page
    words = " ".join(" ".join(parser.texts).split())
    assert "<script>alert('name')</script>" in words
    for reason in reasons_of(summary):
        assert reason in words
    assert words.index("2 warnings") < words.index("This machine")
    assert not re.search(r"\bnan\b|(?<![\w.−-])-1\b", words)


def test_schema_file_is_fresh() -> None:
    assert PATH.read_text(encoding="utf-8") == text(), "run `python -m tools.generate_report_schema`"


def test_schema_accepts_the_report(summary: RunSummary, tmp_path: Path) -> None:
    validator = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    validator.Draft202012Validator(json.loads(text())).validate(json.loads(to_json(summary, tmp_path)))


def test_documentation_names_every_key_of_the_report() -> None:
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    schema = json.loads(text())
    keys = set(schema["properties"]) | {
        key for part in ("Row", "ProfileOutcome") for key in schema["$defs"][part]["properties"]
    }
    assert {key for key in keys if f"`{key}`" not in page} == set()


@pytest.mark.browser
def test_chromium_shows_the_picture_and_every_row(summary: RunSummary, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium or chromium-browser on the PATH")
    page = write_report(summary, tmp_path)["html"]
    quiet = ("gpu", "quic", "background-networking", "component-update", "sync")
    options = ["--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{what}" for what in quiet)]
    command = [browser, *options, f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom", page.as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert found.count('<svg class="picture wide"') == 2
    assert found.count('<svg class="picture narrow"') == 2
    assert found.count('class="front"') == 4
    shown = re.findall(r'<tbody class="row[^"]*" data-artifact="([^"]+)"', found)
    assert shown == [row.artifact.name for outcome in summary.outcomes for row in outcome.rows]
    marks = re.findall(r'<g class="mark[^"]*" data-name="([^"]+)"', found)
    assert sorted(marks) == sorted(4 * [row.artifact.name for row in summary.outcomes[0].rows])
