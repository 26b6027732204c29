"""Objectives over two vocabularies: plain KL with one, shared tokens and pieces with two."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from compressor.distil.objectives.base import Batch, Step, Vocabularies  # noqa: E402
from compressor.distil.objectives.vocabularies import joined, spans  # noqa: E402
from compressor.errors import StageError  # noqa: E402
from tests.unit.distil.objectives.cases import LABELS, STUDENT, TEACHER, evaluate, made  # noqa: E402

pytestmark = pytest.mark.train
BOTH = ["vocab-match", "vocab-map"]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("use", BOTH)
def test_one_vocabulary_is_plain_kl(use: str) -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    student, teacher = drawn(2, 4, 6), drawn(2, 4, 6, seed=1)
    labels = torch.randint(0, 6, (2, 4))
    ends = torch.tensor([[2, 3, 7, 9], [1, 4, 5, 6]])
    same = torch.arange(6)
    vocabularies = Vocabularies(torch.stack([same, same], 1), same, same[:, None])
    for tau in (1.0, 2.0):
        wanted = evaluate("kd", student, teacher, Batch(labels, mask), {"temperature": tau})
        for batch in (
            Batch(labels, mask),
            Batch(labels, mask, ends=ends),
            Batch(labels, mask, ends=ends, view=Batch(labels, mask, ends=ends), vocabularies=vocabularies),
        ):
            found = evaluate(use, student, teacher, batch, {"temperature": tau})
            assert float(found) == pytest.approx(float(wanted), rel=1e-5)
    golden = evaluate(use, STUDENT[None], TEACHER[None], Batch(LABELS[None], None), {"temperature": 1.0})
    assert float(golden) == pytest.approx(0.341269, abs=1e-5)


# The text "the cats": teacher tokens "the" 0-3, " cats" 3-8; student tokens "the" 0-3, " cat" 3-7, "s" 7-8.
# Teacher classes: 0 the, 1 cats, 2 dog. Student classes: 0 s, 1 cat, 2 the, 3 dog.
VIEW = Batch(torch.tensor([[0, 1]]), torch.ones(1, 2), ends=torch.tensor([[3, 8]]))
WORDS = Vocabularies(torch.tensor([[2, 0], [3, 2]]), torch.tensor([0, 1, 2]), torch.tensor([[2, -1], [1, 0], [3, -1]]))
TEXT = Batch(torch.tensor([[2, 1, 0]]), torch.ones(1, 3), ends=torch.tensor([[3, 7, 8]]), view=VIEW, vocabularies=WORDS)


def test_shared_tokens_where_both_cut_alike() -> None:
    student, teacher = drawn(1, 3, 4), drawn(1, 2, 3, seed=1)
    p, q = teacher[0, 0, [0, 2]].log_softmax(-1), student[0, 0, [2, 3]].log_softmax(-1)
    wanted = (p.exp() * (p - q)).sum()
    assert float(evaluate("vocab-match", student, teacher, TEXT, {"temperature": 1.0})) == pytest.approx(float(wanted))
    apart = Batch(TEXT.labels, TEXT.mask, ends=TEXT.ends, starts=torch.tensor([1]), view=VIEW, vocabularies=WORDS)
    term = made("vocab-match")({"logits": student}, {"logits": teacher}, apart, Step(0, 1, 0))
    assert float(term.count) == 0, "no token begins and ends alike"


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("join", ["logsumexp", "sum"])
def test_pieces_are_joined_along_text_and_vocabulary(reduce: str, join: str) -> None:
    student, teacher = drawn(1, 3, 4), drawn(1, 2, 3, seed=1)
    second = student[0, 1] + student[0, 2]
    rows = torch.stack([student[0, 0], second / 2 if reduce == "mean" else second])
    pair = rows[:, [1, 0]]
    spelt = pair.sum(-1) if join == "sum" else pair.logsumexp(-1)
    mapped = torch.stack([rows[:, 2], spelt, rows[:, 3]], dim=1)
    assert torch.allclose(joined(rows, WORDS, join), mapped, atol=1e-6)
    p, q = teacher[0].log_softmax(-1), mapped.log_softmax(-1)
    wanted = (p.exp() * (p - q)).sum(-1).mean()
    options = {"temperature": 1.0, "reduce": reduce, "join": join}
    assert float(evaluate("vocab-map", student, teacher, TEXT, options)) == pytest.approx(float(wanted), rel=1e-5)


def test_spans_begin_where_the_one_before_ends() -> None:
    first, last, valid = spans(TEXT, drawn(1, 3, 4))
    assert first.tolist() == [[0, 3, 7]]
    assert last.tolist() == [[3, 7, 8]]
    assert valid.all()
    empty = Batch(TEXT.labels, TEXT.mask, ends=torch.tensor([[3, 3, -1]]))
    assert spans(empty, drawn(1, 3, 4))[2].tolist() == [[True, False, False]]


@pytest.mark.parametrize("use", BOTH)
def test_distributions_of_two_vocabularies_come_together(use: str) -> None:
    student, teacher = drawn(1, 3, 4).requires_grad_(), drawn(1, 2, 3, seed=1)
    objective = made(use)
    optimiser = torch.optim.Adam([student], 0.1)
    losses = []
    for _ in range(150):
        term = objective({"logits": student}, {"logits": teacher}, TEXT, Step(0, 1, 0))
        losses.append(float(term.sum / term.count))
        optimiser.zero_grad()
        term.sum.backward()
        assert torch.isfinite(student.grad).all()
        optimiser.step()
    assert losses[-1] < 0.01 * losses[0]
    with torch.no_grad():
        wanted, found = teacher[0, 0, [0, 2]].softmax(-1), student[0, 0, [2, 3]].softmax(-1)
        if use == "vocab-match":
            assert torch.allclose(found, wanted, atol=0.02)


@pytest.mark.parametrize("use", BOTH)
def test_vocabularies_that_nobody_names_are_refused(use: str) -> None:
    with pytest.raises(StageError, match="which tokens of both"):
        evaluate(use, drawn(1, 3, 4), drawn(1, 3, 5), Batch(None, torch.ones(1, 3)))
    with pytest.raises(StageError, match="token by token"):
        evaluate(use, STUDENT, TEACHER)
