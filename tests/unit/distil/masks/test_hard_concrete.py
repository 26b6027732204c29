"""The distribution of learnt masks: exact values, probabilities that samples agree with, and what is settled."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from compressor.distil.masks.hard_concrete import (  # noqa: E402
    log_alpha_of,
    noise,
    open_probability,
    sampled,
    settled,
)

pytestmark = pytest.mark.train


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_values_by_hand():
    log_alpha, uniform = torch.tensor([0.3, -4.0, 9.0]), torch.tensor([0.2, 0.5, 0.5])
    soft = sigmoid((math.log(0.2) - math.log(0.8) + 0.3) / (2 / 3)) * 1.2 - 0.1
    assert sampled(log_alpha, uniform).tolist() == pytest.approx([soft, 0.0, 1.0])
    assert float(open_probability(torch.tensor(0.3))) == pytest.approx(sigmoid(0.3 + 2 / 3 * math.log(11)))
    assert log_alpha_of(0.9) == pytest.approx(math.log(9))


@pytest.mark.parametrize("log_alpha", [-3.0, -1.0, 0.5, 2.0])
def test_the_probability_is_that_of_the_samples(log_alpha):
    uniform = noise(20_000, torch.Generator().manual_seed(1))
    values = sampled(torch.full((20_000,), log_alpha), uniform)
    share = float((values > 0).float().mean())
    assert share == pytest.approx(float(open_probability(torch.tensor(log_alpha))), abs=0.012)
    assert float(values.min()) >= 0
    assert float(values.max()) <= 1


def test_settled_masks_drop_as_many_as_expected_and_keep_the_likeliest():
    log_alpha = torch.tensor([2.0, -6.0, 1.0, -5.0, 0.5, -7.0])
    kept = float(open_probability(log_alpha).sum())
    found = settled(log_alpha)
    assert int((found > 0).sum()) == round(kept) == 3
    assert found[[0, 2, 4]].tolist() == pytest.approx([sigmoid(x * 1.5 * 0.8) for x in (2.0, 1.0, 0.5)])
    assert int((settled(log_alpha, 4) > 0).sum()) == 4
    assert int((settled(torch.full((6,), -9.0)) > 0).sum()) == 0


def test_only_what_lies_between_the_ends_has_a_gradient():
    log_alpha = torch.tensor([0.0, 9.0, -9.0], requires_grad=True)
    sampled(log_alpha, torch.full((3,), 0.5)).sum().backward()
    assert float(log_alpha.grad[0]) == pytest.approx(0.25 * 1.2 * 1.5)
    assert log_alpha.grad[1:].tolist() == [0.0, 0.0]
