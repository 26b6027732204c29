"""Searches for a student before anything is trained: the score of DisWOT, the space, the evolution, the outcome."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from compressor.budgets import search_problems  # noqa: E402
from compressor.errors import ConfigError, StageError  # noqa: E402
from compressor.models.cost import count_macs, count_parameters  # noqa: E402
from compressor.models.factory import build  # noqa: E402
from compressor.models.rebuild import load_student, save_student  # noqa: E402
from compressor.profile import load_profile  # noqa: E402
from compressor.recipe import Recipe, StudentStage  # noqa: E402
from compressor.search import Candidate, Search, Space, SuperNet, corners  # noqa: E402
from compressor.students import candidate, check, make_student  # noqa: E402
from compressor.students.search import Builder, Outcome, choose, stage_of  # noqa: E402
from compressor.students.search.diswot import (  # noqa: E402
    Judge,
    Score,
    labels_for,
    maps_loss,
    redraw,
    same_width,
    samples_loss,
)
from compressor.students.search.evolve import Tried, look_at  # noqa: E402
from tests.unit.students.nets import pictures  # noqa: E402
from tests.unit.students.test_make_student import Text  # noqa: E402

pytestmark = pytest.mark.train
ENTRY = "tests.unit.students.nets:net"


def searching(space: dict[str, Any], budget: dict[str, Any], **keys: Any) -> StudentStage:
    return StudentStage.model_validate({"kind": "student", "search": {"space": space, "budget": budget, **keys}})


@pytest.fixture
def teacher() -> nn.Module:
    torch.manual_seed(0)
    return build(ENTRY)


def test_the_losses_are_those_of_the_formulas() -> None:
    torch.manual_seed(1)
    student, other = torch.randn(3, 5).double(), torch.randn(3, 5).double()
    student[0, 2] = 0  # a channel without a gradient correlates with nothing
    maps = [nn.functional.normalize(g[:, :, None] @ g[:, None, :], dim=2) for g in (student, other)]
    assert maps_loss(student, other) == pytest.approx(float((maps[0] - maps[1]).square().sum()) / 15, abs=1e-9)
    # two samples, features [1, 0], [1, 1] against [1, 0], [0, 1]: rows [1, 1], [1, 2] against the identity
    a, b = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.eye(2)
    rows = ((0.5**0.5 - 1) ** 2 + 0.5) + (0.2 + (2 * 0.2**0.5 - 1) ** 2)
    assert samples_loss(a, b) == pytest.approx(rows / 4)
    assert maps_loss(student, 3 * student) == pytest.approx(0.0, abs=1e-9)
    assert samples_loss(torch.randn(6, 4), torch.randn(6, 9)) > 0  # widths need not agree


def test_unequal_widths_are_padded_or_projected() -> None:
    narrow, wide = torch.ones(2, 3), torch.randn(2, 5)
    padded = same_width(narrow, wide, "pad", 0)
    assert torch.equal(padded[0][:, 3:], torch.zeros(2, 2))
    assert torch.equal(padded[1], wide)
    projected = same_width(narrow, wide, "project", 0)
    assert torch.equal(projected[0], narrow)
    assert projected[1].shape == (2, 3)
    assert torch.equal(projected[1], same_width(narrow, wide, "project", 0)[1])


def test_the_same_network_scores_zero_and_the_terms_add_up(teacher: nn.Module) -> None:
    batch, labels = pictures()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    space = {"width": (0.5, 1.0)}
    judges = {
        terms: Judge(teacher, batch, labels, searching(space, {"macs": 1}, terms=terms, draws=2).search)
        for terms in (("ickd", "sp"), ("ickd",), ("sp",))
    }
    assert judges["ickd", "sp"](copy.deepcopy(teacher)).value == pytest.approx(0, abs=1e-6)
    small = candidate(teacher, StudentStage(kind="student", width=0.5), batch)
    scores = [judge(copy.deepcopy(small)) for judge in judges.values()]
    assert scores[0].value == pytest.approx(scores[1].value + scores[2].value)
    assert all(score.value < -1e-3 for score in scores)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in teacher.parameters())


def test_weights_are_gaussian_by_their_inputs() -> None:
    layer, norm = nn.Linear(200, 300), nn.LayerNorm(7)
    redraw(nn.Sequential(layer, norm), 3)
    assert float(layer.weight.std()) == pytest.approx((2 / 200) ** 0.5, rel=0.02)
    assert torch.equal(norm.weight, torch.ones(7))
    assert not layer.bias.any()


def test_labels_come_from_the_data_or_from_the_teacher() -> None:
    outputs = torch.tensor([[0.0, 2.0], [3.0, 1.0]])
    assert labels_for(outputs, torch.tensor([0, 0])).tolist() == [0, 0]
    assert labels_for(outputs, torch.tensor([0, -100])).tolist() == [1, 0]
    assert labels_for(outputs, None).tolist() == [1, 0]
    assert labels_for(outputs, torch.full((2, 2), -100.0)).tolist() == [[0, 1], [1, 1]]


def test_a_space_counts_its_candidates_and_knows_the_smallest() -> None:
    space = Space(keep_layers=((0, 2), 3), width=(1.0, 0.5), factory={"depth": (2, 4), "norm": ("batch", "layer")})
    found = list(space.candidates())
    assert len(found) == space.size == 16
    assert [space.at(number) for number in range(16)] == found
    assert [each["factory.norm"] for each in corners(space)] == ["batch", "layer"]
    assert all(each["width"] == 0.5 and each["factory.depth"] == 2 for each in corners(space))
    whole = Search(space=space, budget={"macs": 1})
    assert Search.model_validate(whole.model_dump(mode="json")) == whole  # as processes tell each other


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"space": {}}, "empty"),
        ({"space": {"width": [0.5]}}, "empty"),
        ({"space": {"width": []}}, "empty"),
        ({"space": {"width": [0.5, 0.5]}}, "twice"),
        ({"budget": {}}, "give `macs`"),
        ({"terms": []}, "`terms` is empty"),
        ({"method": "grid", "space": {"factory": {"width": list(range(5000))}}}, "use `diswot`"),
    ],
)
def test_what_cannot_be_searched_is_an_error_of_the_recipe(keys: dict[str, Any], says: str) -> None:
    whole = {"space": {"width": [0.5, 1.0]}, "budget": {"macs": 10}, **keys}
    with pytest.raises(ValueError, match=says):
        Search.model_validate(whole)
    with pytest.raises(ValueError, match="given and searched"):
        StudentStage.model_validate(
            {"kind": "student", "width": 0.5, "search": {"space": {"width": [0.5, 1.0]}, "budget": {"macs": 1}}}
        )


def test_evolution_finds_what_a_grid_finds_with_fewer_looks_and_the_same_each_time() -> None:
    keys = {"width": tuple(n / 40 for n in range(1, 41)), "heads": tuple(range(1, 41))}
    looked: list[Candidate] = []

    def evaluate(each: Candidate) -> Tried:
        looked.append(each)
        cost = round(each["width"] * each["heads"] * 10)
        if cost > 120:
            return Tried(each, cost, 1, why="too much")
        return Tried(each, cost, 1, score=Score({"sp": abs(each["width"] - 0.6) * 40 + abs(each["heads"] - 17)}))

    grid = min(look_at(Search(method="grid", space=Space(**keys), budget={"macs": 1}), evaluate), key=lambda t: t.rank)
    assert len(looked) == 1600
    looked.clear()
    config = Search(space=Space(**keys), budget={"macs": 1}, population=16, generations=12, seed=3)
    best = min(look_at(config, evaluate), key=lambda t: t.rank)
    assert best.candidate == grid.candidate == {"width": 0.6, "heads": 17}
    assert len(looked) < 500
    assert len({str(each) for each in looked}) == len(looked)  # none twice
    again, first = list[Candidate](), list(looked)
    looked.clear()
    look_at(config, evaluate)
    again += looked
    assert again == first


def outcome(teacher: nn.Module, stage: StudentStage, cost: Any = None) -> Outcome:
    batch, labels = pictures()
    assert stage.search is not None
    build_ = Builder(teacher, stage, batch, candidate, cost)
    return choose(build_, Judge(teacher, batch, labels, stage.search), stage.search)


def test_the_factorys_grid_within_the_budget(teacher: nn.Module, tmp_path: Path) -> None:
    batch, _ = pictures()
    macs = {(w, d): count_macs(build(ENTRY).__class__(w, d), batch) for w in (2, 4, 8) for d in (2, 3)}
    limit = sorted(macs.values())[3]
    stage = searching({"factory": {"width": [2, 4, 8], "depth": [2, 3, 9]}}, {"macs": limit}, method="grid")
    assert check(teacher, batch, stage) == []
    found = outcome(teacher, stage)
    assert len(found.tried) == len(found.facts) == 9
    assert sum(fact.action == "scored" for fact in found.facts) == 3
    assert [fact.action for fact in found.facts].count("chosen") == 1
    assert sum("cannot be built" in fact.reason for fact in found.facts) == 3  # depth 9
    best = found.tried[0]
    assert best.macs <= limit
    assert best.score is not None
    assert best.score.value == max(each.score.value for each in found.tried if each.score is not None)
    made = make_student(teacher, found.chosen, batch, seed=5)
    assert count_parameters(made.module) == best.parameters
    save_student(tmp_path, made.module, made.record)
    again = load_student(tmp_path, teacher)
    assert torch.equal(again(**batch), made.module(**batch))
    assert json.loads((tmp_path / "record.json").read_text())[0]["op"] == "factory"
    assert json.dumps(found.as_json())


def test_latency_is_asked_for_once_a_shape_and_limits_too(teacher: nn.Module) -> None:
    asked: list[Any] = []

    def cost(shape: Any) -> float:
        asked.append(shape)
        return float(shape.outputs) / 100

    stage = searching({"width": [0.25, 0.5, 1.0]}, {"latency_ms": 0.35}, method="grid")
    found = outcome(teacher, stage, cost)
    assert len(asked) == len(set(asked))
    assert found.chosen.width == 0.5 or found.chosen.width == 0.25
    assert {each.candidate["width"]: each.latency_ms for each in found.tried} == {
        0.25: pytest.approx((2 + 4 + 8 + 4) / 100), 0.5: pytest.approx(0.32), 1.0: pytest.approx(0.60),
    }  # fmt: skip


def test_impossible_budgets_and_values_are_problems_of_the_plan(teacher: nn.Module) -> None:
    batch, _ = pictures()
    none = searching({"width": [0.5, 0.25]}, {"parameters": 3})
    (problem,) = check(teacher, batch, none)
    assert problem.where == "search.budget"
    assert "the smallest, width 0.25" in problem.what
    with pytest.raises(StageError, match="none of the 2 candidates"):
        outcome(teacher, none)
    (problem,) = check(teacher, batch, searching({"factory": {"widht": [1, 2]}}, {"macs": 10}))
    assert problem.where == "search.space.factory.widht"
    assert "did you mean `width`" in problem.what
    (problem,) = check(teacher, batch, searching({"keep_layers": [1, 2]}, {"macs": 10**9}))[:1]
    assert problem.where == "search.space.keep_layers.0"
    plain = StudentStage(kind="student", factory={"depth": 9})
    assert "too deep" in check(teacher, batch, plain)[0].what
    assert check(copy_without_factory(teacher), batch, plain)[0].what.startswith("needs a model of a factory")


def copy_without_factory(module: nn.Module) -> nn.Module:
    made = copy.deepcopy(module)
    del made._made_by
    return made


def test_latency_needs_this_machine_and_a_factory_the_first_place() -> None:
    stages = [
        {"kind": "prune", "ratio": 0.5},
        {"kind": "student", "search": {"space": {"factory": {"width": [1, 2]}}, "budget": {"latency_ms": 1.0}}},
    ]
    recipe = Recipe.model_validate({"stage": stages})
    found = [problem.where for problem in search_problems(recipe, load_profile("raspberry-pi-5"))]
    assert found == ["stage.1.student.search.budget.latency_ms", "stage.1.student.search.space.factory"]
    assert len(search_problems(recipe, load_profile("this-machine"))) == 1


def test_heads_and_neurons_by_count_and_a_search_over_a_transformer() -> None:
    torch.manual_seed(0)
    module = Text(2).eval()
    tokens: dict[str, Tensor] = {
        "input_ids": torch.arange(24).reshape(3, 8), "attention_mask": torch.ones(3, 8, dtype=torch.long),
    }  # fmt: skip
    made = make_student(module, StudentStage(kind="student", heads=3, neurons=20), tokens, seed=0, calibration=[tokens])
    layer = made.module.model.bert.encoder.layer[1]
    assert layer.attention.self.query.weight.shape == (24, 32)
    assert layer.intermediate.dense.weight.shape == (20, 32)
    assert made.module.model.bert.pooler.dense.weight.shape == (32, 32)  # is no feed-forward layer
    assert check(module, tokens, StudentStage(kind="student", heads=5))[0].what == "5 is more than the teacher's 4"
    space = {"keep_layers": [2, [1]], "hidden_size": [16], "heads": [2, 4], "neurons": [24]}
    stage = searching(space, {"parameters": 15_000})
    assert check(module, tokens, stage) == []
    build_ = Builder(module, stage, tokens, candidate, None)
    assert stage.search is not None
    found = choose(build_, Judge(module, tokens, torch.tensor([0, 1, 0]), stage.search), stage.search)
    chosen = make_student(module, found.chosen, tokens, seed=0, calibration=[tokens]).module
    assert count_parameters(chosen) == found.tried[0].parameters <= 15_000
    assert all(stage_of(stage, each.candidate).search is None for each in found.tried)


def test_a_supernet_is_a_space_with_a_budget() -> None:
    assert SuperNet(keep_layers=(2, 3), heads=(1, 2), budget={"macs": 5}).size == 4
    with pytest.raises(ValueError, match="empty"):
        SuperNet(budget={"macs": 5})
    with pytest.raises(ConfigError):
        build("tests.unit.students.nets:Net")
