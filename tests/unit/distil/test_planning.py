"""What is found before anything runs: layer maps, checks, documentation."""

from __future__ import annotations

import subprocess
import sys

import pytest

from compressor.distil.objectives import registry
from compressor.distil.objectives.layers import layer_map, pairs
from compressor.errors import ConfigError
from compressor.recipe import DistilStage, Match

TEXT_STUDENT = {"logits": 1, "hidden": 4, "qkv": 3}
TEXT_TEACHER = {"logits": 1, "hidden": 7, "qkv": 6}


@pytest.mark.parametrize(
    ("student", "teacher", "kind", "expected"),
    [
        (3, 6, "uniform", [1, 3, 5]),
        (3, 6, "last", [3, 4, 5]),
        (3, 6, "skip", [0, 2, 4]),
        (4, 12, "uniform", [2, 5, 8, 11]),
        (6, 6, "uniform", [0, 1, 2, 3, 4, 5]),
        (4, 6, "uniform", [1, 2, 4, 5]),
        (3, 2, "uniform", [0, 1, 1]),
    ],
)
def test_layer_maps(student, teacher, kind, expected):
    assert layer_map(student, teacher, kind) == expected


def test_embeddings_of_transformers_teach_embeddings():
    found, problems = pairs(Match(), TEXT_STUDENT, TEXT_TEACHER)
    assert not problems
    assert [teacher for _, teacher in found] == ["hidden[0]", "hidden[2]", "hidden[4]", "hidden[6]"]


def test_negative_indices_become_positions():
    found, _ = pairs(Match(student="hidden[-1]", teacher="hidden[3]"), TEXT_STUDENT, TEXT_TEACHER)
    assert found == [("hidden[3]", "hidden[3]")]


@pytest.mark.parametrize(
    ("match", "words"),
    [
        (Match(student="hiden[i]"), "did you mean `hidden`"),
        (Match(student="hidden[9]", teacher="hidden[0]"), "`hidden[9]` does not exist"),
        (Match(student="hidden[0]", teacher="hidden[g(i)]"), "needs `[i]`"),
        (Match(student="qkv[i]", teacher="hidden[g(i)]"), "two families"),
        (Match(student="a.b.c", teacher="hidden[0]"), "is not a signal"),
    ],
)
def test_impossible_matches_are_named(match, words):
    found, problems = pairs(match, TEXT_STUDENT, TEXT_TEACHER)
    assert found == []
    assert any(words in problem for problem in problems), problems


def test_maps_that_need_a_deeper_teacher_say_so():
    assert "at least the student's 3" in pairs(Match(map="last"), {"hidden": 3}, {"hidden": 2})[1][0]


@pytest.mark.train
def test_check_lists_every_problem_with_its_place():
    pytest.importorskip("torch")
    from compressor.distil.terms import check

    stage = DistilStage.model_validate(
        {
            "kind": "distil",
            "objective": [
                {"use": "kdd"},
                {"use": "kd", "options": {"temperture": 2}},
                {"use": "jsd", "options": {"beta": 1.5}},
                {"use": "kd", "match": {}},
                {"use": "minilm-relations"},
                {"use": "hidden", "match": {"map": "last"}},
                {"use": "kd"},
            ],
        }
    )
    found = [
        str(problem) for problem in check(stage, {"logits": 1, "hidden": 4}, {"logits": 1, "hidden": 2}, "stage.1")
    ]
    assert found == [
        "stage.1.objective.0.use: unknown objective `kdd`; did you mean `kd`?",
        "stage.1.objective.1.options.temperture: unknown key; did you mean `temperature`?",
        "stage.1.objective.2.options.beta: must be at most 1.0",
        "stage.1.objective.3.match: `kd` takes no match",
        "stage.1.objective.4.use: the student has no `qkv` signals; one of hidden, logits",
        "stage.1.objective.4.use: the teacher has no `qkv` signals; one of hidden, logits",
        "stage.1.objective.5.match: the map `last` needs a teacher with at least the student's 4 layers, not 2",
    ]


@pytest.mark.train
def test_a_stage_that_learns_from_nothing_is_a_problem():
    pytest.importorskip("torch")
    from compressor.distil.terms import check

    (problem,) = check(DistilStage(kind="distil", labels=0, objective=()), {"logits": 1}, {"logits": 1})
    assert problem.where == "distil.labels"


def test_unknown_names_get_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean `rkd-distance`"):
        registry.describe("rkd-distanc")


def test_names_and_descriptions_need_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from compressor.distil.objectives import registry\n"
        "print(*(registry.describe(name).summary for name in registry.names()), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == len(registry.names())


def test_options_are_documented_with_their_defaults():
    assert registry.describe("kd").options == (("temperature", "Positive", "2.0"),)
    assert registry.describe("reverse-kl").options == (("temperature", "Positive", "1.0"),)
    assert registry.describe("hidden").options == ()
