"""Second exact checks of objectives that had one: identities and limits."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402

from compressor.distil.objectives.base import Batch, Context, Step  # noqa: E402
from compressor.distil.objectives.filters import TaskAwareFilters  # noqa: E402
from compressor.distil.objectives.heads import AuxiliaryHead  # noqa: E402
from compressor.distil.objectives.ladder import cosine_and_smooth  # noqa: E402
from compressor.distil.objectives.layerwise import Layerwise, alignment  # noqa: E402
from compressor.distil.objectives.prepared import NormDirection  # noqa: E402
from tests.unit.distil.objectives.cases import value  # noqa: E402
from tests.unit.distil.objectives.test_mechanism import drawn  # noqa: E402
from tests.unit.distil.objectives.test_prepared import over, ready  # noqa: E402

pytestmark = pytest.mark.train
FIRST = Step(0, 1, 0)


def number(term):
    return float((term.sum / term.count).detach())


def test_a_margin_is_taken_off_the_right_pairs_alone():
    vectors = drawn(1, 6, 4)
    batch = Batch(None, None, groups=torch.tensor([0, 0, 1, 1, 2, 2]))
    found = value("additive-margin", vectors, vectors, batch, {"margin": 0.2, "scale": 5.0})
    own, other = (F.normalize(vectors[start::2], dim=-1) for start in (0, 1))
    scores, target = 5.0 * (own @ other.T - 0.2 * torch.eye(3)), torch.arange(3)
    both = F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)
    assert found == pytest.approx(float(both), rel=1e-5)


def test_a_long_feature_is_judged_by_its_direction_alone():
    """Where the student's feature is longer than the teacher's, the value is 1 - cos to the class mean."""
    labels, teacher = torch.arange(6) % 3, {"pooled": drawn(2, 6, 4)}
    student = {"pooled": 50 * drawn(3, 6, 4)}
    objective = ready(NormDirection(), student, teacher, labels)
    means = torch.stack([teacher["pooled"][labels == k].mean(0) for k in range(3)])[labels]
    expected = 1 - F.cosine_similarity(student["pooled"], means).mean()
    assert number(objective(student, teacher, Batch(labels, None), FIRST)) == pytest.approx(float(expected), rel=1e-5)


def test_a_question_answered_with_certainty_costs_nothing():
    labels = torch.tensor([0, 1, 2])
    objective = ready(AuxiliaryHead(AuxiliaryHead.Options(answers="1 0 1")), {"pooled": torch.eye(3)}, {}, labels)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.copy_(torch.tensor([[50.0, -50, 50]]) if parameter.dim() == 2 else torch.zeros(1))
    assert number(objective({"pooled": torch.eye(3)}, {}, Batch(labels, None), FIRST)) == pytest.approx(0, abs=1e-6)


def test_the_ladder_is_zero_at_the_target_and_one_at_its_opposite():
    x = F.normalize(drawn(4, 5, 3), dim=-1)
    assert torch.allclose(cosine_and_smooth(x, x), torch.zeros(5), atol=1e-6)
    smooth = F.smooth_l1_loss(-x, x, reduction="none").mean(-1)
    assert torch.allclose(cosine_and_smooth(-x, x), 1 + smooth / 2, atol=1e-6)


def filtered():
    """Filters that learned a task, and the features of a model that teaches itself."""
    labels = torch.arange(8) % 2
    signals = {"hidden[0]": drawn(5, 8, 4)}
    objective = TaskAwareFilters(TaskAwareFilters.Options(size=3))
    assert objective.bind({"hidden": 1}, {"hidden": 1}) == []
    objective.prepare(Context(signals, signals, torch.Generator().manual_seed(0), "cpu", 2))
    objective.survey(over(signals, signals, labels), torch.Generator().manual_seed(0))
    return objective, objective._parts[0], signals


def test_what_is_compared_is_what_the_filters_let_through():
    objective, part, signals = filtered()
    by_hand = F.mse_loss(part.student(signals["hidden[0]"]), F.linear(signals["hidden[0]"], part.weight, part.bias))
    found = number(objective(signals, signals, Batch(None, None), FIRST))
    assert found == pytest.approx(float(by_hand.detach()), rel=1e-5)


def test_equal_filters_of_equal_features_give_zero():
    objective, part, signals = filtered()
    with torch.no_grad():
        part.student.weight.copy_(part.weight)
        part.student.bias.copy_(part.bias)
    assert number(objective(signals, signals, Batch(None, None), FIRST)) == 0


def test_layers_are_aligned_from_the_top_and_only_living_ones():
    """The worked number of `layerwise`, and its alignment with one layer gone."""
    layers = [[3.0, 3], [2, 2], [0, 0]]
    own = {f"hidden[{i}]": torch.tensor([[layer]]) for i, layer in enumerate([[9.0, 9], *layers])}
    teacher = {f"hidden[{i}]": torch.tensor([[layer]]) for i, layer in enumerate([[9.0, 9], [1, 1], [3, 3]])}
    objective = Layerwise(Layerwise.Options(layers=2))
    assert objective.bind({"hidden": 4, "qkv": 3}, {"hidden": 3, "qkv": 2}) == []
    objective.prepare(Context(own, teacher, torch.Generator().manual_seed(0), "cpu"))
    assert number(objective(own, teacher, Batch(None, torch.ones(1, 1)), FIRST)) == pytest.approx(4.0)
    assert alignment([[4.0, 1.0, 2.0], [9.0, 0.1, 0.5]], [True, False, True]) == [0, 2]
