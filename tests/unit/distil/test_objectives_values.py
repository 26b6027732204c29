"""Golden values (float64, two independent computations), identities and limits of the objectives."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from compressor.distil.objectives import divergence, features, relations  # noqa: E402
from compressor.distil.objectives.base import Batch, Context, Step  # noqa: E402
from compressor.distil.objectives.registry import get  # noqa: E402
from compressor.recipe import Match  # noqa: E402

pytestmark = pytest.mark.train

TEACHER = torch.tensor([[2.0, 1, 0, -1], [0, 3, 1, -2], [1, 1, 2, 0]])
STUDENT = torch.tensor([[1.0, 0, 0.5, -0.5], [0.5, 1, 0, 0], [0, 2, 1, -1]])
TEACHER_FEATURES = torch.tensor([[1.0, 0, 2], [0, 1, 1], [2, 2, 0]])
NARROW = torch.tensor([[0.5, 1.0], [1, 0], [1, 2]])
SAME_WIDTH = torch.tensor([[1.0, 1, 1], [0, 2, 1], [1, 2, 1]])
MINILM_TEACHER = torch.tensor([[1.0, 0, 2, 1], [0, 1, 1, -1], [2, 2, 0, 0]])

LOGITS = [
    ("kd", {"temperature": 1}, 0.34126877200669997),
    ("kd", {"temperature": 2}, 0.4954741358952464),
    ("kd", {"temperature": 4}, 0.5681496656332649),
    ("reverse-kl", {}, 0.4834596498005526),
    ("soft-ce", {}, 1.2306494413218705),
    ("symmetric-kl", {}, 0.4123642109036263),
    ("jsd", {"beta": 0.1}, 0.030992397587775982),
    ("jsd", {"beta": 0.5}, 0.09236130326620784),
    ("jsd", {"beta": 0.9}, 0.03937111522240617),
    ("skew-kl", {}, 0.28187941746119916),
    ("skew-kl", {"reverse": True}, 0.3286294511148781),
    ("tvd", {}, 0.3725772933966005),
]
FEATURES = [
    ("hidden", SAME_WIDTH, 5 / 9),
    ("squarehead", SAME_WIDTH, 1 / 3),
    ("cosine", SAME_WIDTH, 0.13689820964118804),
    ("rkd-distance", NARROW, 0.04134908988176577),
    ("rkd-angle", NARROW, 0.08002865623575835),
]


def value(name, options, student, teacher, mask=None, match=None):
    """sum / count of one objective on one batch of signals."""
    loaded = get(name)
    objective = loaded(loaded.Options.model_validate(options), match)
    offered = {"logits": 1, "hidden": 1, "qkv": 1}
    assert objective.bind(offered, offered) == []
    objective.prepare(Context(student, teacher, torch.Generator().manual_seed(0), "cpu"))
    term = objective(student, teacher, Batch(None, mask), Step(0, 1, 0))
    return float(term.sum / term.count)


@pytest.mark.parametrize(("name", "options", "expected"), LOGITS)
def test_logit_objectives_have_the_golden_values(name, options, expected):
    assert value(name, options, {"logits": STUDENT}, {"logits": TEACHER}) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("name", "student", "expected"), FEATURES)
def test_feature_objectives_have_the_golden_values(name, student, expected):
    found = value(name, {}, {"hidden[0]": student}, {"hidden[0]": TEACHER_FEATURES})
    assert found == pytest.approx(expected, abs=1e-5)


def qkv(hidden, heads):
    """The same states as query, key and value: (3, 1, heads, T, d)."""
    tokens, width = hidden.shape
    return hidden.view(1, 1, tokens, heads, width // heads).transpose(2, 3).repeat(3, 1, 1, 1, 1)


def test_minilm_relations_have_the_golden_value_a_relation():
    found = value("minilm-relations", {"heads": 2}, {"qkv[0]": qkv(NARROW, 1)}, {"qkv[0]": qkv(MINILM_TEACHER, 2)})
    assert found / 3 == pytest.approx(0.5554648117884994, abs=1e-5)


def test_relation_heads_are_cut_from_the_concatenated_width():
    one = features.relation_divergence(qkv(MINILM_TEACHER, 4), qkv(NARROW, 1), 2)
    other = features.relation_divergence(qkv(MINILM_TEACHER, 1), qkv(NARROW, 2), 2)
    assert torch.allclose(one, other)


@pytest.mark.parametrize("name", ["hidden", "cosine", "squarehead", "rkd-distance", "minilm-relations"])
def test_padding_changes_nothing(name):
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    key = "qkv[0]" if name.startswith("minilm") else "hidden[0]"
    shape = (3, 2, 2, 5, 4) if name.startswith("minilm") else (2, 5, 8)
    student, teacher = torch.randn(shape), torch.randn(shape)
    before = value(name, {}, {key: student}, {key: teacher}, mask)
    padded = (mask == 0)[None, :, None, :, None] if name.startswith("minilm") else (mask == 0)[..., None]
    other = torch.where(padded, torch.randn(shape) * 50, student)
    assert value(name, {}, {key: other}, {key: teacher}, mask) == pytest.approx(before, rel=1e-5)


def test_identities_between_divergences():
    torch.manual_seed(1)
    p, q = torch.randn(200, 7) * 2, torch.randn(200, 7) * 2
    kl = divergence.forward_kl(p, q)
    assert (divergence.skew_kl(p, q, alpha=0.1) <= 0.9 * kl + 1e-6).all()  # convexity
    assert (divergence.total_variation(p, q) ** 2 <= 0.5 * kl + 1e-6).all()  # Pinsker
    jsd = divergence.jensen_shannon(p, q)
    assert (jsd >= 0).all()
    assert torch.allclose(jsd, divergence.jensen_shannon(q, p), atol=1e-6)
    entropy = divergence.soft_cross_entropy(p, p)
    assert torch.allclose(divergence.soft_cross_entropy(p, q) - entropy, kl, atol=1e-5)
    assert torch.allclose(divergence.reverse_kl(p, q), divergence.forward_kl(q, p))


def test_soft_ce_and_kd_have_the_same_gradient():
    gradients = []
    for name in ("kd", "soft-ce"):
        student = STUDENT.clone().requires_grad_()
        loaded = get(name)
        objective = loaded(loaded.Options(temperature=3.0))
        objective({"logits": student}, {"logits": TEACHER}, Batch(None, None), Step(0, 1, 0)).sum.backward()
        gradients.append(student.grad)
    assert torch.allclose(*gradients, atol=1e-6)


def test_sequence_logits_average_over_real_tokens():
    logits = torch.stack([TEACHER, TEACHER]), torch.stack([STUDENT, STUDENT])
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    found = value("kd", {"temperature": 1}, {"logits": logits[1]}, {"logits": logits[0]}, mask)
    assert found == pytest.approx(0.34126877200669997, abs=1e-5)


def test_relational_losses_ignore_rotation_and_scale():
    torch.manual_seed(2)
    e = torch.randn(6, 5)
    rotation = torch.linalg.qr(torch.randn(5, 5)).Q
    assert torch.allclose(relations.distances(e), relations.distances(3 * e @ rotation), atol=1e-5)
    assert torch.allclose(relations.angles(e), relations.angles(e @ rotation), atol=1e-5)


def test_equal_samples_give_finite_gradients():
    e = torch.ones(4, 3, requires_grad=True)
    (relations.distances(e).sum() + relations.angles(e).sum()).backward()
    assert torch.isfinite(e.grad).all()


def test_squarehead_ignores_a_common_scale():
    one = value("squarehead", {}, {"hidden[0]": SAME_WIDTH}, {"hidden[0]": TEACHER_FEATURES})
    other = value("squarehead", {}, {"hidden[0]": 7 * SAME_WIDTH}, {"hidden[0]": 7 * TEACHER_FEATURES})
    assert one == pytest.approx(other, rel=1e-6)


def test_feature_maps_of_other_width_and_size_are_projected_and_pooled():
    student, teacher = torch.randn(2, 3, 8, 8), torch.randn(2, 6, 4, 4)
    objective = get("hidden")(None, Match(student="hidden[-1]", teacher="hidden[-1]"))
    objective.bind({"hidden": 1}, {"hidden": 1})
    objective.prepare(Context({"hidden[0]": student}, {"hidden[0]": teacher}, torch.Generator().manual_seed(0), "cpu"))
    (project,) = objective.modules()
    assert project.weight.shape == (6, 3, 1, 1)
    term = objective({"hidden[0]": student}, {"hidden[0]": teacher}, Batch(None, None), Step(0, 1, 0))
    small = torch.nn.functional.adaptive_avg_pool2d(student, 4)
    assert float(term.sum / term.count) == pytest.approx(float((project(small) - teacher).square().mean()), rel=1e-5)
