"""Every registered objective keeps the contract; a new one is tested for free."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from compressor.distil.objectives import registry  # noqa: E402
from compressor.distil.objectives.base import Batch, Context, Objective, Step  # noqa: E402
from compressor.models.signals import SignalTap, available  # noqa: E402
from tests.unit.distil.toy import Sentences, transformer  # noqa: E402

pytestmark = pytest.mark.train
NAMES = registry.names()


class Recorder(dict):
    """Signals that remember which of them were read."""

    def __init__(self, signals):
        super().__init__(signals)
        self.read = set()

    def __getitem__(self, name):
        self.read.add(name)
        return super().__getitem__(name)


def inputs():
    made = Sentences("train", 6, 1).batch(range(6))
    return {name: torch.from_numpy(array) for name, array in made.items()}


def bound(name, student, teacher):
    objective = registry.get(name)()
    assert isinstance(objective, Objective)
    assert objective.bind(available(student), available(teacher)) == []
    return objective


def signals(objective, student, teacher):
    batch = inputs()
    with SignalTap(student, objective.needs.student) as tap:
        own = tap(batch)
    with SignalTap(teacher, objective.needs.teacher) as tap, torch.no_grad():
        other = tap(batch)
    return own, other, Batch(torch.zeros(6, dtype=torch.int64), batch["attention_mask"])


def prepared(objective, own, other):
    with torch.no_grad():
        objective.prepare(Context(own, other, torch.Generator().manual_seed(0), "cpu"))


@pytest.mark.parametrize("name", NAMES)
def test_zero_when_student_is_teacher(name):
    model = transformer(2, seed=0)
    objective = bound(name, model, model)
    own, other, batch = signals(objective, model, model)
    prepared(objective, own, other)
    term = objective(own, other, batch, Step(0, 1, 0))
    value = float((term.sum / term.count).detach())
    if name == "soft-ce":  # its minimum is the teacher's entropy
        p = torch.softmax(other["logits"], -1)
        assert value == pytest.approx(float(-(p * p.log()).sum(-1).mean()), rel=1e-5)
    else:
        assert value == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_flow_into_the_student_and_projectors_only(name):
    student, teacher = transformer(2, seed=1, width=8), transformer(4, seed=2)
    objective = registry.get(name)(None, None if name != "squarehead" else linear())
    assert objective.bind(available(student), available(teacher)) == []
    own, other, batch = signals(objective, student, teacher)
    prepared(objective, own, other)
    term = objective(own, other, batch, Step(0, 1, 0))
    assert term.sum.dim() == 0
    assert float(term.sum.detach()) > 0
    assert not (isinstance(term.count, torch.Tensor) and term.count.requires_grad)
    assert not any(value.requires_grad for value in term.logs.values())
    term.sum.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in objective.parameters())


def linear():
    from compressor.recipe import Match

    return Match(proj="linear")


@pytest.mark.parametrize("name", NAMES)
def test_declared_needs_are_the_used_ones(name):
    model, teacher = transformer(2, seed=1), transformer(4, seed=2)
    objective = bound(name, model, teacher)
    own, other, batch = signals(objective, model, teacher)
    prepared(objective, own, other)
    student, taught = Recorder(own), Recorder(other)
    objective(student, taught, batch, Step(0, 1, 0))
    assert student.read == objective.needs.student
    assert taught.read == objective.needs.teacher


@pytest.mark.parametrize("name", NAMES)
def test_sums_of_two_halves_are_the_whole_unless_declared_batch_wise(name):
    model, teacher = transformer(2, seed=1), transformer(4, seed=2)
    objective = bound(name, model, teacher)
    if objective.needs.batch_wise:
        pytest.skip("declared batch-wise")
    own, other, batch = signals(objective, model, teacher)
    prepared(objective, own, other)

    def part(rows):
        def cut(found):
            return {key: value[:, rows] if key.startswith("qkv") else value[rows] for key, value in found.items()}

        return objective(cut(own), cut(other), Batch(batch.labels[rows], batch.mask[rows]), Step(0, 1, 0))

    whole, first, second = part(slice(0, 6)), part(slice(0, 2)), part(slice(2, 6))
    assert float(first.sum + second.sum) == pytest.approx(float(whole.sum), rel=1e-4)
    assert float(first.count) + float(second.count) == float(whole.count)


@pytest.mark.parametrize("name", NAMES)
def test_documentation_names_formula_shapes_paper_defaults_and_a_worked_number(name):
    text = registry.describe(name).text
    missing = [
        word for word in ("Formula:", "Shapes:", "Paper:", "Defaults:", "When:", "Worked number:") if word not in text
    ]
    assert not missing
