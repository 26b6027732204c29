"""What encoder-decoder models write: metrics against sacrebleu and torchmetrics, greedy decoding by hand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from compressor.errors import RunError
from compressor.evaluate import ArrayEvalSet, batch_size, further, metric_name, predict, score, unit_of, written
from compressor.types import TEXT2TEXT, TensorSpec

sacrebleu = pytest.importorskip("sacrebleu")

WROTE = ["the cat sat on the mat .", "A quick, brown dog!", "", "it rains in spain again and again", "equal words here"]
RIGHT = ["the cat is on the mat .", "The quick brown fox jumps", "nothing", "it rains in Spain", "equal words here"]
LETTERS = "_$abcdef"  # padding, end, letters


def rows(wrote: list[str] = WROTE, right: list[str] = RIGHT) -> np.ndarray:
    forced = np.array([[1.0, 2.0, 1.0]] * len(wrote))
    return np.concatenate([forced, written.judge(wrote, right)], axis=1)


def test_corpus_metrics_are_those_of_the_libraries():
    text = pytest.importorskip("torchmetrics.functional.text")
    found = rows()
    assert found.shape == (5, written.WIDTH)
    assert score("translation", found, None) == pytest.approx(sacrebleu.corpus_bleu(WROTE, [RIGHT]).score / 100)
    more = further("translation", found, None)
    assert more["chrf"] == pytest.approx(sacrebleu.corpus_chrf(WROTE, [RIGHT]).score / 100)
    assert score("text2text-generation", found, None) == pytest.approx(1 - text.word_error_rate(WROTE, RIGHT).item())
    rouge = text.rouge_score(WROTE, RIGHT, rouge_keys=("rouge1", "rouge2", "rougeL"), use_stemmer=False)
    assert score("summarization", found, None) == pytest.approx(rouge["rougeL_fmeasure"].item(), abs=1e-6)
    assert more["rouge_1"] == pytest.approx(rouge["rouge1_fmeasure"].item(), abs=1e-6)
    assert more["rouge_2"] == pytest.approx(rouge["rouge2_fmeasure"].item(), abs=1e-6)


def test_worked_numbers_and_names():
    found = rows(["a b c", "x"], ["a c c", "x y"])
    assert score("text2text-generation", found, None) == pytest.approx(1 - 2 / 5)
    more = further("text2text-generation", found, None)
    assert (more["exact_match"], more["word_error_rate"]) == (0.0, pytest.approx(0.4))
    assert more["perplexity"] == pytest.approx(np.exp(2 / 4))
    assert more["next_token_accuracy"] == 0.5
    assert {metric_name(task) for task in TEXT2TEXT} == {"word accuracy (1 - WER)", "BLEU", "ROUGE-L"}
    assert {unit_of(task) for task in TEXT2TEXT} == {"1"}
    with pytest.raises(ValueError, match="no word"):
        score("text2text-generation", rows(["a"], [""]), None)


def test_the_standard_error_is_that_of_a_share_where_the_metric_is_one():
    right = np.random.default_rng(0).random(2000) < 0.8
    found = rows(["a" if hit else "b" for hit in right], ["a"] * 2000)
    share = float(right.mean())
    assert score("text2text-generation", found, None) == pytest.approx(share)
    error = written.standard_error("text2text-generation", found)
    assert error == pytest.approx((share * (1 - share) / 2000) ** 0.5, rel=0.15)
    assert error == written.standard_error("text2text-generation", found)


@dataclass(frozen=True)
class Copying:
    """What a model that copies letters shall write."""

    references: tuple[str, ...]
    start: int = 0
    end: int = 1
    pad: int = 0
    limit: int = 6

    @staticmethod
    def decode(ids: list[int]) -> str:
        return " ".join(LETTERS[i] for i in ids)


@dataclass(frozen=True)
class Texts(ArrayEvalSet):
    targets: Copying | None = None


def copier(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Logits that write the source and then the end; padding always looks best, as if nothing forbade it."""
    source, steps = inputs["input_ids"], inputs["decoder_input_ids"].shape[1]
    wide = np.pad(source, [(0, 0), (0, 8)], constant_values=1)[:, :steps]
    logits = np.eye(len(LETTERS), dtype=np.float32)[np.where(wide == 0, 1, wide)] * 9
    logits[..., 0] = 99
    return {"logits": logits}


def test_greedy_decoding_ends_at_the_end_never_writes_padding_and_fits_fixed_shapes():
    source = np.array([[2, 3, 4], [5, 0, 0], [6, 7, 0]])
    mask = (source != 0).astype(np.int64)
    labels = np.array([[2, 3, 4, 1], [5, 1, -100, -100], [6, 6, 1, -100]])
    decoder = {"decoder_input_ids": np.zeros((3, 4), np.int64), "decoder_attention_mask": np.ones((3, 4), np.int64)}
    texts = Texts({"input_ids": source, "attention_mask": mask, **decoder}, labels, Copying(("a b c", "d", "e e")))
    open_ = predict(copier, texts, 2, task="text2text-generation")
    assert score("text2text-generation", open_, labels) == pytest.approx(1 - 1 / 6)
    assert further("text2text-generation", open_, labels)["exact_match"] == pytest.approx(2 / 3)
    assert open_[:, 1].tolist() == [4, 2, 3]  # labelled tokens
    fixed = [
        TensorSpec(name, "int32", (2, 3 if name in ("input_ids", "attention_mask") else 8)) for name in texts.arrays
    ]
    seen: set[tuple[int, ...]] = set()

    def static(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        seen.update(array.shape for array in inputs.values())
        return copier(inputs)

    assert np.array_equal(predict(static, texts, 64, specs=fixed, task="text2text-generation"), open_)
    assert seen == {(2, 3), (2, 8)}


def test_a_set_without_targets_is_refused():
    with pytest.raises(RunError, match="target texts"):
        predict(copier, ArrayEvalSet({"input_ids": np.ones((1, 2), np.int64)}), 2, task="translation")


def test_wide_outputs_are_computed_a_few_samples_at_a_time():
    assert batch_size("image-classification", 1000, 64) == 64
    assert batch_size("causal-lm", 49152, 64) == 8
    assert batch_size("translation", 80, 64) == 64
    assert batch_size("translation", 32128, 64) == 12
