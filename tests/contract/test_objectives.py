"""Every registered objective keeps the contract; a new one is tested for free."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from compressor.distil.objectives import registry  # noqa: E402
from compressor.distil.objectives.base import (  # noqa: E402
    Batch,
    ChangesStudent,
    Context,
    Objective,
    Seen,
    Step,
    Surveys,
)
from compressor.models.signals import SignalTap, available  # noqa: E402
from compressor.recipe import Match  # noqa: E402
from tests.unit.distil.toy import Sentences, Transformer, transformer  # noqa: E402

pytestmark = pytest.mark.train
NAMES = registry.names()
FIRST = Step(0, 1, 0)
# objectives whose least value is an entropy of the teacher: their gradient is 0 where the student is the teacher
ENTROPIES = {"soft-ce", "taid", "tsld", "alm"}
# objectives that measure no distance to the teacher: order, contrast, labels, or no teacher at all
NO_DISTANCE = {
    *("nkd", "plackett-luce", "sinkhorn", "rank-net", "dpkd", "contrastive"),
    *("self-ensemble", "adaptive-margin", "additive-margin", "masked-tokens"),
    *("lelp", "dual-head", "auxiliary-head", "norm-direction", "multi-exit"),  # heads and class means of their own
    *("homomorphic-projection", "ladder", "task-aware-filters"),  # new projections even between equal widths
}
OPTIONS = {"homomorphic-projection": {"size": 2, "keep": False}}


class Recorder(dict):
    """Signals that remember which of them were read."""

    def __init__(self, signals):
        super().__init__(signals)
        self.read = set()

    def __getitem__(self, name):
        self.read.add(name)
        return super().__getitem__(name)


class Tagger(Transformer):
    """One distribution a token."""

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, attention_mask)
        return self.head(x)


def tagger(layers, seed, width=16):
    torch.manual_seed(seed)
    return Tagger(layers, width, 2, classes=5).eval()


def inputs():
    made = Sentences("train", 6, 1).batch(range(6))
    return {name: torch.from_numpy(array) for name, array in made.items()}


def classes(mask):
    return Batch(torch.tensor([0, 1, 1, 0, 1, 0]), mask)


def tokens(mask):
    labels = torch.randint(0, 5, mask.shape, generator=torch.Generator().manual_seed(3))
    ends = torch.arange(1, mask.shape[1] + 1).expand(len(mask), -1)
    return Batch(labels, mask, ends=ends, student_made=torch.tensor([False, True] * 3))


def hiding(mask):
    return Batch(None, mask, masked=torch.where((mask != 0) & (torch.arange(mask.shape[1]) % 3 == 1), 7, -100))


def several_labels(mask):
    return Batch(torch.ones_like(mask, dtype=torch.float32), mask)  # one label a place of the hidden states


def pairs(mask):
    return Batch(None, mask, groups=torch.tensor([0, 0, 1, 1, 2, 2]))


def triples(mask):
    return Batch(None, mask, groups=torch.tensor([0, 0, 0, 1, 1, 1]))


SCENES = {
    **dict.fromkeys(("tsld", "distillm2", "alm", "uld", "vocab-match", "vocab-map"), (tagger, tokens)),
    "label-embedding": (transformer, several_labels),
    "masked-tokens": (transformer, hiding),
    "additive-margin": (transformer, pairs),
    "adaptive-margin": (transformer, triples),
}


def scene(name):
    """What makes a model, and what makes a batch from its mask."""
    return SCENES.get(name, (transformer, classes))


def bound(name, student, teacher, match=None):
    loaded = registry.get(name)
    objective = loaded(loaded.Options.model_validate(OPTIONS.get(name, {})), match)
    assert isinstance(objective, Objective)
    assert objective.bind(available(student), available(teacher)) == []
    if isinstance(objective, ChangesStudent):
        assert objective.unfit(student) == []
        objective.install(student, inputs())
    return objective


def signals(name, objective, student, teacher):
    batch = inputs()
    with SignalTap(student, objective.needs.student) as tap:
        own = tap(batch)
    with SignalTap(teacher, objective.needs.teacher) as tap, torch.no_grad():
        other = tap(batch)
    return own, other, scene(name)[1](batch["attention_mask"])


def prepared(objective, own, other, batch):
    """Parts made, and the training set (one batch) surveyed."""
    generator = torch.Generator().manual_seed(0)
    classes = own["logits"].shape[-1] if "logits" in own else 2
    with torch.no_grad():
        objective.prepare(Context(own, other, generator, "cpu", classes))
    if isinstance(objective, Surveys):
        assert objective.needs.training_pass
        still = {name: signal.detach() for name, signal in own.items()}
        objective.survey(lambda student: iter([Seen(other, still if student else {}, batch, range(6))]), generator)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NO_DISTANCE])
def test_zero_when_student_is_teacher(name):
    model = scene(name)[0](2, seed=0)
    objective = bound(name, model, model)
    own, other, batch = signals(name, objective, model, model)
    prepared(objective, own, other, batch)
    if name in ENTROPIES:
        own = {"logits": own["logits"].detach().requires_grad_()}
        objective(own, other, batch, FIRST).sum.backward()
        assert float(own["logits"].grad.abs().max()) < 1e-5
        return
    term = objective(own, other, batch, FIRST)
    assert float((term.sum / term.count).detach()) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_flow_into_the_student_and_projectors_only(name):
    made = scene(name)[0]
    student, teacher = made(2, seed=1, width=8), made(4, seed=2)
    objective = bound(name, student, teacher, Match(proj="linear") if name == "squarehead" else None)
    own, other, batch = signals(name, objective, student, teacher)
    prepared(objective, own, other, batch)
    term = objective(own, other, batch, FIRST)
    assert term.sum.dim() == 0
    assert float(term.sum.detach()) > 0
    assert not (isinstance(term.count, torch.Tensor) and term.count.requires_grad)
    assert not any(value.requires_grad for value in term.logs.values())
    term.sum.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in objective.parameters())


def differing(name):
    """An objective with its signals of two different models."""
    made = scene(name)[0]
    student, teacher = made(2, seed=1), made(4, seed=2)
    objective = bound(name, student, teacher)
    own, other, batch = signals(name, objective, student, teacher)
    prepared(objective, own, other, batch)
    return objective, own, other, batch


@pytest.mark.parametrize("name", NAMES)
def test_declared_needs_are_the_used_ones(name):
    objective, own, other, batch = differing(name)
    student, taught = Recorder(own), Recorder(other)
    declared = {"labels": None, "mask": None} | {field: getattr(batch, field) for field in objective.needs.batch}
    with torch.no_grad():
        term = objective(student, taught, Batch(**declared), FIRST)
        assert student.read == objective.needs.student
        assert taught.read == objective.needs.teacher
        again = differing(name)[0](own, other, batch, FIRST)  # a fresh one: some have a memory
    assert float(term.sum) == float(again.sum)


@pytest.mark.parametrize("name", NAMES)
def test_sums_of_two_halves_are_the_whole_unless_declared_batch_wise(name):
    objective, own, other, batch = differing(name)
    if objective.needs.batch_wise:
        pytest.skip("declared batch-wise")

    def part(rows):
        def cut(found):
            return {key: value[:, rows] if key.startswith("qkv") else value[rows] for key, value in found.items()}

        given = {field: value for field, value in vars(batch).items() if value is not None}
        halves = {"labels": None, "mask": None} | {field: value[rows] for field, value in given.items()}
        return objective(cut(own), cut(other), Batch(**halves), FIRST)

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
