"""Mechanism: a few gradient steps on free logits or features move what the method's paper says it moves.

Which check belongs to which objective, and which exact ones stand beside it, is listed in
``tests/data/objective_checks.toml``; ``test_checks.py`` keeps that list whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402

from compressor.distil.objectives.base import Batch, Step  # noqa: E402
from compressor.recipe import Match  # noqa: E402
from tests.unit.distil.objectives.cases import gradient, made  # noqa: E402

pytestmark = pytest.mark.train
NONE = Batch(None, None)
SAME = Match(student="hidden[-1]", teacher="hidden[-1]", proj="none")


def drawn(seed, *shape, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


CLASSES = torch.arange(12) % 5
LABELLED = Batch(CLASSES, None)
FREE, TAUGHT = drawn(1, 12, 5), drawn(2, 12, 5, scale=2.0)


def p(logits):
    return logits.softmax(-1)


def entropy(logits):
    return -(p(logits) * logits.log_softmax(-1)).sum(-1)


def kl(a, b):
    return (p(a) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1).mean()


def without_label(logits):
    return logits.masked_fill(F.one_hot(CLASSES, 5).bool(), -1000.0)


def centred(rows):
    return F.normalize(rows - rows.mean(-1, keepdim=True), dim=-1)


def cosines(e):
    return F.normalize(e, dim=-1) @ F.normalize(e, dim=-1).T


def spread(e):
    """Distances between samples in units of their mean."""
    d = torch.cdist(e, e)
    return d / d.mean()


def corners(e):
    unit = F.normalize(e[None] - e[:, None], dim=-1)
    return unit @ unit.transpose(-1, -2)


def places(maps):
    """Where channels fire, whichever they are: similarity of places, (B, HW, HW)."""
    unit = F.normalize(maps.flatten(2), dim=-1)
    return unit.transpose(1, 2) @ unit


def gap(of):
    """Mean absolute difference of a quantity between student and teacher."""
    return lambda s, t: (of(s) - of(t)).abs().mean()


def missed(s, t):
    """Share of samples whose own teacher embedding is not the nearest."""
    return ((F.normalize(s, dim=-1) @ F.normalize(t, dim=-1).T).argmax(1) != torch.arange(len(s))).float().mean()


@dataclass(frozen=True)
class Case:
    """``distance(student, teacher)`` falls below ``to`` times what it was."""

    says: str
    distance: Callable[[Any, Any], Any]
    options: dict[str, Any] = field(default_factory=dict)
    batch: Batch = NONE
    student: Any = FREE
    teacher: Any = TAUGHT
    match: Match | None = None
    signal: str = "logits"
    to: float = 0.3
    steps: int = 80


def maps(case_says, distance, shape=(10, 6), **more):
    student, teacher = drawn(3, *shape), drawn(4, *shape, scale=2.0)
    return Case(case_says, distance, student=student, teacher=teacher, match=SAME, signal="hidden[0]", **more)


CASES = {
    "kd": Case("the student's distribution is the teacher's, also at temperature 1", lambda s, t: kl(t, s)),
    "soft-ce": Case("the student is as unsure as the teacher", gap(entropy)),
    "reverse-kl": Case("the student puts no mass where the teacher has none", lambda s, t: kl(s, t)),
    "symmetric-kl": Case("both directions fall, without a label", lambda s, t: max(kl(s, t), kl(t, s))),
    "jsd": Case("the overlap of the distributions grows", gap(p)),
    "skew-kl": Case("the divergence itself falls, not its mixture alone", lambda s, t: kl(t, s), to=0.6),
    "tvd": Case("a draft would be accepted more often", lambda s, t: 1 - torch.minimum(p(s), p(t)).sum(-1).mean(),
                options={}, steps=200),
    "akl": Case("the gap in the teacher's first class closes, and in the others",
                lambda s, t: max((p(s) - p(t)).abs().amax(-1).mean(), kl(t, s))),
    "topk-kl": Case("the two classes that the teacher prefers get their probabilities",
                    lambda s, t: (p(s) - p(t)).abs().gather(1, t.topk(2).indices).mean(), {"k": 2, "tail": 0.0}),
    "dkd": Case("the other classes take the teacher's order of magnitude among themselves",
                lambda s, t: kl(without_label(t), without_label(s)), batch=LABELLED),
    "nkd": Case("the other classes take the teacher's proportions among themselves",
                lambda s, t: kl(without_label(t), without_label(s)), batch=LABELLED, steps=120),
    "dist": Case("what is correlated is the student's row and the teacher's",
                 lambda s, t: 1 - (centred(p(s)) * centred(p(t))).sum(-1).mean()),
    "taid": Case("the student ends at the teacher", lambda s, t: kl(t, s), {"start": 0.4}, to=0.6),
    "sinkhorn": Case("the cheapest way from each prediction to a teacher's gets shorter",
                     lambda s, t: torch.cdist(p(s), p(t), 1).amin(1).mean()),
    "multi-label": Case("each label's yes or no becomes the teacher's", gap(torch.sigmoid)),
    "uld": Case("sorted probabilities fall together, whichever tokens they belong to",
                gap(lambda z: p(z).sort(-1).values), steps=200),
    "dpkd": Case("there are fewer positions where both choose another token",
                 lambda s, t: (s.argmax(-1) != t.argmax(-1)).float().mean(), steps=200),
    "list-kl": Case("a list's probabilities become the teacher's", lambda s, t: kl(t, s)),
    "margin-mse": Case("margins become the teacher's; the scores need not",
                       lambda s, t: ((s[:, :1] - s) - (t[:, :1] - t)).abs().mean(), steps=150),
    "score-mse": Case("scores become the teacher's", gap(lambda z: z), steps=150),
    "rank-net": Case("there are fewer pairs in another order than the teacher's",
                     lambda s, t: ((s[..., None] > s[:, None]) != (t[..., None] > t[:, None])).float().mean(), to=0.05),
    "plackett-luce": Case("the teacher's order below the label", lambda s, t: (without_label(s).argsort(1)[:, 1:] !=
                          without_label(t).argsort(1)[:, 1:]).float().mean(), {"weights": "uniform"}, LABELLED, to=0.1),
    "embedding-mse": Case("embeddings turn to the teacher's", lambda s, t: 1 - F.cosine_similarity(s, t).mean()),
    "similarity": Case("who is similar to whom is the teacher's opinion", gap(cosines), steps=150),
    "contrastive": Case("a sample is nearest to its own teacher embedding", missed, to=0.1),
    "hidden": maps("features become the teacher's", gap(lambda h: h), steps=200),
    "cosine": maps("features turn to the teacher's; their length stays free",
                   lambda s, t: 1 - F.cosine_similarity(s, t).mean()),
    "squarehead": maps("the error falls relative to the teacher's size",
                       lambda s, t: (s - t).square().mean() / t.square().mean(), steps=150),
    "rkd-distance": maps("distances become proportional to the teacher's", gap(spread), steps=150),
    "rkd-angle": maps("angles between three samples become the teacher's", gap(corners), steps=150),
    "nst": maps("channels fire at the teacher's places, whichever channels they are", gap(places), (3, 4, 3, 3),
                steps=200, to=0.6),
}  # fmt: skip


def trained(case, name):
    """The free tensor after the steps."""
    leaf = case.student.clone().requires_grad_()
    objective = made(name, case.options, case.match, {case.signal: leaf.detach()}, {case.signal: case.teacher})
    optimiser = torch.optim.Adam([leaf], lr=0.1)
    for index in range(case.steps):
        term = objective({case.signal: leaf}, {case.signal: case.teacher}, case.batch, Step(index, case.steps, 0))
        optimiser.zero_grad()
        (term.sum / term.count).backward()
        optimiser.step()
    return leaf.detach()


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_named_quantity_moves(name):
    case = CASES[name]
    before, after = (float(case.distance(s, case.teacher)) for s in (case.student, trained(case, name)))
    assert after < case.to * before, f"{case.says}: {before:.4f} -> {after:.4f}"


# --- what divergences do to a student that cannot be its teacher


def fitted(name, steps=150, **options):
    """Entropy of the bell curve over 21 places that an objective fits to two separate peaks."""
    place = torch.arange(21.0)
    teacher = torch.log(torch.exp(-((place - 4) ** 2) / 2) + 0.8 * torch.exp(-((place - 16) ** 2) / 2) + 1e-6)[None]
    shape = torch.tensor([8.0, 2.0], requires_grad=True)
    objective, optimiser = made(name, options), torch.optim.Adam([shape], lr=0.1)
    for index in range(steps):
        logits = -((place - shape[0]) ** 2 / (2 * shape[1] ** 2))[None]
        optimiser.zero_grad()
        objective({"logits": logits}, {"logits": teacher}, NONE, Step(index, steps, 0)).sum.backward()
        optimiser.step()
    return float(entropy(-((place - shape[0]) ** 2 / (2 * shape[1] ** 2))[None]).detach())


def test_forward_kl_covers_both_peaks_and_reverse_kl_seeks_one():
    covers, seeks = fitted("kd", temperature=1.0), fitted("reverse-kl")
    assert seeks < covers - 0.5
    assert seeks - 0.05 <= fitted("symmetric-kl") <= covers + 0.05


def test_skewing_bounds_the_gradient_where_the_student_is_sure_of_the_wrong_class():
    sure, other = torch.tensor([[25.0, 0, 0]]), torch.tensor([[0.0, 25, 0]])
    value = [made(name)({"logits": sure}, {"logits": other}, NONE, Step(0, 1, 0)).sum for name in ("kd", "skew-kl")]
    assert float(value[1]) < 2.4 < 12 < float(value[0])  # log(1 / alpha) at most


def test_more_weight_on_the_other_classes_moves_them_faster():
    case = CASES["dkd"]
    few = Case("", case.distance, batch=LABELLED, steps=10)
    ends = [
        float(few.distance(trained(Case("", few.distance, {"beta": beta}, LABELLED, steps=10), "dkd"), TAUGHT))
        for beta in (0.0, 8.0)
    ]
    assert ends[1] < ends[0]


def test_a_label_is_taught_without_its_neighbours():
    grad = gradient("multi-label", torch.zeros(1, 3), torch.tensor([[0.0, 2.0, 0.0]]), batch=NONE)
    assert grad[0, [0, 2]].abs().max() == 0 < grad[0, 1].abs()


def test_the_interpolated_target_is_easier_at_first():
    norms = [gradient("taid", FREE, TAUGHT, batch=NONE, options={"start": start}).norm() for start in (0.1, 0.4, 1.0)]
    assert norms[0] < norms[1] < norms[2]


# --- lists and margins


def test_views_of_one_score_learn_from_their_sum():
    scores = drawn(5, 6, 3, 4)
    case = Case("", lambda s, _: kl(s.sum(1, keepdim=True).expand_as(s), s), student=scores, teacher=scores)
    assert case.distance(trained(case, "self-ensemble"), None) < 0.5 * case.distance(scores, None)


def test_margins_go_where_the_documents_put_them():
    """The published target is cos(d+, d-) / 2 + 1/2: it grows with how alike the two documents are."""
    vectors = drawn(7, 12, 6)
    batch = Batch(None, None, groups=torch.arange(12) // 3)

    def error(e, _=None):
        query, good, bad = F.normalize(e, dim=-1).view(4, 3, 6).unbind(1)
        margin, target = (query * good).sum(-1) - (query * bad).sum(-1), (good * bad).sum(-1) / 2 + 0.5
        return (margin - target).abs().mean()

    for stop in (False, True):
        case = Case("", error, {"stop_target": stop}, batch, vectors, vectors, steps=60)
        assert error(trained(case, "adaptive-margin")) < 0.2 * error(vectors)


def test_translations_come_nearer_than_anything_else_by_a_margin():
    vectors, groups = drawn(6, 12, 8), torch.arange(12) // 2
    batch = Batch(None, None, groups=groups)

    def lead(e):
        found = cosines(e)
        pairs = groups[:, None] == groups[None]
        own = found.masked_fill(~pairs | torch.eye(12, dtype=torch.bool), -2).amax(1)
        return (own - found.masked_fill(pairs, -2).amax(1)).amin()

    ends = [lead(trained(Case("", gap(p), {"margin": m}, batch, vectors, vectors, steps=60), "additive-margin"))
            for m in (0.0, 0.5)]  # fmt: skip
    assert ends[1] > ends[0] > lead(vectors)
    assert ends[1] > 0.5
