"""Which weights stay: exact counts, exact patterns, no dependence on scale, and masks that only grow."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from compressor.masks import Zeros
from compressor.models.patterns import Axes, cubic, kept, why_not

LINEAR = Axes()


def one(weight, zeros, share=1.0, axes=LINEAR):
    return kept({"w": weight}, {"w": axes}, zeros, share)["w"]


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@settings(max_examples=30, deadline=None)
@given(arrays(np.float32, (3, 8), elements=st.floats(-4, 4, width=32)))
def test_two_of_four_are_the_largest_two_whatever_the_values(weight):
    mask = one(weight, Zeros(0.5, "2:4"))
    groups, values = mask.reshape(-1, 4), np.abs(weight).reshape(-1, 4)
    assert (groups.sum(1) == 2).all()
    assert np.where(groups, values, np.inf).min(1).tolist() >= np.where(groups, -np.inf, values).max(1).tolist()
    assert all(np.where(g, v, np.inf).min() >= np.where(g, -1, v).max() for g, v in zip(groups, values, strict=True))


def test_n_of_m_runs_along_the_inputs_of_every_kind_of_layer():
    convolution = one(random(6, 8, 3, 3), Zeros(0.5, "2:4"))
    assert (convolution.reshape(6, 2, 4, 3, 3).sum(2) == 2).all()
    transposed = one(random(8, 6, 3, 3), Zeros(0.75, "1:4"), axes=Axes(1, 0))
    assert (transposed.reshape(2, 4, 6, 3, 3).sum(1) == 1).all()
    assert why_not((6, 3, 3, 3), LINEAR, Zeros(0.5, "2:4")) == "3 inputs are no multiple of 4"
    assert why_not((6, 3, 3, 3), LINEAR, Zeros(0.5)) == ""


@pytest.mark.parametrize(("sparsity", "count"), [(0.8, 48), (0.5, 30), (0.01, 1), (0.005, 0)])
def test_unstructured_removes_exactly_the_smallest(sparsity, count):
    weight = random(6, 10)
    mask = one(weight, Zeros(sparsity))
    assert (~mask).sum() == count
    assert np.array_equal(np.sort(np.abs(weight), axis=None)[:count], np.sort(np.abs(weight[~mask])))


def test_of_equal_weights_the_first_stay():
    assert one(np.ones((2, 4), np.float32), Zeros(0.5)).tolist() == [[True] * 4, [False] * 4]
    assert one(np.zeros((1, 8), np.float32), Zeros(0.5, "2:4")).tolist() == [[True, True, False, False] * 2]


def test_blocks_go_whole_by_their_mean_and_edges_are_smaller_blocks():
    weight = np.array([[1, 1, 1, 1, 9], [1, 1, 1, 1, 9], [5, 5, 0, 0, 0.1]], np.float32)
    mask = one(weight, Zeros(0.5, "block", (2, 4)))  # means 1, 9, 2.5, 0.1: two of four blocks go
    assert mask.tolist() == [[False] * 4 + [True], [False] * 4 + [True], [True] * 4 + [False]]


def test_scale_of_a_layer_changes_nothing_unless_layers_compete():
    weights = {"a": random(4, 8, seed=1), "b": random(4, 8, seed=2)}
    axes = dict.fromkeys(weights, LINEAR)
    scaled = weights | {"b": weights["b"] * 100}
    for zeros in (Zeros(0.7), Zeros(0.5, "2:4"), Zeros(0.5, "block", (1, 4))):
        before, after = kept(weights, axes, zeros), kept(scaled, axes, zeros)
        assert all(np.array_equal(before[name], after[name]) for name in weights)
    competing = kept(scaled, axes, Zeros(0.5, scope="global"))
    assert competing["b"].all()
    assert not competing["a"].any()
    assert sum((~mask).sum() for mask in competing.values()) == 32


@pytest.mark.parametrize("zeros", [Zeros(0.8), Zeros(0.5, "2:4"), Zeros(0.75, "1:4"), Zeros(0.6, "block", (2, 2))])
def test_a_growing_mask_never_gives_a_weight_back(zeros):
    weight, before = random(8, 16), np.ones((8, 16), bool)
    for share in (0.0, 0.3, 0.6, 1.0):
        mask = one(weight, zeros, share)
        assert not (mask & ~before).any()
        weight, before = weight * mask, mask
    assert np.array_equal(mask, one(weight, zeros))


def test_the_cubic_schedule():
    assert [round(cubic(done, 0.2, 0.6), 6) for done in (0, 0.2, 0.3, 0.4, 0.5, 0.6, 1)] == [
        0, 0, 0.578125, 0.875, 0.984375, 1, 1,
    ]  # fmt: skip
    assert cubic(0.0, 0.0, 0.0) == 1.0
