"""Sequence-level interpolation: the hypothesis that is nearest to the data, exact against sacrebleu."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from compressor.distil.nearest import nearest, sentence_bleu
from compressor.language import Sequences


def test_sentence_bleu_is_sacrebleus_on_the_same_tokens() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    metric = sacrebleu.BLEU(tokenize="none", smooth_method="add-k", smooth_value=1, effective_order=False)
    random = np.random.default_rng(0)
    for _ in range(60):
        hypothesis, reference = (random.integers(0, 5, random.integers(1, 12)).tolist() for _ in range(2))
        texts = [" ".join(f"w{token}" for token in row) for row in (hypothesis, reference)]
        wanted = metric.sentence_score(texts[0], [texts[1]]).score / 100
        assert sentence_bleu(hypothesis, reference) == pytest.approx(wanted, abs=1e-9)


def test_the_nearest_hypothesis_is_taken_and_of_equal_ones_the_likeliest() -> None:
    gold = [1, 2, 3, 4, 5]
    assert nearest([[1, 9, 9, 4, 5], [1, 2, 3, 4, 9], [5, 4, 3, 2, 1]], gold) == 1
    assert nearest([[7, 8], [8, 7]], gold) == 0


def test_a_choice_needs_several_beams() -> None:
    with pytest.raises(ValidationError, match="several `beams`"):
        Sequences(choose="nearest")
    assert Sequences(choose="nearest", beams=5).beams == 5


@pytest.mark.train
def test_all_beams_come_likeliest_first() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from compressor.distil.generation import beam_search
    from compressor.stages.sequences import _nearest
    from tests.unit.distil.test_language import gpt

    module, prompts = gpt(4), torch.tensor([[3, 4], [5, 6]])
    best, made = beam_search(module, prompts, 4, 3, None), beam_search(module, prompts, 4, 3, None, several=True)
    assert made.ids.shape == (6, 6)
    assert torch.equal(made.ids[::3], best.ids)
    golds = [made.ids[2, 2:].tolist(), made.ids[4, 2:].tolist()]
    assert _nearest(made.ids[:, 2:], made.mask[:, 2:], golds, 3) == [2, 4]
