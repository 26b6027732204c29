"""Several labels a sample, tagged words, pairs for encoders, blocks for language models."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from compressor.data import load_data, read_raw
from compressor.data.blocks import blocks_of
from compressor.data.load import other_view
from compressor.data.multilabel import encode_multi_labels
from compressor.data.words import first_pieces
from compressor.errors import PlanError
from compressor.evaluate import SplitEvalSet
from compressor.models.types import LoadedModel, TextInput
from compressor.recipe import DataConfig
from compressor.types import TensorSpec

NAMES = ("cat", "dog", "big owl")
Make = Callable[..., LoadedModel]


def several(labels: object, **more: object) -> list[list[float]]:
    return encode_multi_labels(labels, teacher=NAMES, names=(), classes=3, part="train", **more).tolist()


def test_cells_lists_and_tables_of_labels():
    wanted = [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert several(["cat;dog", "", "Big-Owl"]) == wanted
    assert several([["cat", "dog"], [], ["big owl"]]) == wanted
    assert several([[0, 1], [], [2]]) == wanted
    assert several(np.array(wanted)) == wanted


@pytest.mark.parametrize("labels", [["cat;horse"], [[0, 3]], [None], np.array([[1, 0]])])
def test_labels_that_do_not_fit_are_refused(labels):
    with pytest.raises(PlanError):
        several(labels)


def test_the_first_piece_of_a_word_carries_its_tag():
    place, word = first_pieces([None, 0, 0, 2, 3, 3, None])
    assert (place.tolist(), word.tolist()) == ([1, 3, 4], [0, 2, 3])


def retasked(model: LoadedModel, task: str, *, eos: int | None = None, length: int = 8, **more: object) -> LoadedModel:
    assert isinstance(model.preprocess, TextInput)
    preprocess = model.preprocess.model_copy(update={"max_length": length, "eos_id": eos})
    return dataclasses.replace(model, task=task, preprocess=preprocess, **more)  # type: ignore[arg-type]


def test_conll_files_become_tagged_tokens(tmp_path: Path, text_model: Make):
    lines = "\n\n".join(f"{'abcdefghij'[i % 10]} X N\nb X V\nc{i} X N" for i in range(30))
    (tmp_path / "tags.conll").write_text("-DOCSTART- -X- O\n\n" + lines + "\n")
    model = retasked(text_model(labels=("N", "V")), "token-classification",
                     outputs=(TensorSpec("logits", "float32", ("batch", "sequence", 2)),))  # fmt: skip
    data = load_data(DataConfig(source=str(tmp_path / "tags.conll"), validation=4, calibration=2), model, seed=0)
    train = data.splits["train"]
    inputs = train.batch(np.arange(2))
    assert inputs["input_ids"].shape == (2, 5)  # [CLS] and three words and [SEP]
    assert train.labels[:2].tolist() == [[-100, 0, 1, 0, -100, -100, -100, -100]] * 2
    assert data.examples[0].split()[1] == "b"


def test_words_and_tags_must_be_as_many(tmp_path: Path, text_model: Make):
    rows = [{"words": [f"a{i}", "b"], "tags": ["N"]} for i in range(20)]
    (tmp_path / "tags.json").write_text(json.dumps(rows))
    model = retasked(text_model(labels=("N", "V")), "token-classification",
                     outputs=(TensorSpec("logits", "float32", ("batch", "sequence", 2)),))  # fmt: skip
    with pytest.raises(PlanError, match="2 words but 1 tags"):
        load_data(DataConfig(source=str(tmp_path / "tags.json"), validation=4, calibration=2), model, seed=0)


def test_several_labels_from_a_table(tmp_path: Path, text_model: Make):
    rows = "\n".join(
        f"{'abcdefghij'[i % 10]} {'abcdefghij'[i // 10]},{'neg;pos' if i % 3 else 'pos'}" for i in range(40)
    )
    (tmp_path / "t.csv").write_text("text,label\n" + rows + "\n")
    model = retasked(text_model(), "multi-label-text-classification")
    data = load_data(DataConfig(source=str(tmp_path / "t.csv"), validation=4, calibration=2), model, seed=0)
    assert data.splits["train"].labels.shape == (len(data.splits["train"]), 2)
    assert set(data.splits["train"].labels.sum(axis=1).tolist()) == {1, 2}


def pairs(path: Path, score: bool) -> DataConfig:
    words = "abcdefghij"
    rows = [f"{words[i % 7]},{words[i % 10]} {words[i // 10]} {i},{i / 40}" for i in range(40)]
    path.write_text("question,passage,score\n" + "\n".join(rows) + "\n")
    return DataConfig(
        source=str(path), text="question", text_pair="passage", label="score" if score else None,
        validation=6, calibration=2,
    )  # fmt: skip


def test_pairs_become_two_samples_with_their_score(tmp_path: Path, text_model: Make):
    model = retasked(text_model(labels=()), "sentence-similarity")
    data = load_data(pairs(tmp_path / "sts.csv", score=True), model, seed=0)
    validation = data.splits["validation"]
    assert len(validation) == 12
    assert validation.labels is None  # nothing to train on
    judged = SplitEvalSet(validation).labels
    assert judged is not None
    assert (judged[0::2] == judged[1::2]).all()
    assert len(np.unique(judged[:, 1])) == 6


def test_equal_queries_share_their_number(tmp_path: Path, text_model: Make):
    model = retasked(text_model(labels=()), "retrieval")
    splits = load_data(pairs(tmp_path / "r.csv", score=False), model, seed=0).splits
    asked = []
    for split in splits.values():
        judged = SplitEvalSet(split).labels
        assert judged is not None
        queries = judged[judged[:, 1] == 0, 0]
        assert len(np.unique(queries)) == len(queries)  # each once
        assert set(queries) == set(judged[judged[:, 1] > 0, 0])
        asked.append(set(split.digests[: len(queries)].tolist()))
    assert sum(map(len, asked)) == len(set().union(*asked)) == 7  # no query is cut apart


def test_queries_bring_their_passages_right_and_wrong(tmp_path: Path, text_model: Make):
    lines = [f"a {q},b {q} {p},{int(p == 1)},{q + p / 10}" for q in range(20) for p in range(4)]
    lines += [",c d,,", "a 3,c e,1,9"]
    (tmp_path / "r.csv").write_text("question,passage,label,teacher\n" + "\n".join(lines) + "\n")
    config = DataConfig(
        source=str(tmp_path / "r.csv"), text="question", text_pair="passage", score="teacher", validation=8,
        calibration=4, test_fraction=0.1, near_duplicates="off",
    )  # fmt: skip
    splits = load_data(config, retasked(text_model(labels=()), "retrieval"), seed=0).splits
    sizes = [split.groups.sizes.tolist() for split in splits.values()]
    assert {size for part in sizes for size in part} <= {5}  # a query, its answer, three wrong ones
    assert sum(map(len, sizes)) == 21  # question 3 has two answers
    for split in splits.values():
        for number in range(len(split.groups)):
            query, right, *wrong = split.groups.of(number)
            scores = split.groups.scores
            assert np.isnan(scores[query])
            assert len({round(float(scores[at]) % 1, 1) for at in wrong}) == 3
            assert split.judgements[right, 0] == split.judgements[query, 0]
            assert (split.judgements[wrong, 0] == -1).all()


def test_another_encoder_sees_the_same_texts(tmp_path: Path, text_model: Make):
    config, model = pairs(tmp_path / "r.csv", score=False), retasked(text_model(labels=()), "retrieval")
    raw = read_raw(config)
    data = load_data(config, model, seed=0, raw=raw)
    for name, split in other_view(raw, data.rows, model).items():
        assert split.digests.tolist() == data.splits[name].digests.tolist()
        assert (split.batch(np.arange(4))["input_ids"] == data.splits[name].batch(np.arange(4))["input_ids"]).all()


def test_a_wrong_score_names_its_column(tmp_path: Path, text_model: Make):
    lines = "\n".join(f"a {i},b {i},{'x' if i == 3 else i}" for i in range(40))
    (tmp_path / "r.csv").write_text("question,passage,teacher\n" + lines + "\n")
    config = DataConfig(source=str(tmp_path / "r.csv"), text="question", text_pair="passage", score="teacher",
                        validation=4, calibration=2)  # fmt: skip
    with pytest.raises(PlanError, match="is no number"):
        load_data(config, retasked(text_model(labels=()), "retrieval"), seed=0)


def test_retrieval_without_pairs_is_refused(tmp_path: Path, text_model: Make):
    (tmp_path / "t.csv").write_text("text\n" + "\n".join(f"a {i}" for i in range(40)))
    with pytest.raises(PlanError, match="pairs of texts"):
        load_data(
            DataConfig(source=str(tmp_path / "t.csv"), validation=4, calibration=2),
            retasked(text_model(labels=()), "retrieval"), seed=0,
        )  # fmt: skip


def test_blocks_hold_every_token_once_and_the_next_as_label(text_model: Make):
    model = retasked(text_model(), "causal-lm")
    stream = np.arange(4, 24, dtype=np.int32)
    split = blocks_of("train", stream, model.preprocess, model.inputs)
    assert split.ids.shape == (3, 8)
    assert split.labels is not None
    kept = split.labels != -100
    assert split.labels[kept].tolist() == stream[1:].tolist()
    assert split.ids[kept].tolist() == stream[:-1].tolist()
    last = split.batch(np.array([2]))
    assert last["input_ids"].shape == (1, 3)
    assert len(np.unique(split.digests)) == 3


def test_documents_are_packed_with_their_end(tmp_path: Path, text_model: Make):
    (tmp_path / "t.txt").write_text("\n".join(f"{'abcdefghij'[i % 10]} {'abcdefghij'[i // 10]}" for i in range(40)))
    model = retasked(
        text_model(), "causal-lm", eos=3, outputs=(TensorSpec("logits", "float32", ("batch", "sequence", 14)),)
    )
    data = load_data(DataConfig(source=str(tmp_path / "t.txt"), validation=4, calibration=2), model, seed=0)
    test = data.splits["test"]
    assert test.labels is not None
    documents = 8
    assert int((test.labels != -100).sum()) == documents * 5 - 1  # [CLS] two words [SEP], and the end
