"""Golden values and identities of the objectives on lists of scores and on embeddings."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from compressor.distil.objectives import contrast, lists  # noqa: E402
from compressor.distil.objectives.base import Batch, Step  # noqa: E402
from compressor.errors import StageError  # noqa: E402
from compressor.recipe import Match  # noqa: E402
from tests.unit.distil.objectives.cases import (  # noqa: E402
    FIRST,
    GOLDEN,
    STUDENT,
    TEACHER,
    evaluate,
    gradient,
    made,
    value,
)

pytestmark = pytest.mark.train
NONE = Batch(None, None)
HIDDEN = Match(student="hidden[-1]", teacher="hidden[-1]", proj="none")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("margin-mse", GOLDEN["margin mse"]),
        ("rank-net", GOLDEN["ranknet over pairs zT_i>zT_j"]),
        ("list-kl", GOLDEN["kd tau=1 (x tau^2)"]),
    ],
)
def test_golden_values_of_lists(name, expected):
    assert value(name, STUDENT, TEACHER, NONE) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "student", "teacher", "batch", "expected"),
    [
        ("score-mse", [[0.0, 3]], [[2.0, 1]], NONE, 16.0),
        ("self-ensemble", [[1.0, 0]], [[0.0]], NONE, 0.447732),
        ("adaptive-margin", [[1.0, 0], [1, 0], [0, 1]], [[0.0]], Batch(None, None, groups=torch.zeros(3)), 0.25),
        ("embedding-mse", [[3.0, 4]], [[1.0, 0]], NONE, 0.8),
        ("similarity", [[1.0, 0], [0, 1]], [[1.0, 0], [1, 0]], NONE, 0.5),
    ],
)
def test_worked_numbers(name, student, teacher, batch, expected):
    assert value(name, torch.tensor(student), torch.tensor(teacher), batch) == pytest.approx(expected, abs=1e-5)


def test_worked_numbers_of_contrast():
    eye, groups = torch.eye(2), torch.tensor([0, 0, 1, 1])
    options = {"temperature": 1.0}
    assert value("contrastive", eye, eye, NONE, options) == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-5)
    found = value(
        "additive-margin",
        eye.repeat_interleave(2, 0),
        eye,
        Batch(None, None, groups=groups),
        {
            "margin": 0.0,
            "scale": 1.0,
        },
    )
    assert found == pytest.approx(2 * math.log(1 + math.exp(-1)), rel=1e-5)
    one, other = torch.tensor([[[[1.0, 0]]]]), torch.tensor([[[[0.0, 1]]]])
    assert value("nst", one, other, NONE, match=HIDDEN, signal="hidden[0]") == pytest.approx(2.0)


# --- lists


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_groups_become_lines_in_their_order(numbers):
    rows = torch.arange(len(numbers), dtype=torch.float32) + 1
    found, keep = lists.padded(rows, torch.tensor(numbers))
    for line, number in enumerate(sorted(set(numbers))):
        expected = [float(i + 1) for i, other in enumerate(numbers) if other == number]
        assert found[line][keep[line]].tolist() == expected


@pytest.mark.parametrize("name", ["margin-mse", "score-mse", "rank-net", "list-kl"])
def test_one_score_a_row_is_the_same_as_lists(name):
    groups = torch.arange(3).repeat_interleave(4)
    expected = value(name, STUDENT, TEACHER, NONE)
    batch = Batch(None, None, groups=groups, scores=TEACHER.reshape(-1))
    assert value(name, STUDENT.reshape(-1, 1), TEACHER.reshape(-1), batch) == pytest.approx(expected, rel=1e-5)
    offline = {"teacher": "offline"}
    objective = made(name, offline)
    assert objective.needs.teacher == frozenset()
    term = objective({"logits": STUDENT.reshape(-1)}, {}, batch, FIRST)
    assert float(term.sum / term.count) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["margin-mse", "score-mse", "rank-net", "list-kl"])
def test_shorter_lists_are_not_filled_up(name):
    long, short = (torch.tensor([[1.0, 0.5, -1]]), torch.tensor([[0.2, 0.9]])), (torch.randn(1, 3), torch.randn(1, 2))
    rows = [torch.cat([x.reshape(-1) for x in side]) for side in (long, short)]
    batch = Batch(None, None, groups=torch.tensor([0, 0, 0, 1, 1]))
    objective = made(name)
    whole = objective({"logits": rows[0]}, {"logits": rows[1]}, batch, FIRST)
    parts = [
        made(name)({"logits": a}, {"logits": b}, _one_group(a), FIRST)
        for a, b in zip((x.reshape(-1) for x in long), (x.reshape(-1) for x in short), strict=True)
    ]
    assert float(whole.sum) == pytest.approx(sum(float(p.sum) for p in parts), rel=1e-5)
    assert float(whole.count) == sum(float(p.count) for p in parts)


def _one_group(rows):
    return Batch(None, None, groups=torch.zeros(len(rows), dtype=torch.int64))


def test_a_dense_retriever_learns_from_scores_of_pairs():
    vectors = torch.tensor([[1.0, 0], [2, 1], [0, 3], [0.5, 0.5]])
    batch = Batch(None, None, groups=torch.zeros(4, dtype=torch.int64), scores=torch.tensor([9.0, 2.0, 0.0, 0.5]))
    expected = ((2.0 - 0.0) - (2.0 - 0.0)) ** 2 / 2 + ((2.0 - 0.5) - (2.0 - 0.5)) ** 2 / 2
    for options in ({"student": "dot", "teacher": "offline"}, {"student": "dot"}):
        assert value("margin-mse", vectors, batch.scores, batch, options) == pytest.approx(expected)
    moved = Batch(None, None, groups=batch.groups, scores=batch.scores + 7)  # a constant for each query
    assert value("margin-mse", vectors, moved.scores, moved, {"student": "dot"}) == pytest.approx(expected)


def test_embeddings_without_groups_are_refused():
    with pytest.raises(StageError, match="without groups"):
        value("margin-mse", STUDENT, TEACHER, NONE, {"student": "cosine"})
    with pytest.raises(StageError, match="offline scores"):
        value("list-kl", STUDENT, TEACHER, NONE, {"teacher": "offline"})


def test_self_ensemble_follows_the_published_weights_and_stops_the_gradient():
    torch.manual_seed(0)
    scores = torch.randn(5, 3, 4)
    options = {"ensemble": "1, 0.3, 1", "terms": "1, 0.1, 1"}
    dense, sparse, multi = scores.unbind(1)
    whole = dense + 0.3 * sparse + multi
    losses = [F.cross_entropy(x, torch.zeros(5, dtype=torch.int64)) for x in (dense, sparse, multi, whole)]
    taught = [-(whole.softmax(-1) * x.log_softmax(-1)).sum(-1).mean() for x in (dense, sparse, multi)]
    labels = (losses[0] + losses[3] + 0.1 * losses[1] + losses[2]) / 4
    expected = 0.5 * (labels + (taught[0] + 0.1 * taught[1] + taught[2]) / 3)
    assert value("self-ensemble", scores, scores, NONE, options) == pytest.approx(float(expected), rel=1e-5)
    early = value("self-ensemble", scores, scores, NONE, options | {"warmup": 5}, step=Step(4, 10, 0))
    assert early == pytest.approx(float(0.5 * labels), rel=1e-5)
    with pytest.raises(StageError, match="2 weights for 3 views"):
        value("self-ensemble", scores, scores, NONE, {"terms": "1, 2"})


def test_the_adaptive_margin_can_stop_at_its_target():
    torch.manual_seed(0)
    vectors, batch = torch.randn(6, 4), Batch(None, None, groups=torch.tensor([0, 0, 0, 1, 1, 1]))
    flowing = gradient("adaptive-margin", vectors, vectors, batch=batch)
    stopped = gradient("adaptive-margin", vectors, vectors, batch=batch, options={"stop_target": True})
    assert torch.allclose(flowing[[0, 3]], stopped[[0, 3]], atol=1e-6)  # the query stands in the margin alone
    assert not torch.allclose(flowing[[1, 4]], stopped[[1, 4]], atol=1e-4)
    assert value("adaptive-margin", vectors, vectors, batch, {"distributed": True}) > 0


# --- embeddings


def test_similarities_ignore_rotation_and_width():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 4), torch.randn(5, 7)
    rotation = torch.linalg.qr(torch.randn(4, 4)).Q
    for compare in ("mse", "kl", "cosine"):
        options = {"compare": compare}
        one = value("similarity", student, teacher, NONE, options)
        assert value("similarity", 3 * student @ rotation, teacher, NONE, options) == pytest.approx(one, rel=1e-4)
        wider = F.pad(teacher, (0, 3))
        assert value("similarity", teacher, wider, NONE, options) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("compare", ["mse", "kl", "cosine"])
def test_similarity_of_tokens_leaves_padding_out(compare):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 4), torch.randn(2, 5, 6)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    named = {"options": {"compare": compare, "over": "tokens"}, "match": HIDDEN, "signal": "hidden[0]"}
    one = value("similarity", student, teacher, Batch(None, mask), **named)
    dirty = torch.where((mask == 0)[..., None], torch.full_like(student, 50.0), student)
    assert value("similarity", dirty, teacher, Batch(None, mask), **named) == pytest.approx(one, rel=1e-5)
    alone = value("similarity", student[:1, :3], teacher[:1, :3], Batch(None, None), **named)
    rest = value("similarity", student[1:], teacher[1:], Batch(None, None), **named)
    assert one == pytest.approx((alone + rest) / 2, rel=1e-5)


def test_clip_similarity_takes_rows_and_columns():
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 4), torch.randn(6, 3)
    batch = Batch(None, None, groups=torch.tensor([0, 1, 2, 0, 1, 2]))  # pictures, then texts
    found = value("similarity", student, teacher, batch, {"compare": "kl", "pairs": True, "temperature": 0.1})
    own, other = ((F.normalize(x[:3], dim=-1) @ F.normalize(x[3:], dim=-1).T) / 0.1 for x in (student, teacher))
    expected = sum(
        F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="batchmean") for a, b in ((own, other), (own.T, other.T))
    )
    assert found == pytest.approx(float(expected) / 2, rel=1e-4)


def test_contrast_across_pairs_is_symmetric_cross_entropy():
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 4), torch.randn(6, 4)
    batch = Batch(None, None, groups=torch.tensor([0, 0, 1, 1, 2, 2]))
    found = value("contrastive", student, teacher, batch, {"cross": True, "temperature": 0.5})
    s, t = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    target = torch.arange(3)
    expected = F.cross_entropy(s[0::2] @ t[1::2].T / 0.5, target) + F.cross_entropy(s[1::2] @ t[0::2].T / 0.5, target)
    assert found == pytest.approx(float(expected) / 2, rel=1e-5)


def test_a_queue_adds_negatives_and_goes_through_a_checkpoint():
    torch.manual_seed(0)
    batches = [(torch.randn(3, 4), torch.randn(3, 4)) for _ in range(4)]
    signals = ({"logits": batches[0][0]}, {"logits": batches[0][1]})
    objective = made("contrastive", {"queue": 5}, None, *signals)

    def run(item, number):
        term = objective({"logits": batches[number][0]}, {"logits": batches[number][1]}, NONE, Step(number, 4, 0))
        return float(term.sum / term.count)

    first = run(objective, 0)
    assert first == pytest.approx(value("contrastive", *batches[0], NONE), rel=1e-6)  # an empty queue is none
    run(objective, 1)
    seen = {tuple(row) for row in objective.modules()[1].seen().tolist()}
    recent = torch.cat([batches[0][1], batches[1][1]])[-5:]
    assert seen == {tuple(row) for row in recent.tolist()}
    state = {key: tensor.clone() for key, tensor in objective.modules().state_dict().items()}
    expected = run(objective, 2)
    assert expected == pytest.approx(
        float(contrast.info_nce(*batches[2], 0.05, objective_memory(state)).mean()), rel=1e-6
    )
    objective = made("contrastive", {"queue": 5}, None, *signals)
    objective.modules().load_state_dict(state)
    assert run(objective, 2) == expected


def objective_memory(state):
    return next(tensor for key, tensor in state.items() if key.endswith("vectors"))


def test_a_queue_takes_one_pair_of_signals_only():
    from compressor.distil.objectives.registry import get

    loaded = get("contrastive")
    objective = loaded(loaded.Options(queue=5, scales="1,2"))
    assert objective.bind({"logits": 1}, {"logits": 1}) == [
        "`queue` needs one pair of signals, scales 1 and cross false"
    ]


def test_scales_make_each_place_a_sample():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    named = {"match": HIDDEN, "signal": "hidden[0]"}
    found = value("contrastive", student, teacher, NONE, {"scales": "1,2", "temperature": 0.1}, **named)
    expected = 0.0
    for size in (1, 2):
        own, other = (F.adaptive_avg_pool2d(x, size).permute(0, 2, 3, 1).reshape(-1, 3) for x in (student, teacher))
        expected += float(contrast.info_nce(own, other, 0.1).mean())
    assert found == pytest.approx(expected, rel=1e-5)


def test_neuron_selectivity_ignores_which_channel_fires():
    torch.manual_seed(0)
    teacher = torch.randn(2, 5, 4, 4)
    named = {"match": HIDDEN, "signal": "hidden[0]"}
    shuffled = teacher[:, torch.randperm(5)]
    assert value("nst", shuffled, teacher, NONE, **named) == pytest.approx(0.0, abs=1e-6)
    assert value("nst", torch.randn(2, 3, 4, 4), teacher, NONE, **named) > 0
    assert torch.isfinite(gradient("nst", torch.zeros(2, 3, 4, 4), teacher, batch=NONE, **named)).all()


def test_quantization_features_ignore_the_length_of_hidden_states():
    """The off-line feature term of ternary models is `cosine` on all layers without a projection."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    named = {"match": Match(proj="none"), "signal": "hidden[0]"}
    one = value("cosine", student, teacher, Batch(None, torch.ones(2, 3)), **named)
    assert value("cosine", 9 * student, teacher, Batch(None, torch.ones(2, 3)), **named) == pytest.approx(one, rel=1e-5)
    assert float(evaluate("cosine", teacher, 4 * teacher, NONE, **named)) == pytest.approx(0.0, abs=1e-6)
