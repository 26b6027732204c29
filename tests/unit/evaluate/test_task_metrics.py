"""Metrics of several labels, tokens, pairs, rankings and language models: worked numbers, and torchmetrics."""

from __future__ import annotations

import numpy as np
import pytest

from compressor.errors import RunError
from compressor.evaluate import ArrayEvalSet, further, metric_name, predict, quality, score, unit_of
from compressor.evaluate.embeddings import pair_correlation, ranking_gain
from compressor.evaluate.multilabel import macro_f1, mean_average_precision, micro_f1
from compressor.evaluate.tokens import entities, entity_f1, likelihoods, perplexity, token_accuracy, token_f1

NAMES = ("O", "B-PER", "I-PER", "B-LOC")


def one_hot(tags: list[list[int]], classes: int) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[np.array(tags)]


def test_f1_of_several_labels_by_hand():
    logits = np.array([[2.0, -1.0, 3.0], [-2.0, 1.0, -1.0]])
    labels = np.array([[1, 0, 0], [0, 1, 1]])
    assert micro_f1(logits, labels) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert macro_f1(logits, labels) == pytest.approx((1 + 1 + 0) / 3)
    assert score("multi-label-text-classification", logits, labels) == micro_f1(logits, labels)


def test_probabilities_and_unlabelled_rows_of_several_labels():
    probabilities = np.array([[0.9, 0.2], [0.4, 0.6], [0.9, 0.9]])
    labels = np.array([[1, 0], [0, 1], [-100, -100]])
    assert micro_f1(probabilities, labels) == 1.0


@pytest.mark.train
@pytest.mark.parametrize("seed", range(5))
def test_several_labels_equal_torchmetrics(seed):
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
    import torch

    random = np.random.default_rng(seed)
    logits = np.round(random.normal(size=(60, 6)), 1)  # rounded: ties
    labels = (random.random((60, 6)) < 0.3).astype(np.int64)
    shares, truth = torch.from_numpy(1 / (1 + np.exp(-logits))), torch.from_numpy(labels)
    for average, own in (("micro", micro_f1), ("macro", macro_f1)):
        assert own(logits, labels) == pytest.approx(
            float(torchmetrics.multilabel_f1_score(shares, truth, 6, average=average)), abs=1e-6
        )
    theirs = float(torchmetrics.multilabel_average_precision(shares, truth, 6, average="macro"))
    assert mean_average_precision(logits, labels) == pytest.approx(theirs, abs=1e-6)


def test_entities_follow_conll():
    assert entities(["I-PER", "I-PER", "B-PER", "O"]) == [("PER", 0, 2), ("PER", 2, 3)]
    truth = np.array([[1, 2, 0, 3, -100]])
    found = one_hot([[1, 2, 0, 1, 0]], 4)
    assert entity_f1(found, truth, NAMES) == pytest.approx(0.5)
    assert metric_name("token-classification", NAMES) == "entity F1"
    assert metric_name("token-classification", ("DET", "NOUN")) == "token accuracy"


def test_token_scores_skip_what_has_no_label():
    labels = np.array([[-100, 1, 0, -100], [2, -100, 2, -100]], np.int32)
    outputs = one_hot([[0, 1, 1], [2, 0, 2]], 3)
    assert token_accuracy(outputs, labels) == pytest.approx(3 / 4)
    assert token_f1(outputs, labels) == pytest.approx((0 + 2 / 3 + 1) / 3)
    assert set(further("token-classification", outputs, labels)) == {"token_accuracy", "token_macro_f1"}


def test_labels_that_the_model_never_saw_are_refused():
    with pytest.raises(RunError, match="3 positions"):
        token_accuracy(one_hot([[0, 1, 1]], 3), np.array([[0, 1, 1, 2]]))


def test_predictions_of_tokens_are_padded_to_one_length():
    ids = np.array([[1, 2, 3], [3, 2, 1], [1, 1, 1]])

    def run(inputs):
        width = 3 if len(inputs["x"]) == 2 else 2
        return {"logits": np.ones((len(inputs["x"]), width, 4))}

    found = predict(run, ArrayEvalSet({"x": ids}), 2, task="token-classification")
    assert found.shape == (3, 3, 4)
    assert found[2, 2].sum() == 0


def test_perplexity_is_weighted_by_tokens():
    logits = np.log(np.array([[[0.5, 0.5], [0.25, 0.75]], [[0.9, 0.1], [0.5, 0.5]]]))
    labels = np.array([[0, 1], [0, -100]])
    rows = likelihoods(logits, labels)
    wanted = np.exp(-(np.log(0.5) + np.log(0.75) + np.log(0.9)) / 3)
    assert perplexity(rows) == pytest.approx(wanted)
    assert rows[:, 1].tolist() == [2, 1]
    assert score("causal-lm", rows, labels) == pytest.approx(wanted)
    assert further("causal-lm", rows, labels)["tokens"] == 3


def test_a_smaller_perplexity_is_better():
    assert unit_of("causal-lm") == metric_name("causal-lm") == "perplexity"
    assert quality(10.0, "perplexity") > quality(11.0, "perplexity")
    assert quality(0.9, unit_of("text-classification")) == 0.9


def test_language_models_are_reduced_batch_by_batch():
    labels = np.array([[0, 1], [1, 1], [0, 0]])
    outputs = np.random.default_rng(0).normal(size=(3, 2, 5)).astype(np.float32)
    order = iter([outputs[:2], outputs[2:]])
    found = predict(lambda _: {"logits": next(order)}, ArrayEvalSet({"x": labels}, labels), 2, task="causal-lm")
    assert found == pytest.approx(likelihoods(outputs, labels))


def test_ranking_gain_by_hand():
    # two queries; the second is asked twice, with two relevant passages
    texts = np.array([[1, 0], [1, 0.1], [0, 1], [1, 0.2], [0, 1], [0.1, 1]], np.float64)
    judged = np.array([[0, 0], [0, 1], [1, 0], [1, 2], [1, 0], [1, 3]])
    second = (1 + 1 / np.log2(3 + 0)) / (1 + 1 / np.log2(3))  # passage 3 first, passage 2 second
    assert ranking_gain(texts, judged) == pytest.approx((1.0 + second) / 2)
    assert score("retrieval", texts, judged) == ranking_gain(texts, judged)
    assert further("retrieval", texts, judged, 2 * texts) == {"dimensions": 2.0, "spearman": pytest.approx(1.0)}
    swapped = texts.copy()
    swapped[3] = [1, 0]  # now farther from the second query than the other query's passage
    dcg = 1 + 1 / np.log2(4)
    assert ranking_gain(swapped, judged) == pytest.approx((1 / np.log2(3) + dcg / (1 + 1 / np.log2(3))) / 2)


def test_passages_without_a_query_make_a_search_harder():
    texts = np.array([[1, 0], [0, 1], [1, 0.2], [0.2, 1], [1, 0.1]], np.float64)
    judged = np.array([[0, 0], [1, 0], [0, 1], [1, 2], [-1, 3]])  # queries first; the last passage answers none
    assert ranking_gain(texts, judged) == pytest.approx((1 / np.log2(3) + 1) / 2)
    judged[3, 0] = -1  # nothing answers the second query: it does not count
    assert ranking_gain(texts, judged) == pytest.approx(1 / np.log2(3))
    with pytest.raises(ValueError, match="no queries"):
        ranking_gain(texts[2:], judged[2:])


def test_spearman_of_human_scores():
    angles = np.array([0.1, 0.5, 1.0, 1.5])
    texts = np.zeros((8, 2))
    texts[0::2] = [1, 0]
    texts[1::2] = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    judged = np.stack([np.repeat(np.arange(4), 2), np.repeat([5.0, 4.0, 2.0, 1.0], 2)], axis=1)
    assert pair_correlation(texts, judged) == pytest.approx(1.0)
    judged[:, 1] = -judged[:, 1]
    assert score("sentence-similarity", texts, judged) == pytest.approx(-1.0)
