"""Mechanism of objectives for sequences, relations, heads and layers; see :mod:`test_mechanism` for the simple ones."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402

from compressor.distil.objectives import heads, ladder, layerwise  # noqa: E402
from compressor.distil.objectives.base import Batch, Context, Step  # noqa: E402
from compressor.distil.objectives.registry import get  # noqa: E402
from compressor.models.signals import SignalTap, available  # noqa: E402
from compressor.recipe import Match  # noqa: E402
from tests.unit.distil.objectives.test_mechanism import drawn, kl, p, spread  # noqa: E402
from tests.unit.distil.objectives.test_prepared import over  # noqa: E402
from tests.unit.distil.toy import convnet  # noqa: E402

pytestmark = pytest.mark.train
NONE = Batch(None, None)


def ready(name, own, other, batch=NONE, options=None, match=None, classes=3):
    """A bound, prepared and surveyed objective, and what it is asked to make small."""
    loaded = get(name)
    objective = loaded(loaded.Options.model_validate(options or {}), match)
    assert objective.bind(*({name: 1 for name in ("hidden", "pooled", "logits")} for _ in range(2))) == []
    still = {key: tensor.detach() for key, tensor in own.items()}
    objective.prepare(Context(still, other, torch.Generator().manual_seed(0), "cpu", classes))
    if hasattr(objective, "survey"):
        objective.survey(over(other, still, batch.labels), torch.Generator().manual_seed(0))
    return objective


def descend(objective, leaves, signals, other, batch=NONE, steps=80, rate=0.05):
    """Adam on the leaves and on the objective's own parts; ``signals`` makes the student's signals of the leaves."""
    optimiser = torch.optim.Adam([*leaves, *objective.parameters()], lr=rate)
    for index in range(steps):
        term = objective(signals(), other, batch, Step(index, steps, 0))
        optimiser.zero_grad()
        (term.sum / term.count).backward()
        optimiser.step()


# --- tokens


def test_tokens_that_surprise_the_teacher_pull_harder():
    teacher = torch.tensor([[[4.0, 0, 0], [0, 0, 0]]])  # sure of the first label, not of the second
    labels = torch.tensor([[0, 1]])
    pulls = []
    for scale in (0.1, 1000.0):
        free = torch.tensor([[[0.0, 2, 0], [2.0, 0, 0]]], requires_grad=True)
        objective = ready("tsld", {"logits": free}, {"logits": teacher}, options={"scale": scale})
        objective({"logits": free}, {"logits": teacher}, Batch(labels, torch.ones(1, 2)), Step(0, 1, 0)).sum.backward()
        pulls.append(free.grad.norm(dim=-1)[0])
    assert pulls[0][1] / pulls[0][0] > 10 * pulls[1][1] / pulls[1][0]


def test_a_hard_token_is_led_towards_its_label():
    """The teacher gives the label a third; the student starts far away and ends above that."""
    teacher, free = torch.zeros(1, 3), torch.tensor([[6.0, 0, 0]], requires_grad=True)
    batch = Batch(torch.tensor([1]), None)
    objective = ready("self-evolution", {"logits": free}, {"logits": teacher}, batch)
    descend(objective, [free], lambda: {"logits": free}, {"logits": teacher}, batch, steps=40, rate=0.2)
    assert float(p(free.detach())[0, 1]) > 0.34


def test_answers_of_the_teacher_become_likelier_and_those_of_the_student_less():
    """Row 0 was written by the teacher, row 1 by the student; each took its writer's favourite token."""
    teacher = torch.tensor([[[3.0, 0, 0]], [[3.0, 0, 0]]])
    free = torch.tensor([[[0.0, 3, 0]], [[0.0, 3, 0]]], requires_grad=True)
    batch = Batch(None, torch.ones(2, 1), student_made=torch.tensor([False, True]))
    before = p(free.detach())
    objective = ready("distillm2", {"logits": free}, {"logits": teacher}, batch)
    descend(objective, [free], lambda: {"logits": free}, {"logits": teacher}, batch, steps=30)
    after = p(free.detach())
    assert after[0, 0, 0] > before[0, 0, 0]
    assert after[1, 0, 1] < before[1, 0, 1]


def test_likelihoods_of_common_spans_become_the_teachers():
    """Three tokens of the student cover what two of the teacher do."""
    own, other = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 6]])
    teacher, free = drawn(1, 1, 2, 7), drawn(2, 1, 3, 5).requires_grad_()
    view = Batch(other, torch.ones(1, 2), ends=torch.tensor([[2, 4]]))
    batch = Batch(own, torch.ones(1, 3), ends=torch.tensor([[1, 2, 4]]), view=view)
    taught = teacher.log_softmax(-1)[0, torch.arange(2), other[0]]

    def error():
        logs = free.detach().log_softmax(-1)[0, torch.arange(3), own[0]]
        return float((torch.stack([logs[:2].sum(), logs[2]]) - taught).abs().max())

    before = error()
    objective = ready("alm", {"logits": free}, {"logits": teacher}, batch)
    descend(objective, [free], lambda: {"logits": free}, {"logits": teacher}, batch, steps=300, rate=0.1)
    assert error() < 0.3 * before


# --- relations and layers


def test_attention_relations_of_a_narrower_student_become_the_teachers():
    teacher, free = drawn(3, 3, 2, 4, 5, 8), drawn(4, 3, 2, 2, 5, 4).requires_grad_()
    objective = get("minilm-relations")(get("minilm-relations").Options(heads=2))
    assert objective.bind({"qkv": 1}, {"qkv": 1}) == []
    own, other = {"qkv[0]": free}, {"qkv[0]": teacher}
    objective.prepare(Context({"qkv[0]": free.detach()}, other, torch.Generator(), "cpu"))

    def relations(qkv):
        kinds, batch, _, tokens, _ = qkv.shape
        cut = qkv.transpose(2, 3).reshape(kinds, batch, tokens, 2, -1).transpose(2, 3)
        return cut @ cut.transpose(-1, -2) / cut.shape[-1] ** 0.5

    before = kl(relations(teacher), relations(free.detach()))
    descend(objective, [free], lambda: own, other)
    assert kl(relations(teacher), relations(free.detach())) < 0.3 * before


@pytest.mark.parametrize("within", ["class", "instance"])
def test_only_embeddings_of_positive_labels_move(within):
    labels = torch.tensor([[1.0, 1, 0, 1], [1, 1, 0, 1], [1, 1, 0, 1]])
    teacher, free = drawn(5, 3, 4, 6), drawn(6, 3, 4, 6).requires_grad_()
    other, start = {"hidden[0]": teacher}, free.detach().clone()
    match = Match(student="hidden[-1]", teacher="hidden[-1]", proj="none")
    batch = Batch(labels, None)
    objective = ready("label-embedding", {"hidden[0]": free}, other, batch, {"within": within}, match)
    descend(objective, [free], lambda: {"hidden[0]": free}, other, batch, steps=150)
    end = free.detach()
    assert torch.equal(end[:, 2], start[:, 2])

    def error(e):
        groups = zip(e.transpose(0, 1)[[0, 1, 3]], teacher.transpose(0, 1)[[0, 1, 3]], strict=True)
        if within == "instance":
            groups = zip(e[:, [0, 1, 3]], teacher[:, [0, 1, 3]], strict=True)
        return sum(float((spread(a) - spread(b)).abs().mean()) for a, b in groups)

    assert error(end) < 0.3 * error(start)


def test_the_nearest_layer_learns_and_the_others_stay():
    """One layer is taught: the student's nearest at that moment takes it."""
    teacher = {f"hidden[{i}]": drawn(10 + i, 2, 3, 4) for i in range(3)}
    leaves = [drawn(20 + i, 2, 3, 4).requires_grad_() for i in range(3)]
    leaves[1].data = teacher["hidden[2]"] + 0.3
    starts = [leaf.detach().clone() for leaf in leaves]
    objective = layerwise.Layerwise(layerwise.Layerwise.Options(layers=1))
    counts = {"hidden": 3, "qkv": 2}
    assert objective.bind(counts, counts) == []
    own = {f"hidden[{i}]": leaf for i, leaf in enumerate(leaves)}
    objective.prepare(
        Context({k: v.detach() for k, v in own.items()}, teacher, torch.Generator().manual_seed(0), "cpu")
    )
    objective._transform.requires_grad_(False)
    term = objective(own, teacher, Batch(None, torch.ones(2, 3)), Step(0, 1, 0))
    term.sum.backward()
    assert leaves[1].grad.norm() > 0
    assert leaves[2].grad is None or leaves[2].grad.norm() == 0
    moved = leaves[1].detach() - 0.1 * leaves[1].grad
    assert (moved - teacher["hidden[2]"]).norm() < (starts[1] - teacher["hidden[2]"]).norm()


# --- features, heads and exits


def test_features_grow_and_turn_to_the_mean_of_their_class():
    labels = torch.arange(12) % 3
    teacher = {"pooled": drawn(7, 12, 5) + 3 * F.one_hot(labels, 5).float()}
    free, batch = (drawn(8, 12, 5) * 0.3).requires_grad_(), Batch(labels, None)
    means = torch.stack([teacher["pooled"][labels == k].mean(0) for k in range(3)])[labels]
    start = free.detach().clone()
    objective = ready("norm-direction", {"pooled": free}, teacher, batch)
    descend(objective, [free], lambda: {"pooled": free}, teacher, batch)
    assert free.detach().norm(dim=1).mean() > 1.5 * start.norm(dim=1).mean()
    assert (F.cosine_similarity(free.detach(), means) > F.cosine_similarity(start, means)).all()


def test_the_label_term_leaves_the_second_head_alone_and_the_teacher_the_first():
    model = convnet(3, 1)
    objective = heads.DualHeadKd()
    assert objective.bind(available(model), available(model)) == []
    picture = {"image": torch.ones(2, 1, 12, 12)}
    objective.install(model, picture)
    teacher = {"logits": drawn(9, 2, 4)}
    with SignalTap(model, ["taught", "labelled"]) as tap:
        found = tap(picture)
        objective(found, teacher, NONE, Step(0, 1, 0)).sum.backward(retain_graph=True)
        moved = {name for name, value in model.named_parameters() if value.grad is not None and value.grad.any()}
        model.zero_grad()
        F.cross_entropy(found["labelled"], torch.tensor([0, 1])).backward()
    other = {name for name, value in model.named_parameters() if value.grad is not None and value.grad.any()}
    own = {name for name in moved ^ other if name.startswith("head")}
    assert own & moved
    assert own & other


def test_side_questions_are_answered_from_the_feature():
    labels = torch.arange(12) % 3
    student, batch = {"pooled": F.one_hot(labels, 3).float()}, Batch(labels, None)
    objective = ready("auxiliary-head", student, {}, batch, {"answers": "10 01 11"})
    first = objective(student, {}, batch, Step(0, 1, 0))
    descend(objective, [], lambda: student, {}, batch, steps=100, rate=0.2)
    last = objective(student, {}, batch, Step(0, 1, 0))
    assert float((last.sum / last.count).detach()) < 0.2 * float((first.sum / first.count).detach())


def test_a_short_embedding_takes_the_teachers_distances():
    teacher = drawn(11, 40, 8) * torch.tensor([4.0, 3, 2, 0.1, 0.1, 0.1, 0.1, 0.1])
    free = drawn(12, 40, 6).requires_grad_()
    options = {"size": 3, "tanh": False, "keep": False}
    objective = ready(
        "homomorphic-projection", {"pooled": free}, {"logits": teacher}, Batch(torch.arange(40) % 3, None), options
    )

    def follows(e):
        pair = torch.stack([torch.cdist(e, e).flatten(), torch.cdist(teacher, teacher).flatten()])
        return float(torch.corrcoef(pair)[0, 1])

    descend(objective, [free], lambda: {"pooled": free}, {"logits": teacher}, steps=150)
    short = objective._parts.dense(free.detach()).detach()
    assert short.shape[1] == 3
    assert follows(short) > 0.95 > follows(drawn(12, 40, 6))


def test_an_exit_follows_the_deeper_one_which_does_not_follow_it():
    early, late = drawn(13, 6, 4).requires_grad_(), drawn(14, 6, 4).requires_grad_()
    loaded = get("multi-exit")
    objective = loaded(loaded.Options(labels=0.0, blocks="0"))
    assert objective.bind({"hidden": 2, "logits": 1}, {}) == []
    before = kl(late.detach(), early.detach())
    descend(objective, [early], lambda: {"exit[0]": early, "logits": late}, {}, rate=0.1)
    assert kl(late.detach(), early.detach()) < 0.1 * before
    assert late.grad is None or late.grad.abs().max() == 0


def test_every_block_carries_a_part_of_the_ladder():
    labels = torch.arange(8) % 2
    teacher = {"hidden[1]": drawn(15, 8, 3, 5)}
    leaves = [drawn(16 + i, 8, 3, 4).requires_grad_() for i in range(2)]

    def own():
        return {f"hidden[{i}]": leaf for i, leaf in enumerate(leaves)}

    objective = ladder.Ladder(ladder.Ladder.Options(hidden=8, drop=0.0))
    assert objective.bind({"hidden": 2}, {"hidden": 2}) == []
    still = {key: value.detach() for key, value in own().items()}
    objective.prepare(Context(still, teacher, torch.Generator().manual_seed(0), "cpu"))
    objective.survey(over(teacher, still, labels), torch.Generator().manual_seed(0))
    batch, values = Batch(labels, torch.ones(8, 3)), []
    for _ in range(2):
        term = objective(own(), teacher, batch, Step(0, 1, 0))
        values.append(float((term.sum / term.count).detach()))
        term.sum.backward()
        assert all(leaf.grad.abs().sum() > 0 for leaf in leaves)
        descend(objective, leaves, own, teacher, batch, steps=60)
    assert values[1] < 0.5 * values[0]


def test_subclasses_of_the_teacher_are_learned_by_free_outputs():
    """Beyond its class probabilities a student of `lelp` says in which part of a class a sample lies."""
    generator = torch.Generator().manual_seed(1)
    h, labels = torch.randn(80, 4, generator=generator) * 0.1, torch.arange(80) % 2
    h[:, 0] += labels * 2.0 - 1
    h[:, 3] += torch.where(torch.arange(80) % 4 < 2, 2.0, -2.0)
    teacher = {"pooled": h, "logits": h[:, :2] @ torch.tensor([[-3.0, 3.0], [1.0, 0.0]])}
    free, batch = torch.zeros(80, 4, requires_grad=True), Batch(labels, None)
    made = ready("lelp", {"subclasses": free}, teacher, batch, {"subclasses": 2}, classes=2)
    descend(made, [free], lambda: {"subclasses": free}, teacher, batch, rate=0.2)
    within = p(free.detach()).unflatten(1, (2, 2))
    own = within[torch.arange(80), labels]
    side = (own / own.sum(-1, keepdim=True))[:, 0]
    for k in (0, 1):
        up, down = (side[(labels == k) & (h[:, 3] * sign > 0)].mean() for sign in (1, -1))
        assert abs(up - down) > 0.3
