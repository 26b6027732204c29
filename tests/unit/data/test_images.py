"""Pixels to model inputs: exact values, layouts, channels, and broken files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compressor.data import load_data, make_calibration, read_raw
from compressor.data.images import decode, pixel_table, read_idx, with_channels
from compressor.errors import ConfigError, PlanError
from compressor.recipe import DataConfig, ImagePreprocess
from tests.unit.data.conftest import picture_model, write_idx


def test_idx_parts_and_exact_values(idx_folder: Path) -> None:
    config = DataConfig(source=str(idx_folder), validation=10, calibration=5)
    raw = read_raw(config)
    assert {name: part.samples.shape for name, part in raw.parts.items()} == {
        "train": (60, 6, 5, 1),
        "test": (20, 6, 5, 1),
    }
    model = picture_model((1, 6, 5), mean=(0.4,), std=(0.2,))
    bundle = load_data(config, model, seed=1)
    assert {name: len(split) for name, split in bundle.splits.items()} == {
        "test": 20,
        "validation": 10,
        "calibration": 5,
        "train": 45,
    }
    got = bundle.splits["test"].batch(np.array([3, 1]))["image"]
    want = (
        raw.parts["test"].samples[[3, 1], :, :, 0].astype(np.float32) * np.float32(1 / 255) - np.float32(0.4)
    ) / np.float32(0.2)
    assert got.dtype == np.float32
    assert np.array_equal(got, want[:, None])
    assert bundle.splits["test"].labels.tolist() == [i % 10 for i in range(20)]


def test_another_preprocessing_is_other_data(idx_folder: Path) -> None:
    """What is kept of a run is found by these digests: a student taught on other inputs is another student."""
    config = DataConfig(source=str(idx_folder), validation=10, calibration=5)
    first, again, other = (
        load_data(config, picture_model((1, 6, 5), mean=(mean,), std=(0.2,)), seed=1).digests
        for mean in (0.4, 0.4, 0.5)
    )
    assert first == again
    assert all(first[name] != other[name] for name in first)


def test_layouts_channels_and_per_channel_constants() -> None:
    table = pixel_table(ImagePreprocess(mean=(0.0, 0.5, 1.0), std=(1.0, 2.0, 4.0)), 3, "float32")
    assert table.shape == (3, 256)
    assert table[:, 255].tolist() == [1.0, 0.25, 0.0]
    assert pixel_table(ImagePreprocess(scale=1.0), 1, "uint8")[0].tolist() == list(range(256))
    with pytest.raises(PlanError, match="3 means and 1 deviations for 1 channels"):
        pixel_table(ImagePreprocess(mean=(0.1, 0.2, 0.3)), 1, "float32")


def test_grey_and_colour() -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 7, 9, 3), dtype=np.uint8)
    grey = np.stack([np.asarray(image.fromarray(picture).convert("L")) for picture in pixels])
    assert np.array_equal(with_channels(pixels, 1)[..., 0], grey)  # Pillow's own arithmetic, without Pillow
    assert np.array_equal(with_channels(grey[..., None], 3), np.repeat(grey[..., None], 3, -1))
    assert with_channels(np.concatenate([pixels, pixels[..., :1]], -1), 3).shape == (4, 7, 9, 3)
    with pytest.raises(PlanError, match="2 channels"):
        with_channels(pixels[..., :2], 3)


def test_nhwc_and_resizing(idx_folder: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    config = DataConfig(source=str(idx_folder), validation=10, calibration=5)
    model = picture_model((12, 10, 3), size=(12, 10), channels=3, layout="NHWC")
    split = load_data(config, model, seed=0).splits["test"]
    got = split.batch(np.arange(2))["image"]
    assert got.shape == (2, 12, 10, 3)
    first = image.fromarray(read_raw(config).parts["test"].samples[0, :, :, 0]).resize(
        (10, 12), image.Resampling.BILINEAR
    )
    np.testing.assert_array_equal(np.rint(got[0, :, :, 1] * 255), np.asarray(first))


def test_pictures_in_class_folders(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    random = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 3)):
        for label in ("dog", "cat"):
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            for number in range(count):
                image.fromarray(random.integers(0, 256, (9, 8, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    config = DataConfig(source=str(tmp_path), validation=4, calibration=2)
    bundle = load_data(config, picture_model((3, 9, 8), ("CAT", "Dog", "owl")), seed=0)
    assert bundle.splits["test"].labels.tolist() == [0, 0, 0, 1, 1, 1]  # by name, whatever the order of folders
    assert len(bundle.splits["train"]) == 18
    got = bundle.splits["test"].batch(np.array([4]))["image"][0]
    want = decode(tmp_path / "test" / "dog" / "1.png")
    np.testing.assert_array_equal(np.rint(got * 255), want.transpose(2, 0, 1))
    with pytest.raises(PlanError, match=r"are not among the teacher's \(cat, owl\): dog"):
        load_data(config, picture_model((3, 9, 8), ("cat", "owl")), seed=0)
    image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8)).save(tmp_path / "train" / "dog" / "odd.png")
    with pytest.raises(PlanError, match="different sizes"):
        load_data(config, picture_model((3, 9, 8), ("cat", "dog")), seed=0)
    (tmp_path / "train" / "dog" / "odd.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(ConfigError, match=r"odd\.png` has 1 problem"):
        load_data(config, picture_model((3, 9, 8), ("cat", "dog"), size=(9, 8)), seed=0)


def test_shape_that_the_model_does_not_take(idx_folder: Path) -> None:
    config = DataConfig(source=str(idx_folder), validation=10, calibration=5)
    with pytest.raises(PlanError, match=r"gives image \(1, 6, 5\) but the model wants \(1, 28, 28\)") as caught:
        load_data(config, picture_model(), seed=0)
    assert "preprocess" in caught.value.hint


@pytest.mark.parametrize(
    "damage", [b"", b"\x1f\x8b\x08 no gzip", b"\x00\x00\x08\x03\x00\x00", b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00"]
)
def test_broken_idx(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / ("x.gz" if damage[:2] == b"\x1f\x8b" else "x")
    path.write_bytes(damage)
    with pytest.raises(ConfigError):
        read_idx(path)


def test_truncated_idx_and_missing_labels(tmp_path: Path) -> None:
    write_idx(tmp_path, "train", np.zeros((4, 3, 3)), np.zeros(3), packed=False)
    with pytest.raises(ConfigError, match="4 pictures but 3 labels"):
        read_raw(DataConfig(source=str(tmp_path)))
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="truncated"):
        read_raw(DataConfig(source=str(tmp_path)))


def test_calibration_draws_different_samples_by_seed(idx_folder: Path) -> None:
    config = DataConfig(source=str(idx_folder), validation=10, calibration=20)
    split = load_data(config, picture_model((1, 6, 5)), seed=0).splits["calibration"]
    first = [batch["image"] for batch in make_calibration(split, 10, 4, seed=3)]
    assert [len(batch) for batch in first] == [4, 4, 2]
    again = [batch["image"] for batch in make_calibration(split, 10, 4, seed=3)]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(np.unique(np.concatenate(first).reshape(10, -1), axis=0)) == 10
    assert sum(len(batch["image"]) for batch in make_calibration(split, 999, 8, seed=0)) == 20


def test_raw_pixels_are_shared_by_the_splits(idx_folder: Path) -> None:
    bundle = load_data(
        DataConfig(source=str(idx_folder), validation=10, calibration=5), picture_model((1, 6, 5)), seed=0
    )
    stores = {id(bundle.splits[name].store.samples) for name in ("train", "validation", "calibration")}
    assert len(stores) == 1
