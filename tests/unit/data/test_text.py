"""Tokenised once, padded per batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compressor.data import load_data
from compressor.errors import PlanError
from compressor.models.types import LoadedModel
from compressor.recipe import DataConfig
from tests.unit.data.conftest import array_model

Maker = Callable[..., LoadedModel]


def write(path: Path, rows: list[tuple[str, str]], header: str = "text,label") -> str:
    path.write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n")
    return str(path)


ROWS = [(" ".join("abcdefghij"[i % 10 : i % 10 + 1 + i // 10]), ("pos", "neg")[i % 2]) for i in range(40)]


def test_padding_to_the_longest_of_the_batch(tmp_path: Path, text_model: Maker) -> None:
    source = write(tmp_path / "train.csv", [*ROWS, ("a b", "pos"), ("c d e f g h i j", "neg")])
    test = write(tmp_path / "test.csv", [("a", "neg"), ("b c b", "pos"), ("a b c d e f g h", "pos")])
    config = DataConfig(source=source, test=test, validation=4, calibration=2, duplicates="drop")
    bundle = load_data(config, text_model(), seed=0)
    split = bundle.splits["test"]
    got = split.batch(np.array([0, 1]))
    assert got["input_ids"].tolist() == [[2, 4, 3, 0, 0], [2, 5, 6, 5, 3]]
    assert got["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert got["token_type_ids"].tolist() == [[0] * 5] * 2
    assert split.batch(np.array([0]))["input_ids"].shape == (1, 3)
    assert split.batch(np.array([2]))["input_ids"].tolist() == [[2, 4, 5, 6, 7, 3]]  # cut to 6 tokens, end kept
    assert got["input_ids"].dtype == np.int64
    assert split.lengths.tolist() == [3, 5, 6]
    assert split.labels.tolist() == [0, 1, 1]
    assert any("longer than 6 tokens" in note for note in bundle.notes)


def test_a_length_that_cuts_texts_makes_other_data(tmp_path: Path, text_model: Maker) -> None:
    source = write(tmp_path / "x.csv", ROWS)  # the longest has four words, six tokens
    config = DataConfig(source=source, validation=4, calibration=2, duplicates="drop")
    model = text_model()

    def digests(length: int) -> dict[str, str]:
        shorter = replace(model, preprocess=model.preprocess.model_copy(update={"max_length": length}))
        return dict(load_data(config, shorter, seed=0).digests)

    assert digests(6) == digests(128), "no text is cut by either"
    assert all(digests(4)[name] != digest for name, digest in digests(5).items())


def test_pairs_and_fixed_length(tmp_path: Path, text_model: Maker) -> None:
    pairs = write(
        tmp_path / "pairs.csv", [(a, str(i % 2), a[:1]) for i, (a, _) in enumerate(ROWS)], "sentence1,label,second"
    )
    config = DataConfig(source=pairs, text_pair="second", validation=4, calibration=2, duplicates="drop")
    split = load_data(config, text_model(axis=10, dtype="int32"), seed=0).splits["train"]
    got = split.batch(np.arange(4))
    assert got["input_ids"].shape == (4, 10)
    assert got["input_ids"].dtype == np.int32
    assert got["token_type_ids"].max() == 1
    assert np.array_equal(got["attention_mask"] == 0, got["input_ids"] == 0)


def test_texts_for_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    config = DataConfig(source=write(tmp_path / "x.csv", ROWS), validation=4, calibration=2, duplicates="drop")
    with pytest.raises(PlanError, match="the model takes none"):
        load_data(config, array_model(), seed=0)


def test_unlabelled_transfer_text(tmp_path: Path, text_model: Maker) -> None:
    extra = tmp_path / "extra.txt"
    extra.write_text("a c e\n\nj h f d\na\n")
    test = write(tmp_path / "test.csv", [("a", "neg"), ("b j b", "pos")])
    config = DataConfig(
        source=write(tmp_path / "x.csv", ROWS[10:]),
        test=test,
        transfer=str(extra),
        validation=4,
        calibration=2,
        duplicates="drop",
    )
    bundle = load_data(config, text_model(), seed=0)
    assert bundle.splits["transfer"].labels is None
    assert len(bundle.splits["transfer"]) == 2  # `a` stands in test
    assert bundle.duplicates_dropped == 1


def test_embeddings_need_no_labels(tmp_path: Path, text_model: Maker) -> None:
    path = tmp_path / "x.txt"
    path.write_text("\n".join(dict.fromkeys(text for text, _ in ROWS)))
    bundle = load_data(DataConfig(source=str(path), validation=4, calibration=2), text_model(labels=()), seed=0)
    assert {split.labels for split in bundle.splits.values()} == {None}
    with pytest.raises(PlanError, match="has no labels"):
        load_data(DataConfig(source=str(path), validation=4, calibration=2), text_model(), seed=0)
