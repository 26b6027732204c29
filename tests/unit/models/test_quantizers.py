"""Quantizers: golden values, least-squares identities, hand-made gradients, and what is stored is what was trained."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from compressor.models import quantizers as q  # noqa: E402

pytestmark = pytest.mark.train
GOLDEN = torch.tensor([[0.9, -0.1, 0.05, -0.7, 0.3, -0.2]])


def rows(seed=0, shape=(64, 27)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_ternary_weights_have_the_golden_threshold_and_scale():
    codes, threshold = q.twn(GOLDEN)
    assert float(threshold) == pytest.approx(0.2625)
    assert float(codes.scale) == pytest.approx(0.6333333)
    assert codes.codes.tolist() == [[1, 0, 0, -1, 1, 0]]


def test_the_ternary_scale_is_the_least_squares_one_and_scales_with_the_weights():
    weights = rows()
    codes, _ = q.twn(weights)
    fitted = (weights * codes.codes).sum(1) / codes.codes.square().sum(1)
    assert torch.allclose(codes.scale[:, 0], fitted)
    assert torch.equal(q.twn(4 * weights)[0].codes, codes.codes)
    assert torch.equal(q.twn(torch.zeros(2, 3))[0].value, torch.zeros(2, 3))


def test_scale_and_shift_start_at_least_squares_and_never_lose_to_the_scale_alone():
    weights = rows(1) + 0.3 * rows(2, (64, 1))
    scale, shift = q.dlt_start(weights)
    codes = q.twn(weights)[0]
    for row in range(8):
        design = np.stack([codes.codes[row].numpy(), np.ones(27)], 1)
        want = np.linalg.lstsq(design, weights[row].numpy(), rcond=None)[0]
        assert [float(scale[row]), float(shift[row])] == pytest.approx(want.tolist(), abs=1e-5)
    with_shift = (scale * codes.codes + shift - weights).square().mean(1)
    assert bool((with_shift <= (codes.value - weights).square().mean(1) + 1e-9).all())


def test_scale_and_shift_lie_in_three_codes_a_row_and_both_learn():
    weights = rows(3).requires_grad_()
    scale, shift = (part.requires_grad_() for part in q.dlt_start(weights.detach()))
    ratio = (shift / scale).detach().requires_grad_()
    made = q.dlt(weights, scale, ratio)
    assert max(len(row.unique()) for row in made.codes.detach()) == 3
    assert float(made.codes.abs().max()) <= 127
    assert torch.allclose(made.value, scale * (q.twn(weights)[0].codes + ratio), atol=float(scale.max()) / 64)
    q.through(made.value, weights).sum().backward()
    ternary = q.twn(weights.detach())[0].codes
    assert torch.equal(weights.grad, torch.ones_like(weights))  # straight through
    assert torch.allclose(ratio.grad, 27 * scale.detach(), rtol=1e-5)
    snapped = (ratio.detach() * 64).round() / 64
    assert torch.allclose(scale.grad, (ternary + snapped).sum(1, keepdim=True), atol=1e-4)


def test_learnt_step_size_has_the_gradients_of_the_paper():
    weights = torch.tensor([[0.24, -3.0, 0.9, 0.06]], requires_grad=True)
    scale = torch.tensor([[0.25]], requires_grad=True)
    made = q.lsq(weights, scale, q.signed(3))
    assert made.codes.tolist() == [[1, -4, 3, 0]]
    made.value.backward(torch.ones(1, 4))
    assert weights.grad.tolist() == [[1, 0, 0, 1]]  # 0.9 / 0.25 = 3.6 lies beyond the last code as well
    inside = (1 - 0.24 / 0.25) + (0 - 0.06 / 0.25)
    assert float(scale.grad) == pytest.approx(inside - 4 + 3, abs=1e-6)


def test_the_first_step_size_has_the_least_error_of_those_tried():
    weights = rows(4)
    for bits in (2, 4, 8):
        limits = q.signed(bits, narrow=bits == 8)
        scale = q.least_error_scale(weights, limits)

        def error(step, limits=limits):
            return ((weights / step).round().clamp(limits.low, limits.high) * step - weights).square().sum(1)

        widest = torch.maximum(weights.amax(1) / limits.high, weights.amin(1) / limits.low)[:, None]
        assert bool((error(scale) <= error(widest) + 1e-6).all())
        assert bool((scale <= widest * 1.0001).all())


def test_asymmetric_codes_span_the_row_and_keep_zero():
    weights = rows(5, (16, 32))
    made = q.minmax(weights, 4)
    stored = made.codes + made.zero
    assert (float(stored.min()), float(stored.max())) == (0, 15)
    assert bool(((made.value - weights).abs() <= made.scale / 2 + 1e-6).all())
    kept = weights.clone()
    kept[:, :3] = 0
    assert bool((q.minmax(kept, 4).value[:, :3] == 0).all())
    low, high = weights.amin(1).clamp_max(0), weights.amax(1).clamp_min(0)
    assert torch.allclose(made.scale[:, 0], (high - low) / 15)


def test_activations_round_as_quantize_linear_does_and_their_ranges_learn():
    x = torch.tensor([-1.0, 0.05, 0.15, 2.0], requires_grad=True)
    scale, zero = torch.tensor(0.1, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    made = q.fake_activation(x, scale, zero, 15)
    want = ((torch.tensor([-10.0, 0.0, 2.0, 20.0]) + 3).clamp(0, 15) - 3) * 0.1  # 0.5 and 1.5 go to even
    assert torch.equal(made.detach(), want)
    made.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]
    assert float(zero.grad) == pytest.approx(-2 * 0.1)  # of the two that are clipped
    assert float(scale.grad) == pytest.approx((0 - 3) + (15 - 3) + (0 - 0.5) + (2 - 1.5), abs=1e-5)


def test_what_passes_through_is_bit_for_bit_the_quantized_value():
    weights = rows(6).requires_grad_()
    codes = q.twn(weights.detach())[0]
    assert torch.equal(q.through(codes.value, weights), codes.value)
    learnt = torch.tensor(0.3, requires_grad=True)
    damped = q.damped(learnt, 100, 4)
    assert float(damped) == float(learnt)
    damped.backward()
    assert float(learnt.grad) == pytest.approx(1 / 20)
