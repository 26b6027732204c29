"""Loyalty of a student to its teacher, for every task that has classes or values."""

from __future__ import annotations

import numpy as np
import pytest

from compressor.evaluate import class_loyalty, loyalty, scalar_loyalty, value_loyalty

RANDOM = np.random.default_rng(0)
LOGITS, OTHER = RANDOM.normal(size=(40, 5)), RANDOM.normal(size=(40, 5))


@pytest.mark.parametrize("task", ["image-classification", "multi-label-text-classification"])
def test_a_model_is_wholly_loyal_to_itself_and_never_beyond_the_bounds(task):
    assert class_loyalty(task, LOGITS, LOGITS, None) == pytest.approx((1.0, 1.0))
    label, probability = class_loyalty(task, LOGITS, OTHER, None)
    assert 0 <= label < 1
    assert 0 < probability < 1


def test_one_class_a_sample_is_as_it_was():
    assert class_loyalty("text-classification", LOGITS, OTHER, None) == loyalty(LOGITS, OTHER)
    assert class_loyalty("text-classification", LOGITS, OTHER[:, :4], None) is None
    assert class_loyalty("sentence-embedding", LOGITS, OTHER, None) is None


def test_several_labels_are_yes_or_no_each():
    label, _ = class_loyalty("multi-label-text-classification", LOGITS, OTHER, None)
    assert label == pytest.approx(np.mean((LOGITS > 0) == (OTHER > 0)))
    far = class_loyalty("multi-label-text-classification", np.array([[50.0, -50.0]]), np.array([[-50.0, -50.0]]), None)
    assert far == pytest.approx((0.5, 0.5 * (1 - np.sqrt(np.log(2))) + 0.5))


def test_tags_count_where_there_is_a_word():
    teacher, student = RANDOM.normal(size=(3, 6, 4)), RANDOM.normal(size=(3, 7, 4))
    labels = np.full((3, 6), -100)
    labels[0, :2], labels[2, 3] = 1, 0
    rows = [(0, 0), (0, 1), (2, 3)]
    first, second = (np.stack([z[i, j] for i, j in rows]) for z in (teacher, student))
    assert class_loyalty("token-classification", teacher, student, labels) == loyalty(first, second)
    assert class_loyalty("token-classification", teacher, student, np.full((3, 6), -100)) is None


def test_likelihoods_of_texts_are_values():
    teacher = np.array([[20.0, 10, 5], [30, 10, 5], [0, 0, 0]])
    student = np.array([[25.0, 10, 5], [30, 10, 5], [0, 0, 0]])
    assert value_loyalty("causal-lm", teacher, student) == pytest.approx(1 - 0.25 / 1.0)
    assert value_loyalty("causal-lm", teacher, teacher) == 1.0
    assert value_loyalty("image-classification", LOGITS, OTHER) is None
    assert value_loyalty("sentence-embedding", LOGITS, LOGITS) == 1.0
    assert scalar_loyalty(np.ones(3), np.ones(3)) == 1.0
    assert scalar_loyalty(np.ones(3), np.zeros(3)) == 0.0
