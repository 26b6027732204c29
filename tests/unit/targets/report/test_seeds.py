"""Paired seeds in the reports: every figure, the words, and what is said where a figure is missing."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from compressor.types import Measurement, Origin, Unavailable
from targets.outcome import PairedSeeds, RunSummary, SeedRow
from targets.report import from_json, to_html, to_json, to_markdown
from targets.report.seeds import seed_rows, seed_sentences

LOST = Unavailable("it did not run")


def figure(value: float, unit: str = "1") -> Measurement:
    return Measurement(value, unit, Origin.MEASURED, "here")


def proof(summary: RunSummary, **changes: object) -> RunSummary:
    rows = (
        SeedRow(7, figure(0.91), figure(0.90), figure(0.92), figure(0.90), ("distil-ab",)),
        SeedRow(8, figure(0.93), figure(0.90), figure(0.94), figure(0.91)),
    )
    made = PairedSeeds("this-machine", "test", rows, figure(0.95), figure(0.95), 2, "2/2", 0.025, -0.0066, 0.0566)
    return dataclasses.replace(summary, paired_seeds=dataclasses.replace(made, **changes))


def test_table_and_words_stand_in_every_form(summary: RunSummary) -> None:
    made = proof(summary)
    assert from_json(to_json(made)) == made
    assert seed_rows(made) == [
        ["7", "91.00 %", "90.00 %", "92.00 %", "90.00 %", "+2.00"],
        ["8", "93.00 %", "90.00 %", "94.00 %", "91.00 %", "+3.00"],
        ["mean", "92.00 %", "90.00 %", "93.00 %", "90.50 %", "+2.50"],
    ]
    words = " ".join(seed_sentences(made))
    assert "+2.50 points of accuracy on average (90 % interval −0.66 to +5.66)" in words
    assert "Verdict: 2/2, better on every seed" in words
    assert "keeps 97.89 % of its teacher's accuracy" in words
    for text in (to_markdown(made), to_html(made)):
        assert "Paired seeds" in text
        assert "better on every seed" in text
        assert "on seed 7 alone" in text
    for text in (to_markdown(summary), to_html(summary)):
        assert "Paired seeds" not in text
        assert "on one seed" in text


@pytest.mark.parametrize("verdict", ["better", "no difference shown", "worse"])
def test_a_verdict_that_is_not_all_won_says_how_many(summary: RunSummary, verdict: str) -> None:
    assert f"Verdict: {verdict} (1 of 2 seeds better)" in seed_sentences(proof(summary, verdict=verdict, wins=1))[0]


def test_what_is_missing_is_said(summary: RunSummary) -> None:
    rows = (SeedRow(7, LOST, LOST, LOST, LOST), SeedRow(8, figure(0.9), figure(math.nan), figure(0.9), LOST))
    made = proof(summary, rows=rows, mean=None, low=None, high=None, verdict="nothing can be said: no pair", wins=0)
    assert seed_sentences(made) == [
        "2 paired seeds, fp32 files in the runtime of this-machine, on test: nothing can be said: no pair."
    ]
    assert seed_rows(made)[0][1] == "unavailable: it did not run"
    assert "was not finite" in json.loads(to_json(made))["paired_seeds"]["rows"][1]["twin_validation"]["reason"]


def test_a_perplexity_is_compared_by_its_logarithm(summary: RunSummary) -> None:
    rows = tuple(SeedRow(seed, *(figure(value, "perplexity") for value in (20, 21, 20, 22))) for seed in (0, 1))
    made = proof(summary, rows=rows, mean=math.log(1.1), low=0.09, high=0.1)
    made = dataclasses.replace(made, metric="perplexity")
    assert seed_rows(made)[0] == ["0", "20.00", "21.00", "20.00", "22.00", "+0.0953"]
    assert "+0.0953 of log-likelihood of a token" in seed_sentences(made)[0]
