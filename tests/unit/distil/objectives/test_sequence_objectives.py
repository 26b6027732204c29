"""Golden values, identities and state of the objectives for sequences, with one vocabulary or two."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from compressor.distil.objectives import crossvocab, sequence  # noqa: E402
from compressor.distil.objectives.base import Batch, Step  # noqa: E402
from compressor.errors import StageError  # noqa: E402
from tests.unit.distil.objectives.cases import (  # noqa: E402
    FIRST,
    GOLDEN,
    LABELS,
    STUDENT,
    TEACHER,
    evaluate,
    gradient,
    made,
    value,
)

pytestmark = pytest.mark.train
NONE = Batch(None, None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("taid", GOLDEN["taid t=.4 (cross-entropy form)"]),
        ("dpkd", GOLDEN["dpkd beta=.1"]),
        ("self-evolution", GOLDEN["kd tau=1 (x tau^2)"]),
    ],
)
def test_golden_values(name, expected):
    assert value(name, STUDENT, TEACHER) == pytest.approx(expected, abs=1e-5)


def test_golden_values_of_pure_functions():
    teacher = torch.tensor([[2.0, 1, 0, -1, 0]])
    assert value("uld", STUDENT[:1], teacher, NONE) == pytest.approx(GOLDEN["uld 5 vs 4 vocab"], abs=1e-5)
    found = crossvocab.likelihood_matching(torch.tensor(-3.0), torch.tensor(-5.0), 100.0)
    assert float(found) == pytest.approx(GOLDEN["alm -3/-5 tau=100"], abs=1e-5)
    weights = sequence.token_weights(torch.tensor([[0.5, 2.0, 4.0]]), torch.ones(1, 3, dtype=torch.bool), 10.0)
    assert weights[0].tolist() == pytest.approx(GOLDEN["tsld weights"], abs=1e-5)


# --- which tokens are taught


@pytest.mark.parametrize("name", ["kd", "jsd", "akl", "dpkd", "taid"])
def test_only_the_response_is_taught(name):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    mask, response = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]), torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]])
    found = value(name, student, teacher, Batch(None, mask, response=response))
    keep = (mask * response).bool()
    assert found == pytest.approx(value(name, student[keep], teacher[keep], NONE), rel=1e-5)


@pytest.mark.parametrize("name", ["kd", "dkd", "tsld"])
def test_a_teacher_with_a_longer_context_is_aligned_by_the_response(name):
    torch.manual_seed(0)
    answer = torch.randn(2, 3, 4)
    student, teacher = torch.randn(2, 5, 4), torch.randn(2, 8, 4)
    teacher[:, 5:] = answer
    own = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]])
    other = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1, 0]])
    labels = torch.randint(0, 4, (2, 5))
    batch = Batch(labels, torch.ones(2, 5), response=own, view=Batch(None, torch.ones(2, 8), response=other))
    matched = torch.zeros(2, 5, 4)
    matched[0, 2:], matched[1, 1:3] = answer[0], answer[1, :2]
    expected = value(name, student, matched, Batch(labels, torch.ones(2, 5), response=own))
    assert value(name, student, teacher, batch) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(StageError, match="different numbers of taught tokens"):
        value(name, student, teacher, Batch(labels, own, view=Batch(None, torch.ones(2, 8))))


# --- TAID


def walk(losses, total=None, **options):
    """The share of each step when the steps lose ``losses``."""
    total = total or len(losses)
    state = sequence.Interpolation(**({"start": 0.4, "end": 1.0, "rate": 5e-4, "beta": 0.99} | options))
    shares = []
    for index, loss in enumerate(losses):
        shares.append(state.advance(Step(index, total, 0)))
        state.observe(torch.tensor(loss * 4), 4)
    return state, shares


@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=30))
@settings(max_examples=40, deadline=None)
def test_the_share_of_the_teacher_never_falls_and_reaches_its_end(losses):
    state, shares = walk(losses, rate=0.3, beta=0.5)
    assert shares[0] == 0.4
    assert all(b >= a for a, b in pairwise(shares))
    assert state.advance(Step(len(losses), len(losses), 0)) == 1.0


def test_the_share_follows_the_published_rule():
    _, shares = walk([2.0, 1.0, 0.8], total=10_000, rate=0.1, beta=0.9)
    momentum, share = 0.0, shares[1]
    momentum = 0.9 * momentum + 0.1 * (2.0 - 1.0) / 2.0
    share += 0.1 / (1 + math.exp(-momentum)) * (1 - share)
    assert shares[2] == pytest.approx(share, rel=1e-6)
    faster = walk([2.0, 1.0, 0.8], total=10_000, rate=0.1, beta=0.9)[1][2]
    assert faster > walk([2.0, 2.0, 2.0], total=10_000, rate=0.1, beta=0.9)[1][2]


def test_micro_batches_of_one_step_see_one_share():
    state, _ = walk([2.0, 1.5], total=5)
    other = sequence.Interpolation(0.4, 1.0, 5e-4, 0.99)
    for index, loss in enumerate((2.0, 1.5)):
        for part in (1, 3):
            other.advance(Step(index, 5, 0))
            other.observe(torch.tensor(loss * part), part)
    assert other.advance(Step(2, 5, 0)) == state.advance(Step(2, 5, 0))


def test_taid_at_its_end_is_soft_cross_entropy_and_its_state_goes_through_a_checkpoint():
    assert value("taid", STUDENT, TEACHER, options={"start": 1.0}) == pytest.approx(GOLDEN["soft ce"], abs=1e-5)
    one, other = made("taid", {"rate": 0.2}), made("taid", {"rate": 0.2})
    own, taught = {"logits": STUDENT}, {"logits": TEACHER}
    for index in range(3):
        one(own, taught, NONE, Step(index, 9, 0))
    other.modules().load_state_dict(one.modules().state_dict())
    assert float(one(own, taught, NONE, Step(3, 9, 0)).sum) == float(other(own, taught, NONE, Step(3, 9, 0)).sum)
    assert list(one.parameters()) == []


# --- DistiLLM-2, preferences, self-evolution


def test_distillm2_on_equal_answers_is_both_skew_divergences():
    both = (torch.cat([x, x])[:, None] for x in (STUDENT, TEACHER))
    made_by = torch.tensor([False] * 3 + [True] * 3)
    found = value("distillm2", *both, Batch(None, None, student_made=made_by), {"gradual": False})
    assert found == pytest.approx(GOLDEN["skew fkl .1"] + GOLDEN["skew rkl .1"], abs=1e-5)


def test_distillm2_turns_to_the_students_answers():
    batch = Batch(None, None, student_made=torch.tensor([False, True, True]))
    found = [value("distillm2", STUDENT, TEACHER, batch, step=Step(i, 10, 0)) for i in (0, 5, 9)]
    skew = [value("skew-kl", STUDENT[:1], TEACHER[:1], NONE)]
    skew += [value("skew-kl", STUDENT[1:], TEACHER[1:], NONE, {"reverse": True})]
    assert found == pytest.approx([skew[0] + skew[1], 0.5 * skew[0] + 1.5 * skew[1], 0.5 * skew[0] + 1.5 * skew[1]])
    with pytest.raises(StageError, match="which rows the student made"):
        value("distillm2", STUDENT, TEACHER, NONE)


def test_preferences_are_silent_where_both_agree():
    grad = gradient("dpkd", STUDENT, TEACHER)
    agree = STUDENT.argmax(1) == TEACHER.argmax(1)
    assert agree.tolist() == [True, True, False]
    assert grad[agree].abs().max() == 0
    assert grad[~agree].abs().max() > 0


def test_hard_tokens_get_a_mixed_target():
    student, teacher = torch.tensor([[4.0, 0, 0]]), torch.tensor([[0.0, 0, 4]])
    target, difficulty = sequence.mixed_target(teacher, student, torch.tensor([1]), 0.5, 1.0)
    assert float(difficulty) > 1
    assert float(target.sum()) == pytest.approx(1.0, abs=1e-6)
    trust = 1 - math.exp(-float(difficulty))
    assert float(target[0, 1]) == pytest.approx(
        (1 - trust) * float(student.softmax(1)[0, 1]) + trust * (0.5 * float(teacher.softmax(1)[0, 1]) + 0.5), rel=1e-5
    )
    easy, _ = sequence.mixed_target(teacher, student, torch.tensor([1]), 0.5, 100.0)
    assert torch.allclose(easy, teacher.softmax(1), atol=1e-6)


def test_token_scaled_distillation_weighs_the_tokens_of_each_sequence():
    student, teacher, labels = STUDENT[None], TEACHER[None], LABELS[None]
    errors = -TEACHER.log_softmax(1)[torch.arange(3), LABELS]
    soft = -(TEACHER.softmax(1) * STUDENT.log_softmax(1)).sum(1)
    expected = float((torch.softmax(errors / 10, 0) * soft).sum())
    assert value("tsld", student, teacher, Batch(labels, torch.ones(1, 3))) == pytest.approx(expected, rel=1e-5)
    masked = Batch(torch.tensor([[0, -100, 2]]), torch.ones(1, 3))
    keep = [0, 2]
    expected = float((torch.softmax(errors[keep] / 10, 0) * soft[keep]).sum())
    assert value("tsld", student, teacher, masked) == pytest.approx(expected, rel=1e-5)


# --- two vocabularies


def test_sorted_probabilities_ignore_a_permutation_of_the_vocabulary():
    torch.manual_seed(0)
    teacher = torch.randn(2, 4, 6)
    batch = Batch(None, torch.ones(2, 4))
    assert value("uld", teacher[..., torch.randperm(6)], teacher, batch) == pytest.approx(0.0, abs=1e-6)
    before = teacher.clone()
    gradient("uld", torch.randn(2, 4, 3), teacher, batch=batch)
    assert torch.equal(teacher, before)


def test_sequences_of_other_length_are_cut_to_the_shorter_answer():
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 4, 5), torch.randn(1, 6, 7)
    batch = Batch(
        None,
        torch.ones(1, 4),
        response=torch.tensor([[0, 1, 1, 1]]),
        view=Batch(None, torch.ones(1, 6), response=torch.tensor([[0, 0, 0, 1, 1, 0]])),
    )
    expected = value("uld", student[0, 1:3], teacher[0, 3:5], NONE)
    assert value("uld", student, teacher, batch) == pytest.approx(expected, rel=1e-5)


def chunks_by_hand(a, b):
    """Chunks of two lists of token ends, written the slow way."""
    common = sorted(set(a) & set(b))

    def of(end):
        return next((i for i, mark in enumerate(common) if end <= mark), -1)

    return [of(end) for end in a], [of(end) for end in b], len(common)


def ends_of(text):
    return st.lists(st.integers(1, text), min_size=1, max_size=text).map(lambda x: sorted([*x, text]))


@given(ends_of(8), ends_of(8), st.booleans())
@settings(max_examples=80, deadline=None)
def test_chunks_end_where_both_tokenizations_end(a, b, whole):
    b = b if whole else [end for end in b if end != 8] or [1]  # without a common end of the text
    tensors = [torch.tensor([x]) for x in (a, b)]
    valid = [torch.ones_like(x, dtype=torch.bool) for x in tensors]
    found = crossvocab.common_chunks(tensors[0], valid[0], tensors[1], valid[1])
    own, other, count = chunks_by_hand(a, b)
    assert (found[0][0].tolist(), found[1][0].tolist(), int(found[2])) == (own, other, count)


def test_tokens_that_do_not_count_belong_to_no_chunk():
    a, b = torch.tensor([[1, 3, 4, 6, -1]]), torch.tensor([[3, 5, 6]])
    valid = a > 0
    own, other, count = crossvocab.common_chunks(a, valid, b, torch.ones(1, 3, dtype=torch.bool))
    assert own.tolist() == [[0, 0, 1, 1, -1]]
    assert other.tolist() == [[0, 1, 1]]
    assert count.tolist() == [2]


def test_likelihood_matching_is_least_where_both_agree():
    student = torch.linspace(-8, -0.5, 400, requires_grad=True)
    values = crossvocab.likelihood_matching(torch.tensor(-3.0), student, 10.0)
    assert float(student[values.argmin()].detach()) == pytest.approx(-3.0, abs=0.05)


def test_alm_sums_token_likelihoods_over_common_spans():
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 3, 5), torch.randn(1, 2, 7)
    own, other = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 6]])
    view = Batch(other, torch.ones(1, 2), ends=torch.tensor([[2, 4]]))
    batch = Batch(own, torch.ones(1, 3), ends=torch.tensor([[1, 2, 4]]), view=view)
    logs = student.log_softmax(-1)[0, torch.arange(3), own[0]]
    taught = teacher.log_softmax(-1)[0, torch.arange(2), other[0]]
    spans = torch.stack([logs[:2].sum(), logs[2]])
    expected = crossvocab.likelihood_matching(taught, spans, 100.0).mean()
    assert value("alm", student, teacher, batch) == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(StageError, match="byte where it ends"):
        value("alm", student, teacher, Batch(own, None))


def test_two_vocabularies_are_declared():
    for name in ("uld", "alm"):
        assert not made(name).needs.same_vocab
    assert made("kd").needs.same_vocab
    assert torch.isfinite(
        evaluate("alm", STUDENT[None], TEACHER[None], Batch(LABELS[None], None, ends=LABELS[None]), step=FIRST)
    )
