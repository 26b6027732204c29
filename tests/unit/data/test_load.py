"""The cut, labels, duplicates and fingerprints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.data import RawData, RawPart, cut_rows, load_data, split_indices
from compressor.data.contamination import check_duplicates
from compressor.data.labels import encode_labels
from compressor.data.raw import ONLY
from compressor.errors import PlanError
from compressor.models.types import LoadedModel
from compressor.recipe import DataConfig
from tests.unit.data.conftest import array_model, picture_model


def arrays(count: int, *, start: int = 0) -> RawPart:
    return RawPart(
        "arrays", {ONLY: np.arange(start, start + 3 * count, dtype=np.float32).reshape(-1, 3)}, np.arange(count) % 2
    )


def test_the_cut_is_the_one_of_the_example_scripts() -> None:
    raw = RawData({"train": arrays(600), "test": arrays(50, start=9000)}, (), "x")
    rows = cut_rows(raw, DataConfig(validation=50, calibration=10), seed=7)
    expected = split_indices(600, {"validation": 50, "calibration": 10}, seed=7)
    for name, index in expected.items():
        assert rows[name][0] == "train"
        assert np.array_equal(rows[name][1], index)


@settings(max_examples=40, deadline=None)
@given(st.integers(20, 300), st.floats(0.02, 0.3), st.floats(0.01, 0.2), st.floats(0.05, 0.4), st.integers(0, 5))
def test_parts_are_disjoint_and_complete(
    count: int, validation: float, calibration: float, test: float, seed: int
) -> None:
    config = DataConfig(validation=validation, calibration=calibration, test_fraction=test)
    rows = cut_rows(RawData({"train": arrays(count)}, (), "x"), config, seed)
    together = np.concatenate([index for _, index in rows.values()])
    assert sorted(together.tolist()) == list(range(count))
    assert min(len(index) for _, index in rows.values()) >= 1


def test_own_validation_limit_and_too_little() -> None:
    raw = RawData({"train": arrays(40), "validation": arrays(8, start=900), "test": arrays(5, start=2000)}, (), "x")
    rows = cut_rows(raw, DataConfig(calibration=4, limit=10), seed=0)
    assert {name: (home, len(index)) for name, (home, index) in rows.items()} == {
        "validation": ("validation", 8), "test": ("test", 5), "calibration": ("train", 4), "train": ("train", 10)
    }  # fmt: skip
    with pytest.raises(
        PlanError, match="50 for validation and 1 for calibration leave nothing of 40 samples"
    ) as caught:
        cut_rows(RawData({"train": arrays(40), "test": arrays(5)}, (), "x"), DataConfig(validation=50), seed=0)
    assert caught.value.exit_code == 2


def load(raw: RawData, model: LoadedModel | None = None, **data: object):
    return load_data(DataConfig(**{"validation": 4, "calibration": 2, **data}), model or array_model(), seed=0, raw=raw)


def test_digests_follow_data_labels_and_seed() -> None:
    raw = RawData({"train": arrays(40)}, (), "x")
    first, again = load(raw), load(raw)
    assert first.digests == again.digests
    assert set(first.digests) == {"train", "validation", "calibration", "test"}
    assert all(split.digests.dtype == "S16" for split in first.splits.values())
    relabelled = RawPart("arrays", raw.parts["train"].samples, 1 - np.arange(40) % 2)
    assert load(RawData({"train": relabelled}, (), "x")).digests["test"] != first.digests["test"]
    other = load_data(DataConfig(validation=4, calibration=2), array_model(), seed=1, raw=raw)
    assert other.digests["train"] != first.digests["train"]


def texts(values: list[str]) -> RawPart:
    return RawPart("texts", values, [i % 2 for i in range(len(values))])


def test_duplicates_are_refused_with_examples(text_model: Callable[..., LoadedModel]) -> None:
    letters = [f"{a} {b}" for a in "abcdefgh" for b in "abcdefgh"]
    train = texts([*letters, "A  j", "b J", "c j", "d j", "e j", "f j"])
    raw = RawData({"train": train, "test": texts(["a j", "B j", " c j", "d j", "e j", "f j", "g i"])}, (), "x")
    with pytest.raises(PlanError, match="samples of train also stand in test") as caught:
        load(raw, text_model())
    shown = [problem.what for problem in caught.value.problems if "is the same as test[" in problem.what]
    assert len(shown) == 5
    pairs = {
        "`A  j` is the same as test[0], `a j`",
        "`b J` is the same as test[1], `B j`",
        "`c j` is the same as test[2], ` c j`",
    }
    assert pairs & set(shown)
    assert 'duplicates = "drop"' in caught.value.hint
    assert caught.value.exit_code == 2
    bundle = load(raw, text_model(), duplicates="drop")
    assert bundle.duplicates_dropped == 6
    assert len(bundle.splits["test"]) == 7
    assert sum(len(bundle.splits[name]) for name in ("train", "validation", "calibration")) == 64
    assert any("also stand in test" in note for note in bundle.notes)


def test_train_samples_in_validation_go_quietly() -> None:
    keys = {
        "train": np.array([b"a", b"b", b"c"], "S16"),
        "validation": np.array([b"b"], "S16"),
        "test": np.array([b"z"], "S16"),
    }
    clean = check_duplicates(keys, "refuse")
    assert clean.keep["train"].tolist() == [True, False, True]
    assert clean.dropped == 0
    assert clean.notes == ("1 samples of train dropped: they also stand in validation",)


def test_a_part_that_duplicates_empty_is_refused() -> None:
    same = RawPart("arrays", {ONLY: np.zeros((40, 3), np.float32)}, np.zeros(40, int))
    with pytest.raises(PlanError, match="is empty after duplicates"):
        load(RawData({"train": same}, (), "x"), duplicates="drop")


def encode(
    labels: object, teacher: tuple[str, ...] = (), names: tuple[str, ...] = (), classes: int | None = None
) -> list[int]:
    return encode_labels(labels, teacher=teacher, names=names, classes=classes, part="train").tolist()


def test_labels_by_number_and_by_name() -> None:
    assert encode([0, 2, 1], classes=3) == [0, 2, 1]
    assert encode(["0", "2", "1.0"], ("a", "b", "c"), classes=3) == [0, 2, 1]
    assert encode(np.array([1.0, 0.0])) == [1, 0]
    assert encode(["Not good", "GOOD"], ("good", "not_good")) == [1, 0]
    assert encode(["7", "3"], tuple("0123456789")) == [7, 3]
    assert encode(["pos", "neg"], ("LABEL_0", "LABEL_1"), ("neg", "pos")) == [1, 0]
    assert encode(["b", "a"]) == [1, 0]
    assert encode([True, False]) == [1, 0]


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        ([0, 3, 4, 3], r"3 labels of train are outside 0\.\.2: the teacher's head has 3 outputs: 3, 4"),
        ([0, -1], "outside 0..2: .*: -1"),
        ([0.5, 1.0, 0.25], "2 labels of train are not whole numbers: 0.5, 0.25"),
        ([float("nan")], "not whole numbers"),
        (["cat", "wolf", "fox"], r"are not among the teacher's \(cat, dog, owl\): fox, wolf"),
        ([None, "cat"], "are missing, first in rows: 0"),
        ([[1, 0], [0, 1]], "one class a sample"),
    ],
)
def test_labels_that_do_not_fit(labels: list[object], match: str) -> None:
    with pytest.raises(PlanError, match=match) as caught:
        encode(labels, ("cat", "dog", "owl"), classes=3)
    assert caught.value.exit_code == 2


def test_labels_of_a_bundle_that_do_not_fit() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 28, 28, 1), dtype=np.uint8)
    raw = RawData({"train": RawPart("pictures", pixels, np.arange(40) % 12)}, (), "x")
    with pytest.raises(PlanError, match="the teacher's head has 10 outputs: 10, 11"):
        load(raw, picture_model())
    hidden = RawData(
        {
            "train": RawPart("pictures", pixels[:30], np.arange(30) % 9),
            "test": RawPart("pictures", pixels[30:], np.full(10, -1)),
        },
        (),
        "x",
    )
    with pytest.raises(PlanError, match="test has no labels"):
        load(hidden, picture_model())


def test_regression_labels_of_a_generic_model_are_left_out() -> None:
    part = RawPart("arrays", arrays(40).samples, np.linspace(0, 1, 40))
    bundle = load(RawData({"train": part}, (), "x"))
    assert bundle.splits["train"].labels is None
    assert any("not class numbers" in note for note in bundle.notes)


FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.skipif(not FASHION.is_dir(), reason="apt install dataset-fashion-mnist")
def test_fashion_mnist_has_no_exact_duplicates() -> None:
    config = DataConfig(source=str(FASHION), validation=5000, calibration=1000)
    bundle = load_data(config, picture_model(), seed=0)
    sizes = {name: len(split) for name, split in bundle.splits.items()}
    assert sizes == {"train": 54000, "validation": 5000, "calibration": 1000, "test": 10000}
    assert bundle.duplicates_dropped == 0
    assert bundle.notes == ()
    assert np.bincount(bundle.splits["test"].labels).tolist() == [1000] * 10


def test_digits_example_is_cut_once_for_teacher_and_tool() -> None:
    pytest.importorskip("sklearn")
    from examples import digits

    pixels, labels = digits.pictures()
    parts = digits.cut(labels)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(1797))
    assert (pixels.dtype, pixels.shape, pixels.max()) == (np.uint8, (1797, 8, 8, 1), 255)
    bundle = load_data(DataConfig(), picture_model((1, 8, 8)), loader="examples.digits:load", seed=99)
    assert {name: len(split) for name, split in bundle.splits.items()} == {
        name: len(index) for name, index in parts.items()
    }
    share = np.bincount(bundle.splits["test"].labels) / np.bincount(labels)
    assert np.all(np.abs(share - 0.2) < 0.01)
    assert bundle.duplicates_dropped == 0
