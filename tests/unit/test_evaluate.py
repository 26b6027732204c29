"""Golden values, identities, and models with static shapes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from compressor.errors import RunError
from compressor.evaluate import (
    ArrayEvalSet,
    SplitEvalSet,
    closeness,
    content_digest,
    fit_inputs,
    fixed_batch,
    loyalty,
    metric_name,
    predict,
    score,
    similarity_correlation,
)
from compressor.types import TensorSpec

TEACHER = np.array([[2, 1, 0, -1], [0, 3, 1, -2], [1, 1, 2, 0]], dtype=np.float64)
STUDENT = np.array([[1, 0, 0.5, -0.5], [0.5, 1, 0, 0], [0, 2, 1, -1]], dtype=np.float64)


def softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits)
    return raised / raised.sum(axis=1, keepdims=True)


def test_loyalty_has_the_golden_values():
    label, probability = loyalty(TEACHER, STUDENT)
    assert label == pytest.approx(2 / 3)
    assert probability == pytest.approx(0.7019188173063701, abs=1e-6)


def test_loyalty_to_itself_is_one_and_probabilities_count_as_they_are():
    assert loyalty(TEACHER, TEACHER) == (1.0, 1.0)
    assert loyalty(softmax(TEACHER), softmax(STUDENT)) == pytest.approx(loyalty(TEACHER, STUDENT), abs=1e-9)


def test_loyalty_of_certain_and_opposite_predictions_is_one_minus_sqrt_ln2():
    first, second = np.array([[1e4, 0.0]]), np.array([[0.0, 1e4]])
    assert loyalty(first, second) == pytest.approx((0.0, 1 - np.sqrt(np.log(2))))


@pytest.mark.parametrize("task", ["image-classification", "text-classification"])
def test_accuracy_and_agreement(task):
    assert score(task, STUDENT, np.array([0, 1, 2])) == pytest.approx(2 / 3)
    assert score(task, STUDENT, None, TEACHER) == pytest.approx(2 / 3)
    assert metric_name(task) == "accuracy"


def test_one_output_is_the_logit_of_class_one():
    assert score("image-classification", np.array([[-1.0], [2.0], [0.5]]), np.array([0, 1, 0])) == pytest.approx(2 / 3)


def test_score_without_labels_or_reference_is_refused():
    with pytest.raises(ValueError, match="needs labels"):
        score("image-classification", STUDENT, None)
    with pytest.raises(ValueError, match="teacher's outputs"):
        score("sentence-embedding", STUDENT, np.array([0, 1, 2]))


def test_generic_outputs_agree_by_argmax_only_when_they_are_probabilities():
    assert score("generic", softmax(STUDENT), None, softmax(TEACHER)) == pytest.approx(2 / 3)
    picture = np.random.default_rng(0).normal(size=(4, 1, 8, 8))
    assert score("generic", picture, None, picture) == 1.0
    assert score("generic", picture * 1.1, None, picture) == pytest.approx(0.9)
    assert closeness(-picture, picture) == 0.0


@pytest.mark.parametrize("width", [3, 8])
def test_similarity_correlation_is_scipys_over_all_pairs(width):
    spearmanr = pytest.importorskip("scipy.stats").spearmanr
    random = np.random.default_rng(width)
    teacher, student = random.normal(size=(30, 6)), random.normal(size=(30, width))
    first, second = np.triu_indices(30, k=1)

    def cosines(a):
        unit = a / np.linalg.norm(a, axis=1, keepdims=True)
        return (unit[first] * unit[second]).sum(axis=1)

    expected = spearmanr(cosines(student), cosines(teacher)).statistic
    assert similarity_correlation(student, teacher) == pytest.approx(expected, abs=1e-9)
    assert similarity_correlation(3 * teacher, teacher) == pytest.approx(1.0)


def test_similarity_correlation_of_a_large_set_is_sampled_deterministically():
    teacher = np.random.default_rng(0).normal(size=(400, 5)).astype(np.float32)
    student = teacher + 0.3 * np.random.default_rng(1).normal(size=(400, 5)).astype(np.float32)
    everything = similarity_correlation(student, teacher)
    sampled = similarity_correlation(student, teacher, cap=5000)
    assert sampled == similarity_correlation(student, teacher, cap=5000)
    assert sampled == pytest.approx(everything, abs=0.03)


def test_ties_get_their_mean_rank():
    same = np.ones((5, 2))
    assert similarity_correlation(same, same) == 1.0


def sums(inputs):
    return {"y": inputs["x"].sum(axis=1, keepdims=True)}


def test_predict_keeps_order_and_dtype():
    data = ArrayEvalSet({"x": np.arange(14, dtype=np.float64).reshape(7, 2)})
    found = predict(sums, data, batch=3)
    assert found.dtype == np.float32
    assert found[:, 0].tolist() == [1, 5, 9, 13, 17, 21, 25]


@pytest.mark.parametrize("size", [1, 4])
def test_predict_fills_the_last_batch_of_a_static_model(size):
    seen = []

    def static(inputs):
        seen.append(len(inputs["x"]))
        return sums(inputs)

    specs = (TensorSpec("x", "float32", (size, 2)),)
    data = ArrayEvalSet({"x": np.arange(14, dtype=np.float32).reshape(7, 2)})
    found = predict(static, data, batch=64, specs=specs)
    assert set(seen) == {size}
    assert found[:, 0].tolist() == [1, 5, 9, 13, 17, 21, 25]
    assert fixed_batch(specs) == size


def test_inputs_are_fitted_to_static_sequences_and_dtypes():
    specs = (TensorSpec("ids", "int32", ("batch", 6)), TensorSpec("mask", "int64", ("batch", 6)))
    tokens = np.array([[5, 6, 7]])
    fitted = fit_inputs({"ids": tokens, "mask": np.ones((1, 3), np.int64), "extra": tokens}, specs)
    assert list(fitted) == ["ids", "mask"]
    assert fitted["ids"].dtype == np.int32
    assert fitted["ids"].tolist() == [[5, 6, 7, 0, 0, 0]]
    assert fitted["mask"].tolist() == [[1, 1, 1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"other": np.zeros((1, 4))}, "wants input `x`"),
        ({"x": np.zeros((1, 5), np.float32)}, "the model takes"),
        ({"x": np.zeros((1, 3), np.float32)}, "the model takes"),
    ],
)
def test_inputs_that_cannot_fit_say_so(inputs, message):
    with pytest.raises(RunError, match=message):
        fit_inputs(inputs, (TensorSpec("x", "float32", ("batch", 4)),))


def test_output_that_is_not_per_sample_or_unknown_is_an_error():
    data = ArrayEvalSet({"x": np.zeros((4, 2), np.float32)})
    with pytest.raises(RunError, match="first dimension is not the batch"):
        predict(lambda inputs: {"y": np.zeros((1, 3))}, data, batch=4)
    with pytest.raises(RunError, match="no output `z`"):
        predict(sums, data, batch=4, output_name="z")
    with pytest.raises(RunError, match="empty"):
        predict(sums, ArrayEvalSet({"x": np.zeros((0, 2), np.float32)}), batch=4)


class Pairs:
    """A split: sample i is (i, i)."""

    labels = np.arange(5)

    def __len__(self):
        return 5

    def batch(self, index):
        return {"x": np.stack([index, index], axis=1).astype(np.float32)}


def test_split_eval_set_walks_the_split_in_order():
    data = SplitEvalSet(Pairs())
    sizes = [(len(inputs["x"]), labels.tolist()) for inputs, labels in data.batches(2)]
    assert sizes == [(2, [0, 1]), (2, [2, 3]), (1, [4])]
    assert predict(sums, data, 2)[:, 0].tolist() == [0, 2, 4, 6, 8]


def test_content_digest_sees_every_value_the_model_would_see():
    arrays = {"x": np.arange(200, dtype=np.float32).reshape(100, 2)}
    changed = {"x": arrays["x"].copy()}
    changed["x"][99, 1] += 1
    first, second = ArrayEvalSet(arrays), ArrayEvalSet(changed)
    assert first.digest == content_digest(ArrayEvalSet(arrays))
    assert first.digest != second.digest


def test_scores_are_plain_floats():
    values = [score("generic", TEACHER, np.array([0, 1, 2])), *loyalty(TEACHER, STUDENT)]
    assert json.dumps(values)
