"""Objectives with heads, prepared targets, exits, ladders and filters: golden values, identities, mechanism."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from compressor.distil.objectives.base import Batch, Context, Seen, Step  # noqa: E402
from compressor.distil.objectives.exits import MultiExit  # noqa: E402
from compressor.distil.objectives.filters import TaskAwareFilters  # noqa: E402
from compressor.distil.objectives.heads import AuxiliaryHead, DualHeadKd, SubclassEmbedding, tune_mixture  # noqa: E402
from compressor.distil.objectives.ladder import Ladder, cosine_and_smooth, kept_teachers  # noqa: E402
from compressor.distil.objectives.prepared import HomomorphicProjection, NormDirection  # noqa: E402
from compressor.models import heads, rebuild  # noqa: E402
from compressor.models.signals import SignalTap, available  # noqa: E402
from compressor.models.wrappers import Pooling, TextModel  # noqa: E402
from tests.unit.distil.toy import convnet, transformer  # noqa: E402

pytestmark = pytest.mark.train
T = torch.tensor([[2.0, 1, 0, -1], [0, 3, 1, -2], [1, 1, 2, 0]])
S = torch.tensor([[1, 0, 0.5, -0.5], [0.5, 1, 0, 0], [0, 2, 1, -1]])
FT = torch.tensor([[1.0, 0, 2], [0, 1, 1], [2, 2, 0]])
FS = torch.tensor([[1.0, 1, 1], [0, 2, 1], [1, 2, 1]])
LABELS = torch.tensor([0, 1, 2])
FIRST = Step(0, 1, 0)
PICTURE = {"image": torch.randn(4, 1, 12, 12, generator=torch.Generator().manual_seed(0))}


def over(teacher, student=None, labels=LABELS):
    return lambda own: iter(
        [Seen(teacher, (student or {}) if own else {}, Batch(labels, None), np.arange(len(labels)))]
    )


def ready(objective, student, teacher, labels=LABELS, classes=3):
    counts = [{name.split("[")[0]: 1 for name in side} | {"pooled": 1, "logits": 1} for side in (student, teacher)]
    assert objective.bind(*counts) == []
    generator = torch.Generator().manual_seed(0)
    objective.prepare(Context(student, teacher, generator, "cpu", classes))
    if hasattr(objective, "survey"):
        objective.survey(over(teacher, student, labels), generator)
    return objective


def value(term):
    return float((term.sum / term.count).detach())


def test_norm_direction_golden_and_unlabelled_rows_do_not_count():
    objective = ready(NormDirection(), {"pooled": FS}, {"pooled": FT})
    term = objective({"pooled": FS}, {"pooled": FT}, Batch(LABELS, None), FIRST)
    assert value(term) == pytest.approx(0.2337722337, abs=1e-5)
    some = objective({"pooled": FS}, {"pooled": FT}, Batch(torch.tensor([0, -100, 2]), None), FIRST)
    assert float(some.count) == 2


def test_lelp_with_one_subclass_is_kd_at_temperature_one():
    options = SubclassEmbedding.Options(subclasses=1)
    objective = ready(SubclassEmbedding(options), {"subclasses": S}, {"logits": T, "pooled": FT})
    term = objective({"subclasses": S}, {"logits": T, "pooled": FT}, Batch(LABELS, None), FIRST)
    assert value(term) == pytest.approx(0.3412687720, abs=1e-5)


def test_lelp_subclasses_split_a_class_where_the_classifier_does_not_look():
    """Four dimensions, the logits read the first two; class 0 falls in two clusters along the last."""
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(200, 4, generator=generator) * 0.1
    labels = torch.arange(200) % 2
    h[:, 0] += labels * 2.0 - 1
    h[:, 3] += torch.where(torch.arange(200) % 4 < 2, 2.0, -2.0)
    teacher = {"pooled": h, "logits": h[:, :2] @ torch.tensor([[-3.0, 3.0], [1.0, 0.0]])}
    objective = SubclassEmbedding(SubclassEmbedding.Options(subclasses=2))
    ready(objective, {"subclasses": torch.zeros(200, 4)}, teacher, labels, 2)
    first = objective._directions.weight[:, 0]
    assert torch.allclose(first[:, :2], torch.zeros(2, 2), atol=1e-3)  # away from what the classifier reads
    assert (first[:, 3].abs() > 5 * first[:, 2].abs()).all()
    targets = objective.targets(teacher).exp()
    assert torch.allclose(targets.unflatten(1, (2, 2)).sum(-1), teacher["logits"].softmax(-1), atol=1e-5)


def test_a_subclass_head_starts_as_the_head_it_replaces():
    model = convnet(3, 1)
    before = model(**PICTURE)
    steps = SubclassEmbedding().install(model, PICTURE)
    assert torch.allclose(model(**PICTURE), before, atol=1e-5)
    again = rebuild.replay(convnet(3, 1), steps)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(**PICTURE), model(**PICTURE))
    assert SubclassEmbedding().unfit(model) == []  # a second stage goes on with it
    assert "SubclassHead" in DualHeadKd().unfit(model)[0]


@pytest.mark.parametrize("objective", [SubclassEmbedding, DualHeadKd])
def test_a_head_is_rebuilt_behind_a_cut(objective):
    """As after a prune stage: the head's own input was cut in the same record."""
    cut = {"op": "cut", "tensor": "head.weight", "axis": 1, "keep": [[0, 8]]}
    model = rebuild.replay(convnet(3, 1), [cut])
    steps = objective().install(model, PICTURE)
    again = rebuild.replay(convnet(3, 1), [cut, *steps])
    assert {name: value.shape for name, value in again.state_dict().items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }


def test_dual_head_golden_and_fused_output_is_the_mixture():
    objective = DualHeadKd()
    assert objective.bind({"logits": 1}, {"logits": 1}) == []
    assert value(objective({"taught": S}, {"logits": T}, Batch(None, None), FIRST)) == pytest.approx(0.495474, abs=1e-5)
    mixed = heads.DualHead.mixed(S, T, torch.tensor(0.3), torch.tensor(2.0)).exp()
    assert torch.allclose(mixed, 0.3 * S.softmax(-1) + 0.7 * (T / 2).softmax(-1), atol=1e-6)
    assert torch.allclose(
        heads.DualHead.mixed(S, T, torch.tensor(1.0), torch.tensor(1.0)), S.log_softmax(-1), atol=1e-5
    )


def test_the_mixture_prefers_the_head_that_is_right():
    right, wrong = torch.eye(3) * 5, torch.eye(3).roll(1, 0) * 5
    student = {"labelled": wrong, "taught": right}
    a, b = tune_mixture(over({}, student))
    fused = heads.DualHead.mixed(wrong, right, torch.tensor(a), torch.tensor(b))
    assert (fused.argmax(-1) == LABELS).all()
    assert tune_mixture(over({}, student, torch.tensor([-100] * 3))) is None


def test_auxiliary_answers_by_class():
    objective = AuxiliaryHead(AuxiliaryHead.Options(answers="1 0 1"))
    ready(objective, {"pooled": FS}, {})
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.zero_()
    term = objective({"pooled": FS}, {}, Batch(torch.tensor([0, -100, 2]), None), FIRST)
    assert value(term) == pytest.approx(np.log(2), abs=1e-6)
    assert float(term.count) == 2


def test_homomorphic_projection_is_zero_at_the_projection_itself():
    options = HomomorphicProjection.Options(size=3, tanh=False, keep=False)
    objective = ready(HomomorphicProjection(options), {"pooled": FT}, {"logits": FT})
    components = objective._parts.components
    assert torch.allclose(components.T @ components, torch.eye(3), atol=1e-5)
    with torch.no_grad():
        objective._parts.dense.weight.copy_(components.T)
        objective._parts.dense.bias.zero_()
    term = objective({"pooled": FT}, {"logits": FT}, Batch(None, None), FIRST)
    assert value(term) == pytest.approx(0.0, abs=1e-6)


class Encoder(torch.nn.Module):
    """Token embeddings as a transformers model gives them."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(50, 6)

    def forward(self, input_ids, attention_mask):
        return type("Output", (), {"last_hidden_state": self.embed(input_ids)})()


def test_a_kept_projection_makes_the_embedding_narrower():
    model = TextModel(Encoder(), Pooling("mean")).eval()
    example = {"input_ids": torch.ones(2, 3, dtype=torch.int64), "attention_mask": torch.ones(2, 3, dtype=torch.int64)}
    objective = HomomorphicProjection(HomomorphicProjection.Options(size=4))
    steps = objective.install(model, example)
    assert model(**example).shape == (2, 4)
    with SignalTap(model, ["pooled", "projected"]) as tap:
        found = tap(example)
    assert found["pooled"].shape == (2, 6)
    assert found["projected"].shape == (2, 4)
    again = rebuild.replay(TextModel(Encoder(), Pooling("mean")).eval(), steps)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(**example), model(**example))
    assert objective.commit(model, steps, None).facts[0].after == "4 wide"


@pytest.mark.parametrize(("export", "shapes"), [("none", [(4, 4)]), ("outputs", [(4, 4)] * 2), ("exit", [(4, 4)])])
def test_exits_end_as_asked(export, shapes):
    model = convnet(3, 1)
    before = model(**PICTURE)
    objective = MultiExit(MultiExit.Options(export=export))
    counts = available(model)
    assert objective.bind(counts, counts) == []
    steps = objective.install(model, PICTURE)
    with SignalTap(model, sorted(objective.needs.student)) as tap:
        found = tap(PICTURE)
    assert torch.equal(found["logits"], before)
    assert available(model)["hidden"] == counts["hidden"]  # exits are no blocks
    done = objective.commit(model, steps, None)
    made = model(**PICTURE)
    made = made if isinstance(made, tuple) else (made,)
    assert [tuple(output.shape) for output in made] == shapes
    assert torch.equal(made[-1], found["exit[0]"] if export != "none" else before)
    again = rebuild.replay(convnet(3, 1), done.steps)
    again.load_state_dict(model.state_dict())
    repeated = again(**PICTURE)
    assert torch.equal((repeated if isinstance(repeated, tuple) else (repeated,))[-1], made[-1])


def test_exits_learn_from_the_next_deeper_one_and_hold_real_tokens():
    objective = MultiExit(MultiExit.Options(labels=0.0, blocks="0 1"))
    model = transformer(3, 0)
    assert objective.bind(available(model), {}) == []
    same = {"logits": T, "exit[0]": T, "exit[1]": T}
    assert value(objective(same, {}, Batch(None, None), FIRST)) == pytest.approx(0, abs=1e-7)
    assert MultiExit(MultiExit.Options(blocks="7")).bind(available(model), {})
    objective.install(model, (short := {"input_ids": torch.tensor([[1, 5, 2]]), "attention_mask": torch.ones(1, 3)}))
    long = {"input_ids": torch.tensor([[1, 5, 2, 0]]), "attention_mask": torch.tensor([[1.0, 1, 1, 0]])}
    with SignalTap(model, ["exit[0]"]) as tap, torch.no_grad():
        assert torch.allclose(tap(short)["exit[0]"], tap(long)["exit[0]"], atol=1e-5)


def test_ladder_golden_and_the_worst_teacher_always_counts():
    assert float(cosine_and_smooth(FS, FT).mean()) == pytest.approx(0.2073379937, abs=1e-5)
    losses = torch.tensor([[1.0, 0.1, 3.0], [0.5, 0.4, 0.2]]).repeat(1, 200)
    kept = kept_teachers(losses, 0.5, 7)
    assert (kept.gather(0, losses.argmax(0, keepdim=True)) == 1).all()
    assert 0.35 < float(kept.gather(0, losses.argmin(0, keepdim=True)).mean()) < 0.65
    assert torch.equal(kept, kept_teachers(losses, 0.5, 7))
    objective = Ladder(Ladder.Options(hidden=8))
    assert objective.bind({"hidden": 2}, {"hidden": 3, "main:hidden": 3, "second:hidden": 2}) == []
    assert objective.taught == ["hidden[2]", "second:hidden[1]"]


def test_filters_learn_the_task_before_they_teach():
    """Stage 1 raises the probe's fit to the labels; afterwards only the student's filter has parameters."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(120) % 3
    teacher = {"hidden[0]": torch.randn(120, 6, generator=generator) + torch.eye(6)[labels] * 2}
    student = {"hidden[0]": torch.randn(120, 4, generator=generator)}
    options = TaskAwareFilters.Options(epochs=60, learning_rate=1e-2, size=3)
    objective = TaskAwareFilters(options)
    assert objective.bind({"hidden": 1}, {"hidden": 1}) == []
    objective.prepare(Context(student, teacher, torch.Generator().manual_seed(0), "cpu", 3))
    before = separation(objective, teacher["hidden[0]"], labels)
    objective.survey(over(teacher, student, labels), torch.Generator().manual_seed(0))
    assert separation(objective, teacher["hidden[0]"], labels) > before
    assert len(list(objective.parameters())) == 2


def separation(objective, hidden, labels):
    """Share of samples whose filtered feature is nearest to their own class's mean."""
    part = objective._parts[0]
    filtered = torch.nn.functional.linear(hidden, part.weight, part.bias)
    means = torch.stack([filtered[labels == k].mean(0) for k in range(3)])
    return float((torch.cdist(filtered, means).argmin(1) == labels).float().mean())


def test_the_export_refuses_what_is_for_training_only():
    from compressor.errors import StageError
    from compressor.stages.export import refuse_training_parts

    model = convnet(3, 1)
    objective = MultiExit()
    objective.bind(available(model), {})
    steps = objective.install(model, PICTURE)
    with pytest.raises(StageError, match="exits"):
        refuse_training_parts(model)
    objective.commit(model, steps, None)
    refuse_training_parts(model)
