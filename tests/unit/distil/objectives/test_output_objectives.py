"""Golden values, identities and limits of the objectives on outputs: decoupled, ranked, transported, multi-label."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402

from compressor.distil.objectives import batchwise, decoupled, divergence, listwise, multilabel  # noqa: E402
from compressor.distil.objectives.base import Batch  # noqa: E402
from compressor.errors import StageError  # noqa: E402
from compressor.recipe import Match  # noqa: E402
from tests.unit.distil.objectives.cases import (  # noqa: E402
    GOLDEN,
    LABELS,
    STUDENT,
    STUDENT_FEATURES,
    TEACHER,
    TEACHER_FEATURES,
    evaluate,
    gradient,
    value,
)

pytestmark = pytest.mark.train
KD = GOLDEN["kd tau=1 (x tau^2)"]


def random_logits(seed, rows=40, classes=7):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, classes, generator=generator) * 2 for _ in range(2)]


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("akl", {}, GOLDEN["akl mu=.5"]),
        ("topk-kl", {"k": 2, "tail": "mass"}, KD),
        ("topk-kl", {"k": 2, "tail": 0.0}, 0.338607),
        ("jsd", {"beta": 0.0}, KD),
        ("jsd", {"beta": 1.0}, GOLDEN["rkl"]),
        ("dkd", {}, GOLDEN["dkd a=1 b=8 tau=4 (tckd,nckd,total)"][2]),
        ("dkd", {"beta": 0.0}, GOLDEN["dkd a=1 b=8 tau=4 (tckd,nckd,total)"][0]),
        ("dkd", {"alpha": 0.0, "beta": 1.0}, GOLDEN["dkd a=1 b=8 tau=4 (tckd,nckd,total)"][1]),
        ("dist", {"gamma": 0.0}, GOLDEN["dist (inter,intra) tau=1"][0]),
        ("dist", {"beta": 0.0}, GOLDEN["dist (inter,intra) tau=1"][1]),
        ("plackett-luce", {}, GOLDEN["pld"]),
        ("sinkhorn", {}, GOLDEN["sinkd <K,D> tau=2 lam=.1 n=20, unweighted"]),
        ("multi-label", {}, GOLDEN["mld batchmean"]),
    ],
)
def test_golden_values(name, options, expected):
    assert value(name, STUDENT, TEACHER, options=options) == pytest.approx(expected, abs=1e-5)


def test_nkd_has_its_worked_number():
    found = value("nkd", torch.zeros(1, 3), torch.tensor([[2.0, 1, 0]]), Batch(LABELS[:1], None))
    share = math.exp(2) / (math.exp(2) + math.e + 1)
    assert found == pytest.approx(share * math.log(3) + math.log(2), abs=1e-5)


# --- divergences


def test_the_two_parts_of_dkd_make_kd():
    teacher, student = random_logits(1)
    labels = torch.arange(40) % 7
    parts = [
        decoupled.kl_of_logs(f(teacher, labels, 3.0), f(student, labels, 3.0))
        for f in (decoupled.target_and_rest, decoupled.others)
    ]
    rest = 1 - divergence.log_probabilities(teacher, 3.0).exp().gather(1, labels[:, None])[:, 0]
    assert torch.allclose(parts[0] + rest * parts[1], divergence.forward_kl(teacher, student, 3.0), atol=1e-5)


def test_buckets_and_tail_make_the_whole_kl():
    teacher, student = random_logits(2)
    whole = divergence.forward_kl(teacher, student)
    for k in (1, 3, 6, 7, 50):
        assert torch.allclose(divergence.bucketed_kl(teacher, student, k=k), whole, atol=1e-5)
    bucketed = divergence.bucketed_kl(teacher, student, k=2, tail=0.0)
    assert (bucketed <= whole + 1e-6).all()  # merging classes loses information
    assert (bucketed >= -1e-6).all()


def test_top_k_kl_is_finite_where_the_tail_is_empty():
    grad = gradient("topk-kl", torch.zeros(1, 4), torch.tensor([[300.0, 0, -300, -300]]), options={"k": 2})
    assert torch.isfinite(grad).all()


def test_adaptive_kl_lies_between_both_directions():
    teacher, student = random_logits(3)
    both = torch.stack([divergence.forward_kl(teacher, student), divergence.reverse_kl(teacher, student)])
    found = divergence.adaptive_kl(teacher, student)
    assert (found >= both.min(0).values - 1e-5).all()
    assert (found <= both.max(0).values + 1e-5).all()
    whole = divergence.adaptive_kl(teacher, student, head=1.0)  # rounding may leave one class in the tail
    assert torch.allclose(whole, both[0], rtol=0.2, atol=0.05)


def test_the_ends_of_jsd_are_branches_with_a_jump():
    near = gradient("jsd", STUDENT, TEACHER, options={"beta": 0.01}).norm()
    assert float(near) < 0.05 * float(gradient("jsd", STUDENT, TEACHER, options={"beta": 0.0}).norm())


def test_soft_labels_of_an_ensemble_are_the_mean_of_the_soft_labels():
    teachers = [*random_logits(4), random_logits(5)[0]]
    student = random_logits(6)[0]
    mean = torch.stack([divergence.soft_cross_entropy(t, student) for t in teachers]).mean(0)
    assert torch.allclose(divergence.soft_cross_entropy(divergence.log_mean_probabilities(teachers), student), mean)


def test_dist_sees_correlation_only():
    p = torch.tensor([[0.1, 0.2, 0.7]])
    assert float(decoupled.pearson(p, 0.25 * p + 0.25)) == pytest.approx(1.0, abs=1e-6)
    assert float(decoupled.pearson(p, -p)) == pytest.approx(-1.0, abs=1e-6)
    assert float(decoupled.pearson(p, torch.full_like(p, 1 / 3))) == 0.0


# --- labels


@pytest.mark.parametrize("name", ["dkd", "nkd", "plackett-luce", "self-evolution", "tsld"])
def test_unlabelled_samples_do_not_count(name):
    some = Batch(torch.tensor([0, -100, 2]), None)
    rows = [0, 2]
    expected = value(name, STUDENT[rows], TEACHER[rows], Batch(LABELS[rows], None))
    assert value(name, STUDENT, TEACHER, some) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("labels", [None, torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64)])
def test_labels_of_another_task_are_refused(labels):
    with pytest.raises(StageError, match="one class a row"):
        value("dkd", STUDENT, TEACHER, Batch(labels, None))


# --- Plackett-Luce


def test_plackett_luce_with_all_weight_on_the_label_is_cross_entropy():
    sure = torch.full_like(TEACHER, -200.0).scatter(1, LABELS[:, None], 200.0)
    assert value("plackett-luce", STUDENT, sure) == pytest.approx(GOLDEN["ce"], abs=1e-6)
    first = {"weights": "uniform", "top": 1}
    assert value("plackett-luce", STUDENT, TEACHER, options=first) == pytest.approx(GOLDEN["ce"], abs=1e-6)


def test_plackett_luce_ignores_a_constant_and_is_convex():
    teacher, a = random_logits(7)
    b = random_logits(8)[0]
    batch = Batch(torch.arange(40) % 7, None)
    at = [value("plackett-luce", x, teacher, batch) for x in (a, b, (a + b) / 2, a + 5)]
    assert at[2] <= (at[0] + at[1]) / 2
    assert at[3] == pytest.approx(at[0], rel=1e-5)


def test_ties_are_broken_by_class_index():
    assert listwise.teacher_order(torch.tensor([[1.0, 1, 2, 1]])).tolist() == [[2, 0, 1, 3]]
    assert listwise.teacher_order(torch.tensor([[1.0, 1, 2, 1]]), torch.tensor([3])).tolist() == [[3, 2, 0, 1]]


def test_a_partial_ranking_has_easy_items_in_its_denominators_only():
    scores = torch.tensor([[0.5, 1.0, -0.5, 0.2]])
    order = torch.tensor([[1, 0, 2, 3]])  # two ranked hard negatives, then two easy ones
    found = float(listwise.plackett_luce(scores, order, torch.ones(1, 4), top=2))
    easy = math.exp(-0.5) + math.exp(0.2)
    expected = -math.log(math.exp(1.0) / (math.exp(1.0) + math.exp(0.5) + easy)) - math.log(
        math.exp(0.5) / (math.exp(0.5) + easy)
    )
    assert found == pytest.approx(expected, rel=1e-5)


def test_free_scores_take_the_teachers_order():
    torch.manual_seed(0)
    teacher = torch.randn(20, 6)
    for name, options in (("plackett-luce", {"first": "teacher", "weights": "uniform"}), ("rank-net", {})):
        scores = torch.zeros(20, 6, requires_grad=True)
        optimiser = torch.optim.Adam([scores], lr=0.1)
        for _ in range(60):
            optimiser.zero_grad()
            evaluate(name, scores, teacher, Batch(None, None), options).backward()
            optimiser.step()
        assert torch.equal(scores.argsort(1), teacher.argsort(1))


# --- Sinkhorn


def test_the_transport_plan_has_the_margins():
    torch.manual_seed(0)
    plan = batchwise.transport_plan(torch.rand(5, 5) * 2, 0.1, 200)
    assert torch.allclose(plan.sum(0), torch.ones(5), atol=1e-4)
    assert torch.allclose(plan.sum(1), torch.ones(5), atol=1e-4)
    assert torch.isfinite(batchwise.transport_plan(torch.rand(5, 5) * 2, 1e-3, 20)).all()


def test_sinkhorn_ignores_the_order_of_the_batch_and_vanishes_on_equal_samples():
    order = torch.tensor([2, 0, 1])
    one = value("sinkhorn", STUDENT, TEACHER)
    assert value("sinkhorn", STUDENT[order], TEACHER[order]) == pytest.approx(one, rel=1e-5)
    same = TEACHER[:1].repeat(4, 1)
    assert value("sinkhorn", same, same, Batch(None, None)) == pytest.approx(0.0, abs=1e-5)


# --- several labels a sample


def test_binary_labels_skip_what_is_unknown():
    logits = torch.tensor([[0.0, 2.0], [1.0, -1.0]])
    term = multilabel.binary_label_term(logits, Batch(torch.tensor([[1.0, 0.0], [-100.0, -100.0]]), None))
    assert int(term.count) == 2
    assert float(term.sum) == pytest.approx(math.log(2) + math.log(1 + math.exp(2)), rel=1e-5)


def test_multi_label_kl_is_finite_at_the_ends():
    grad = gradient("multi-label", torch.tensor([[-200.0, 200.0]]), torch.tensor([[200.0, -200.0]]))
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("within", ["class", "instance"])
def test_label_embeddings_are_compared_inside_their_groups(within):
    one, other = STUDENT_FEATURES, TEACHER_FEATURES
    labels = torch.zeros(3, 3) if within == "class" else torch.zeros(1, 3)
    if within == "class":
        labels[:, 1] = 1  # one class with three positive samples, and no other group
        student, teacher = (F.pad(x[:, None], (0, 0, 1, 1)) for x in (one, other))
    else:
        labels[:] = 1
        student, teacher = one[None], other[None]
    match = Match(student="hidden[-1]", teacher="hidden[-1]", proj="none")
    named = {"options": {"within": within}, "match": match, "signal": "hidden[0]"}
    assert value("label-embedding", student, teacher, Batch(labels, None), **named) == pytest.approx(
        GOLDEN["rkd-d"], abs=1e-5
    )
    with pytest.raises(StageError, match="one vector for each label"):
        value("label-embedding", student, teacher, Batch(LABELS, None), **named)
