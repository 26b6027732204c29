"""Objectives that need more of a batch than the data brings are refused before anything runs."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from compressor.distil.terms import check  # noqa: E402
from compressor.recipe import DistilStage  # noqa: E402

pytestmark = pytest.mark.train


@pytest.mark.parametrize(
    ("table", "fields"),
    [
        ({"use": "distillm2"}, "student_made"),
        ({"use": "alm"}, "ends"),
        ({"use": "list-kl", "options": {"teacher": "offline"}}, "scores"),
        ({"use": "similarity", "options": {"pairs": True}}, "groups"),
    ],
)
def test_fields_that_no_data_brings_are_a_problem_of_the_plan(table, fields):
    stage = DistilStage.model_validate({"kind": "distil", "objective": [table]})
    (problem,) = check(stage, {"logits": 1}, {"logits": 1}, "stage.0")
    assert str(problem.where) == "stage.0.objective.0.use"
    assert fields in problem.what
    assert "which no data brings yet" in problem.what


def test_what_the_data_has_is_no_problem():
    for name in ("dkd", "tsld", "margin-mse", "similarity", "contrastive", "uld"):
        stage = DistilStage.model_validate({"kind": "distil", "objective": [{"use": name}]})
        assert check(stage, {"logits": 1}, {"logits": 1}) == []
