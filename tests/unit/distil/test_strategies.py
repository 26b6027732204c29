"""Data strategies: what is kept, drawn, labelled and blended; the robust query equals the linear program."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from compressor.distil.strategies.draws import Draw, Stream, domains, mixture  # noqa: E402
from compressor.distil.strategies.pool import Pool, recommended_alpha  # noqa: E402
from compressor.distil.strategies.robust import draw_exactly, robust_probabilities  # noqa: E402
from compressor.distil.stream import UNLABELLED, TrainingSet  # noqa: E402
from compressor.recipe import DistilStage  # noqa: E402
from tests.unit.distil.toy import Pictures  # noqa: E402

pytestmark = pytest.mark.train


def training_set(train=40, transfer=60):
    return TrainingSet([Pictures("train", train, 1), Pictures("transfer", transfer, 2, labelled=False)])


def stage(*strategies, **more):
    return DistilStage.model_validate({"kind": "distil", "batch": 8, "strategy": list(strategies)} | more)


def judge(data, sure):
    """Logits of 4 classes whose largest probability grows with ``sure``; the class is position mod 4."""

    def logits(positions):
        found = torch.zeros(len(positions), 4)
        found[torch.arange(len(positions)), torch.from_numpy(positions % 4)] = torch.from_numpy(sure[positions]).float()
        return found, None

    return logits


def applied(data, sure, *strategies, labels_only=False, seed=5):
    seen = []
    pool = Pool(data, judge(data, sure), judge(data, sure), seed, lambda kind, fields: seen.append(fields["text"]))
    pool.apply(stage(*strategies).strategy, labels_only=labels_only)
    return pool, seen


def test_filter_keeps_the_surest_transfer_samples_and_all_labelled_ones():
    data, sure = training_set(), np.random.default_rng(0).uniform(0, 5, 100)
    pool, seen = applied(data, sure, {"use": "filter", "keep": 0.25})
    kept = pool.kept[data.owners[pool.kept] == 1]
    assert (data.owners[pool.kept] == 0).sum() == 40
    assert set(kept) == set(40 + np.argsort(-sure[40:])[:15])
    assert seen == ["filter: 15 of 60 samples stay"]


@pytest.mark.parametrize("score", ["confidence", "margin", "log-prob"])
def test_a_threshold_is_of_the_score(score):
    data, sure = training_set(), np.linspace(0, 5, 100)
    best = np.exp(sure) / (np.exp(sure) + 3)
    values = {"confidence": best, "margin": best - 1 / (np.exp(sure) + 3), "log-prob": np.log(best)}[score]
    pool, _ = applied(data, sure, {"use": "filter", "score": score, "threshold": float(values[70]) - 1e-4})
    assert pool.kept[pool.kept >= 40].tolist() == list(range(70, 100))


def test_pseudo_labels_where_the_teacher_is_sure_and_never_for_the_twin():
    data, sure = training_set(), np.linspace(0, 5, 100)
    threshold = float(np.exp(sure[80]) / (np.exp(sure[80]) + 3)) - 1e-4
    pool, _ = applied(data, sure, {"use": "pseudo-label", "threshold": threshold})
    assert (pool.labels[:40] == data.labels[:40]).all()
    assert (pool.labels[40:80] == UNLABELLED).all()
    assert (pool.labels[80:] == np.arange(80, 100) % 4).all()
    twin, _ = applied(data, sure, {"use": "pseudo-label"}, labels_only=True)
    assert (twin.labels == data.labels).all()


def test_a_subset_is_random_seeded_and_tells_the_weight():
    data, sure = training_set(), np.zeros(100)
    one, notes = applied(data, sure, {"use": "subset", "fraction": 0.1})
    again, _ = applied(data, sure, {"use": "subset", "fraction": 0.1})
    other, _ = applied(data, sure, {"use": "subset", "fraction": 0.1}, seed=6)
    assert len(one.kept) == 10
    assert (one.kept == again.kept).all()
    assert not np.array_equal(one.kept, other.kept)
    assert "0.95" in notes[1]
    assert recommended_alpha(1.0) == 0.5 < recommended_alpha(0.3) < recommended_alpha(0.05)


def test_what_is_taken_is_addressed_anew():
    data = training_set()
    taken = data.take(np.array([3, 50, 7]), np.arange(100))
    assert taken.labels.tolist() == [3, 50, 7]
    assert taken.owners.tolist() == [0, 1, 0]
    assert torch.equal(taken.batch(np.array([1, 2]))["image"], data.batch(np.array([50, 7]))["image"])
    assert taken.take(np.array([2])).batch(np.array([0]))["image"].equal(data.batch(np.array([7]))["image"])
    assert taken.digest == data.take(np.array([3, 50, 7])).digest != data.digest


def linear_program(gains, budget, wrong):
    """max t-form: maximise sum_i z_i - wrong * t, z_i <= p_i g_i, z_i <= t, sum p = budget, p in [0, 1]."""
    from scipy.optimize import linprog

    n = len(gains)
    cost = np.concatenate([np.zeros(n), -np.ones(n), [wrong]])
    below = np.zeros((2 * n, 2 * n + 1))
    below[:n, :n], below[:n, n : 2 * n] = -np.diag(gains), np.eye(n)
    below[n:, n : 2 * n], below[n:, -1] = np.eye(n), -1
    equal = np.concatenate([np.ones(n), np.zeros(n + 1)])[None]
    found = linprog(cost, below, np.zeros(2 * n), equal, [budget], [(0, 1)] * n + [(None, None)] * n + [(0, None)])
    return -found.fun


def left_after_the_adversary(probabilities, gains, wrong):
    products = np.sort(probabilities * gains)[::-1]
    return products.sum() - products[:wrong].sum()


@pytest.mark.parametrize("seed", range(12))
def test_the_robust_query_is_the_optimum_of_the_linear_program(seed):
    random = np.random.default_rng(seed)
    n = int(random.integers(3, 9))
    gains = random.uniform(0.05, 1.0, n)
    budget = int(random.integers(1, n))
    wrong = int(random.integers(0, budget + 1))
    found = robust_probabilities(gains, budget, wrong)
    assert found.sum() == pytest.approx(budget)
    assert found.min() >= 0
    assert found.max() <= 1 + 1e-12
    assert left_after_the_adversary(found, gains, wrong) == pytest.approx(
        linear_program(gains, budget, wrong), abs=1e-7
    )


def test_without_caps_the_probabilities_go_as_one_over_the_gain():
    gains = np.array([1.0, 0.8, 0.5, 0.4, 0.01])
    found = robust_probabilities(gains, 1, 2)
    top = found > 1e-9
    assert top.sum() > 2
    assert np.ptp((found * gains)[top]) < 1e-6


def test_exactly_the_budget_is_drawn_with_these_chances():
    chances = np.array([1.0, 0.5, 0.25, 0.25, 0.75, 0.25])
    drawn = [draw_exactly(chances, np.random.default_rng(seed)) for seed in range(2000)]
    assert {len(item) for item in drawn} == {3}
    seen = np.bincount(np.concatenate(drawn), minlength=6) / 2000
    assert np.abs(seen - chances).max() < 0.04


def test_a_query_leaves_the_budget_and_every_label():
    data, sure = training_set(), np.random.default_rng(1).uniform(0, 5, 100)
    pool, _ = applied(data, sure, {"use": "query", "budget": 12})
    assert (pool.kept < 40).sum() == 40
    assert (pool.kept >= 40).sum() == 12
    unsure = sure[40:].mean()
    assert sure[pool.kept[pool.kept >= 40]].mean() < unsure


def stream(data, config, losses=None):
    return Stream(data, config, 7, losses, lambda values: values)


def test_select_takes_what_is_hard_for_the_student_and_easy_for_the_teacher():
    data = training_set()
    gap = np.random.default_rng(2).normal(size=100)
    made = stream(data, stage({"use": "select", "discard": 0.5}), lambda at: (gap[at], np.zeros(len(at))))
    order = data.order(0, 16, 7)
    draws = list(made.epoch(0, 0))
    assert made.steps == len(draws) == len(order) == 7
    for draw, batch in zip(draws, order, strict=True):
        assert len(draw.positions) == max(2, min(8, round(len(batch) / 2)))
        assert gap[draw.positions].min() >= gap[batch[~np.isin(batch, draw.positions)]].max()
    assert made.forwards == 100
    twin = list(stream(data, stage({"use": "select", "discard": 0.5})).epoch(0, 0))
    assert [len(draw.positions) for draw in twin] == [len(draw.positions) for draw in draws]


def test_a_resumed_epoch_draws_what_was_left():
    data = training_set()
    config = stage({"use": "mixup"}, {"use": "select", "discard": 0.5})
    losses = lambda at: (np.sin(at), np.cos(at))  # noqa: E731
    whole = list(stream(data, config, losses).epoch(3, 0))
    rest = list(stream(data, config, losses).epoch(3, 4))
    assert len(rest) == len(whole) - 4
    for a, b in zip(whole[4:], rest, strict=True):
        assert a.step == b.step
        assert a.share == b.share
        assert np.array_equal(a.positions, b.positions)


def test_the_mixture_follows_the_ratio_of_perplexities():
    assert mixture(np.zeros(3), 0.5).tolist() == pytest.approx([1 / 3] * 3)
    gaps = np.log([1.0, 2.0])
    expected = np.exp([1.0, 2.0]) / np.exp([1.0, 2.0]).sum()
    assert mixture(gaps, 1.0) == pytest.approx(expected)
    assert mixture(gaps, 0.5) == pytest.approx(0.5 * expected + 0.25)
    assert mixture(np.array([500.0, 0.0]), 0.5) == pytest.approx([0.75, 0.25])


def test_domains_are_drawn_by_their_shares():
    data = training_set(400, 600)
    assert [len(part) for part in domains(data, "part")] == [400, 600]
    assert len(domains(data, "label")) == 5
    made = stream(
        data, stage({"use": "mix", "smoothing": 1.0}), lambda at: (np.where(at < 400, 1.5, 0.0), np.zeros(len(at)))
    )
    made.begin(0)
    drawn = np.concatenate([draw.positions for draw in made.epoch(0, 0)])
    assert len(drawn) == 1000
    assert (drawn < 400).mean() == pytest.approx(made.shares[0], abs=0.05)
    assert made.shares[0] > 0.9
    assert len(np.unique(drawn[drawn < 400])) == 400  # every sample once before one comes again


def test_mixup_partners_are_of_the_same_step_and_follow_their_pieces():
    data = training_set()
    draws = list(stream(data, stage({"use": "mixup", "alpha": 0.4})).epoch(1, 0))
    for draw in draws:
        assert sorted(draw.partners) == sorted(draw.positions)
        assert 0.5 <= draw.share <= 1
    pieces = draws[0].pieces(3)
    assert np.array_equal(np.concatenate([piece.partners for piece in pieces]), draws[0].partners)


def test_no_piece_has_a_single_sample():
    assert [len(piece.positions) for piece in Draw(0, np.arange(5)).pieces(4)] == [3, 2]
    assert [len(piece.positions) for piece in Draw(0, np.arange(1)).pieces(4)] == [1]
