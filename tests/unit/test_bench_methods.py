"""The bench of the methods: what its verdicts say, that its rows are valid recipes, and that scores are kept."""

from __future__ import annotations

import pytest

from compressor.distil.objectives import registry
from compressor.distil.probes.paired import interval, verdict
from compressor.recipe import DistilStage
from tools.bench_methods import rows, text_rows
from tools.bench_methods.arms import LABELS, Arm, Row
from tools.bench_methods.store import Store

ROWS = {**rows.robust(), **text_rows.rows(), **rows.proposals()}


@pytest.mark.parametrize(
    ("differences", "said"),
    [
        ([0.1, 0.2, 3.0, 0.1, 0.4], "5/5"),
        ([1.0, 1.1, 0.9, 1.0, -0.1], "better"),
        ([1.0, -1.0, 0.5, -0.4, 0.1], "no difference shown"),
        ([-1.0, -1.1, -0.9, -1.0, 0.1], "worse"),
        ([-9.0, -0.1, -0.1, -0.1, -0.1], "worse"),  # every seed loses
        ([0.0, 0.0, 0.0, 0.0, 0.0], "no difference shown"),
    ],
)
def test_what_five_seeds_allow_to_say(differences, said):
    assert verdict(differences) == said


def test_the_interval_is_students():
    from scipy import stats

    values = [1.0, 2.5, 0.5, 1.5, 2.0]
    mean, error = sum(values) / 5, stats.sem(values)
    assert interval(values) == pytest.approx(stats.t.interval(0.9, 4, mean, error), abs=1e-3)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_both_sides_of_a_row_are_stages_of_known_objectives(name):
    for arm in ROWS[name].arms:
        keys = {"kind": "distil", **arm.stage}
        stage = DistilStage.model_validate(keys)
        assert {item.use for item in stage.objective} <= set(registry.names())
        assert bool(stage.objective or stage.strategy) == bool(arm.teacher)


def test_the_robust_rows_are_all_there():
    """methods.md, section 6; ternary rows belong to quantization."""
    ids = {word for row in ROWS.values() if row.robust for word in row.ids.split()}
    assert ids == {"L1", "L4", "D3", "M1", "U1", "I1", "N3", "T11"}
    text = {word for row in text_rows.rows().values() for word in row.ids.split()}
    assert text == {"L1", "L4", "D3", "M1", "N3", "T11"}


def test_arms_differ_by_what_they_do_and_keep_their_scores(tmp_path):
    arm, other = Arm(500, LABELS), Arm(500, LABELS, steps=5)
    assert arm.key == Arm(500, dict(LABELS)).key != other.key
    Store(tmp_path / "s.json").put(arm, "seeds", "0", {"accuracy": 70.0})
    again = Store(tmp_path / "s.json")
    assert again.get(arm, "seeds", "0") == {"accuracy": 70.0}
    assert again.get(arm, "seeds", "1") is None
    assert again.get(other, "seeds", "0") is None


@pytest.mark.train
def test_a_finished_row_is_printed_without_training_anything(tmp_path):
    pytest.importorskip("torch")
    from tools.bench_methods.lab import Lab
    from tools.bench_methods.page import measure

    store, sides = Store(tmp_path / "s.json"), (Arm(500, LABELS), Arm(2000, LABELS))
    for arm, score in zip(sides, (71.0, 70.0), strict=True):
        for rate in arm.rates:
            store.put(arm, "tuning", str(rate), {"validation": 100 * rate})
        for seed in range(5):
            store.put(arm, "seeds", str(seed), {"accuracy": score + seed + (seed == 4) * (score - 70)})
    lab = Lab(None, store, tmp_path, print)  # type: ignore[arg-type]  # no fixture: nothing may be trained
    line = measure("more", Row("less > more", *sides, ids="L1"), lab, 5)
    assert line.won
    assert "| 73.20 | 72.00 | +1.20 | 5/5 | +0.77 to +1.63 | 5/5 | 0.01, 0.01 |" in line.text
