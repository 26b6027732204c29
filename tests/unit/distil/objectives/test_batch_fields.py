"""Objectives that need more of a batch than the data brings are refused before anything runs."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from compressor.distil.terms import check, offered_fields  # noqa: E402
from compressor.recipe import DistilStage  # noqa: E402

pytestmark = pytest.mark.train


@pytest.mark.parametrize(
    ("table", "hint"),
    [
        ({"use": "list-kl", "options": {"teacher": "offline"}}, "`data.score`"),
        ({"use": "similarity", "options": {"pairs": True}}, "`data.text_pair`"),
        ({"use": "distillm2"}, "`rollouts` with `beside = true`"),
        ({"use": "alm"}, "further teacher with a tokenizer of its own"),
    ],
)
def test_fields_that_nothing_brings_are_a_problem_of_the_plan(table, hint):
    stage = DistilStage.model_validate({"kind": "distil", "objective": [table]})
    (problem,) = check(stage, {"logits": 1}, {"logits": 1}, "stage.0")
    assert str(problem.where) == "stage.0.objective.0.use"
    assert hint in problem.what


def test_stage_and_teachers_bring_fields():
    stage = {"kind": "distil", "objective": [{"use": "distillm2"}], "rollouts": {"beside": True}}
    config = DistilStage.model_validate(stage)
    assert offered_fields(config) == {"student_made"}
    assert check(config, {"logits": 1}, {"logits": 1}, fields=offered_fields(config)) == []


def test_what_the_data_has_is_no_problem():
    for name in ("dkd", "tsld", "margin-mse", "similarity", "contrastive", "uld"):
        stage = DistilStage.model_validate({"kind": "distil", "objective": [{"use": name}]})
        assert check(stage, {"logits": 1}, {"logits": 1}) == []
