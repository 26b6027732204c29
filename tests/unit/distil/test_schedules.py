"""Schedules as data: their ends are exact, feedback reacts, wrong tables are named."""

from __future__ import annotations

import pytest

from compressor.config import validate
from compressor.distil.schedules import Courses, moved, value_at
from compressor.errors import ConfigError
from compressor.recipe import DistilStage, Recipe
from compressor.schedule import Schedule


def schedule(**fields):
    return Schedule.model_validate(fields)


def course(total=101, **fields):
    return [value_at(schedule(**fields), step, total) for step in range(total)]


def test_both_ends_are_exact_and_the_middle_is_known():
    linear, cosine = course(kind="linear"), course(kind="cosine")
    assert (linear[0], linear[50], linear[100]) == (1.0, 0.5, 0.0)
    assert (cosine[0], cosine[100]) == (1.0, 0.0)
    assert cosine[50] == pytest.approx(0.5)
    assert cosine[25] == pytest.approx(0.853553, abs=1e-6)
    warm = course(kind="warmup", to=2.0)
    assert (warm[0], warm[5], warm[10], warm[100]) == (0.0, pytest.approx(1.0), 2.0, 2.0)
    late = course(kind="linear", start=0.5, end=0.75, **{"from": 4.0, "to": 1.0})
    assert (late[50], late[75], late[100]) == (4.0, 1.0, 1.0)
    jump = course(kind="step", start=0.3, **{"from": 1.0, "to": 0.2})
    assert jump[29] == 1.0
    assert jump[30] == 0.2
    assert set(course(kind="constant", **{"from": 0.7})) == {0.7}


def test_a_number_stays_a_number_and_one_step_is_the_start():
    assert value_at(0.3, 7, 10) == 0.3
    assert value_at(schedule(kind="linear"), 0, 1) == 1.0


def test_feedback_moves_by_its_step_and_stops_at_its_end():
    rising = schedule(kind="feedback", watch="loss", by=0.1, by_more_than=0.05, **{"from": 0.0, "to": 0.25})
    assert moved(rising, 0.0, 1.0, 1.04) == 0.0
    assert moved(rising, 0.0, 1.0, 1.06) == pytest.approx(0.1)
    assert moved(rising, 0.2, 1.0, 2.0) == 0.25
    assert moved(rising, 0.2, 2.0, 1.0) == 0.2
    falling = schedule(kind="feedback", when="falls", by=0.5, **{"from": 1.0, "to": 0.2})
    assert moved(falling, 1.0, 0.9, 0.8) == 0.5
    assert moved(falling, 0.5, 0.9, 0.8) == 0.2
    assert moved(rising, 0.1, float("nan"), 1.0) == 0.1  # the first epoch has nothing to compare with


def test_feedback_state_is_what_the_checkpoint_keeps():
    label = schedule(kind="feedback", watch="score", when="falls", **{"from": 0.1, "to": 1.0})
    courses, state = Courses(label, [], ["labels"]), {}
    assert courses.apply(0, 10, state) == [0.1]
    for score in (0.5, 0.4, 0.6, 0.3):
        courses.observe({"score": score, "loss": 1.0}, state)
    assert state == {"labels.weight": [pytest.approx(0.3), 0.3]}
    assert courses.apply(5, 10, dict(state)) == [pytest.approx(0.3)]
    assert courses.values(5, 10, state) == {"labels.weight": pytest.approx(0.3)}


def test_schedules_survive_the_way_through_a_file():
    stage = DistilStage.model_validate(
        {"kind": "distil", "labels": {"kind": "linear", "from": 0, "to": 1}, "objective": [
            {"use": "kd", "weight": {"kind": "cosine"}, "options": {"temperature": {"kind": "linear", "from": 4}}}]}
    )  # fmt: skip
    for dump in (stage.model_dump(mode="json"), stage.model_dump(mode="json", exclude_none=True, exclude_unset=True)):
        assert DistilStage.model_validate(dump) == stage
    assert stage.model_dump(mode="json")["labels"]["from"] == 0.0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"labels": {"kind": "linear", "form": 1}}, "did you mean `from`"),
        ({"labels": -0.1}, "must be at least 0"),
        ({"labels": {"kind": "linear", "to": -1}}, "must be at least 0"),
        ({"labels": {"kind": "linear", "start": 0.9, "end": 0.1}}, "`start` must not come after `end`"),
        ({"objective": [{"use": "kd", "weight": 0}]}, "must be greater than 0"),
        ({"objective": [{"use": "kd", "weight": {"kind": "constant", "from": 0}}]}, "must be greater than 0"),
        ({"strategy": [{"use": "filter"}]}, "give either `threshold` or `keep`"),
        ({"strategy": [{"use": "filtr"}]}, "did you mean `filter`"),
        ({"strategy": [{"use": "select", "discrd": 0.5}]}, "did you mean `discard`"),
    ],
)
def test_wrong_tables_are_named(fields, words):
    with pytest.raises(ConfigError) as caught:
        validate(Recipe, {"stage": [{"kind": "distil", **fields}]}, "`bad.toml`")
    assert any(words in str(problem) for problem in caught.value.problems), caught.value.problems
