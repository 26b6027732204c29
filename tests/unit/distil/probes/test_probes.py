"""The checks that look on: power, canary, teacher hacking, label smoothing."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from compressor.distil.probes.canary import canary
from compressor.distil.probes.hacking import Curves, HackingMonitor, departure, divergences, judge
from compressor.distil.probes.power import power_statement, smallest_difference
from compressor.distil.probes.smoothing import smoothing_warnings
from compressor.recipe import Recipe


def test_the_smallest_difference_solves_mcnemars_equation() -> None:
    for samples, d in ((10_000, 0.1), (360, 0.05), (500, 0.4)):
        delta = smallest_difference(samples, d)
        assert delta * math.sqrt(samples) == pytest.approx(1.959964 * math.sqrt(d) + 0.841621 * math.sqrt(d - delta**2))
    assert smallest_difference(10_000, 0.1) < smallest_difference(1_000, 0.1) < smallest_difference(1_000, 0.3)
    assert smallest_difference(2, 0.1) == 1.0


def test_the_power_is_what_it_says() -> None:
    random = np.random.default_rng(0)
    samples, d = 1000, 0.1
    delta = smallest_difference(samples, d)
    wins = random.multinomial(samples, [(d + delta) / 2, (d - delta) / 2, 1 - d], size=4000)
    z = (wins[:, 0] - wins[:, 1]) / np.sqrt(wins[:, 0] + wins[:, 1])
    assert float(np.mean(np.abs(z) > 1.96)) == pytest.approx(0.8, abs=0.03)


def test_the_statement_names_samples_points_and_seeds() -> None:
    text = power_statement(10_000, 0.10, estimated=False)
    assert "0.89 points" in text
    assert "one seed" in text
    assert "5 paired seeds" in text
    assert "paired seeds" not in power_statement(10_000, 0.10, estimated=False, seeds=5)


def test_the_canary_sings_for_a_laundered_benchmark_and_rarely_otherwise() -> None:
    assert canary(0.95, 1000, 0.80, 1000).alarm
    assert not canary(0.80, 1000, 0.95, 1000).alarm
    assert not canary(1.0, 50, 1.0, 50).alarm
    random = np.random.default_rng(0)
    pairs = random.binomial(500, 0.85, (4000, 2)) / 500
    assert np.mean([canary(a, 500, b, 500).alarm for a, b in pairs]) < 0.005


def test_hacking_is_a_falling_proxy_with_a_rising_golden() -> None:
    falling = tuple(1.0 / (i + 1) for i in range(10))
    honest = judge(Curves(falling, tuple(2.0 - 0.1 * i for i in range(10))))
    assert not honest.alarm
    turned = judge(Curves(falling, (1.0, 0.8, 0.7, 0.6, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8)))
    assert turned.alarm
    assert turned.epoch == 6
    both_rise = judge(Curves((1.0, 0.5, 0.4, 0.3, 0.35, 0.4, 0.45), (1.0, 0.9, 0.8, 0.7, 0.75, 0.8, 0.85)))
    assert not both_rise.alarm
    assert "not judged" in judge(Curves((1.0, 0.9), (1.0, 0.9))).text


def test_a_power_law_is_left_where_it_bends() -> None:
    law = np.arange(1, 13) ** -0.7
    assert departure(law) is None
    bent = law.copy()
    bent[9:] *= 0.5
    assert departure(bent) == 10


def test_divergences_are_zero_for_the_teacher_itself() -> None:
    logits = np.array([[2.0, 1, 0, -1], [0, 3, 1, -2], [1, 1, 2, 0]])
    other = np.array([[1.0, 0, 0.5, -0.5], [0.5, 1, 0, 0], [0, 2, 1, -1]])
    proxy, golden = divergences(logits, logits, np.array([0, 1, 2]))
    assert proxy == pytest.approx(0)
    assert divergences(logits, other, np.array([0, 1, 2]))[0] == pytest.approx(0.341269, abs=1e-6)
    assert golden > 0


def test_the_monitor_outlives_a_kill(tmp_path) -> None:
    path, labels = tmp_path / "divergences.json", np.array([0, 1])
    teacher = np.array([[3.0, 0], [0, 3.0]])
    first = HackingMonitor(path, teacher, labels)
    for epoch in range(3):
        first.observe(teacher * (epoch + 1) / 4)
        first.on_event("epoch", {"epoch": epoch})
    again = HackingMonitor(path, teacher, labels)
    again.observe(teacher)
    again.on_event("progress", {"step": 1})
    again.on_event("epoch", {"epoch": 3})
    assert len(again.curves.proxy) == 4
    assert again.curves.proxy[-1] == pytest.approx(0)
    assert json.loads(again.text())["verdict"]["alarm"] is False


def stage(**options: object) -> dict[str, object]:
    return {"kind": "distil", "objective": [{"use": "kd", "options": options}]}


@pytest.mark.parametrize(
    ("smoothing", "options", "warns"),
    [(0.1, {"temperature": 2.0}, True), (0.1, {}, True), (0.1, {"temperature": 1.0}, False), (None, {}, False),
     (0.0, {"temperature": 4.0}, False)],
)  # fmt: skip
def test_the_lint_fires_for_smoothing_and_a_high_temperature_only(smoothing, options, warns) -> None:
    recipe = Recipe.model_validate({"teacher": {"label_smoothing": smoothing}, "stage": [stage(**options)]})
    found = smoothing_warnings(recipe, lambda use: {"temperature": "2.0"})
    assert bool(found) == warns


def test_the_lint_looks_at_every_teacher() -> None:
    more = [{"name": "second", "model": "x.onnx", "label_smoothing": 0.1}]
    recipe = Recipe.model_validate({"teacher": {"more": more}, "stage": [stage(temperature=4.0)]})
    assert "`second`" in smoothing_warnings(recipe, lambda use: {})[0]
