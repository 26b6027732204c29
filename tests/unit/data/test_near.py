"""Near duplicates: what was saved again is found, what is merely alike is not, in bounded time."""

from __future__ import annotations

import numpy as np
import pytest

from compressor.data import load_data, near, read_raw
from compressor.errors import PlanError
from compressor.recipe import DataConfig


def smooth_pictures(count: int, seed: int, side: int = 28) -> np.ndarray:
    """uint8 (N, side, side, 1): random blobs, as different from each other as photographs are."""
    random = np.random.default_rng(seed)
    coarse = random.normal(0, 1, (count, 6, 6))
    grid = np.linspace(0, 5, side)
    weights = np.maximum(0, 1 - np.abs(grid[:, None] - np.arange(6)[None]))
    fine = weights @ coarse @ weights.T
    low, high = fine.min(axis=(1, 2), keepdims=True), fine.max(axis=(1, 2), keepdims=True)
    return (255 * (fine - low) / (high - low)).astype(np.uint8)[..., None]


def hashes(pictures: np.ndarray) -> near.PictureHashes:
    return near.picture_hashes(iter([pictures]))


def test_a_picture_saved_again_is_found_and_a_different_one_is_not() -> None:
    test, train = smooth_pictures(40, 1), smooth_pictures(300, 2)
    random = np.random.default_rng(3)
    noisy = np.clip(test[:10].astype(int) + random.integers(-6, 7, test[:10].shape), 0, 255).astype(np.uint8)
    brighter = np.clip(test[10:14].astype(int) + 2, 0, 255).astype(np.uint8)
    rows, twins = near.near(hashes(np.concatenate([train, noisy, brighter])), hashes(test))
    assert rows.tolist() == list(range(300, 314))
    assert twins.tolist() == list(range(14))


def test_a_resized_colour_copy_is_found() -> None:
    test = smooth_pictures(12, 4)
    bigger = np.repeat(np.repeat(np.repeat(test, 2, axis=1), 2, axis=2), 3, axis=3)
    rows, twins = near.near(hashes(bigger), hashes(test))
    assert rows.tolist() == twins.tolist() == list(range(12))


def test_empty_pictures_are_near_each_other_only() -> None:
    empty = np.zeros((2, 28, 28, 1), np.uint8)
    rows, _ = near.near(hashes(np.concatenate([empty, smooth_pictures(5, 1)])), hashes(empty))
    assert rows.tolist() == [0, 1]


def test_hash_pairs_are_those_of_a_plain_search(monkeypatch) -> None:
    random = np.random.default_rng(0)
    base = random.integers(0, 2**63, 500, dtype=np.uint64)
    flips = np.array([sum(1 << int(b) for b in random.choice(64, k, replace=False)) for k in range(8)], np.uint64)
    other = (base[:200, None] ^ flips[None]).ravel()
    found = {
        (int(a), int(b)) for left, right in near._hash_pairs(base, other) for a, b in zip(left, right, strict=True)
    }
    plain = np.argwhere(np.bitwise_count(base[:, None] ^ other[None]) <= near.HAMMING)
    assert found == {(int(a), int(b)) for a, b in plain}
    monkeypatch.setattr(near, "PAIR_LIMIT", 10)
    rows = {(int(a), int(b)) for left, right in near._hash_pairs(base, other) for a, b in zip(left, right, strict=True)}
    assert rows == {(i, 8 * i) for i in range(200)}


def sentences(count: int, seed: int) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(f"w{word}" for word in random.integers(0, 400, random.integers(20, 40))) for _ in range(count)]


def test_a_text_with_one_word_changed_is_found() -> None:
    test, train = sentences(60, 1), sentences(400, 2)
    changed = [" ".join([*text.split()[:-1], "other"]).upper().replace(" ", ",  ") for text in test[:20]]
    rows, twins = near.near(near.text_hashes(train + changed), near.text_hashes(test))
    assert rows.tolist() == list(range(400, 420))
    assert twins.tolist() == list(range(20))


def test_the_exact_similarity_decides() -> None:
    words = [f"w{i}" for i in range(42)]  # 40 trigrams
    close, far = words.copy(), words.copy()
    close[-1] = "x"  # 39 of 41 shared
    far[10], far[25] = "x", "y"  # 34 of 46 shared: 0.74
    rows, _ = near.near(near.text_hashes([" ".join(close), " ".join(far)]), near.text_hashes([" ".join(words)]))
    assert rows.tolist() == [0]


def test_minhash_estimates_the_jaccard_similarity() -> None:
    words = [f"w{i}" for i in range(400)]
    half = words[:266] + [f"v{i}" for i in range(134)]
    made = near.text_hashes([" ".join(words), " ".join(half)])
    estimate = float((made.signatures[0] == made.signatures[1]).mean())
    exact = near._jaccard(made.shingles(0), made.shingles(1))
    assert exact == pytest.approx(0.5, abs=0.02)
    assert estimate == pytest.approx(exact, abs=0.2)


def test_templates_do_not_explode() -> None:
    texts = ["the weather is fine today in the city of light"] * 3000
    left, _ = near._candidates(near.text_hashes(texts).signatures, near.text_hashes(texts).signatures)
    assert len(left) <= 3000 * near.BUCKET


def write_npz(path, copies: int) -> str:
    test, train = smooth_pictures(40, 1), smooth_pictures(200, 2)
    train[:copies] = np.clip(test[:copies].astype(int) + 3, 0, 255)
    labels = np.arange(240) % 10
    np.savez(path, x_train=train[..., 0], y_train=labels[:200], x_test=test[..., 0], y_test=labels[200:])
    return str(path)


def load(path: str, **settings: object):
    from tests.unit.data.conftest import picture_model

    config = DataConfig(source=path, validation=20, calibration=20, **settings)
    return load_data(config, picture_model(), seed=0, raw=read_raw(config))


def test_the_gate_reports_drops_or_refuses(tmp_path) -> None:
    path = write_npz(tmp_path / "set.npz", 9)
    reported = load(path)
    assert sum(item.count for item in reported.near) == 9
    assert {item.part for item in reported.near} == {"train", "validation", "calibration"}
    assert sum(len(split) for split in reported.splits.values()) == 240
    dropped = load(path, near_duplicates="drop")
    assert sum(len(split) for split in dropped.splits.values()) == 231
    assert len(dropped.splits["test"]) == 40
    with pytest.raises(PlanError, match="nearly samples of test"):
        load(path, near_duplicates="refuse")
    assert load(path, near_duplicates="off").near == ()


def test_a_fresh_test_set_is_a_part_of_its_own_and_guarded_too(tmp_path) -> None:
    path = write_npz(tmp_path / "set.npz", 0)
    fresh = smooth_pictures(30, 5)
    np.savez(tmp_path / "fresh.npz", x=fresh[..., 0], y=np.arange(30) % 10)
    bundle = load(path, fresh=str(tmp_path / "fresh.npz"))
    assert len(bundle.splits["fresh"]) == 30
    assert {item.against for item in bundle.near} == {"test", "fresh"}
    with np.load(path) as archive:
        np.savez(tmp_path / "leak.npz", x=archive["x_train"][:200], y=archive["y_train"][:200])
    with pytest.raises(PlanError, match="also stand in test"):
        load(path, fresh=str(tmp_path / "leak.npz"))


def test_data_that_a_teacher_declares_is_compared_with_test(tmp_path) -> None:
    from compressor.data.gate import check_declared

    path = write_npz(tmp_path / "set.npz", 0)
    config = DataConfig(source=path, validation=20, calibration=20)
    raw, bundle = read_raw(config), load(path)
    with np.load(path) as archive:
        theirs = np.concatenate([archive["x_test"][:7], archive["x_train"][:5]])
    np.savez(tmp_path / "theirs.npz", x=theirs)
    found = check_declared("main", (str(tmp_path / "theirs.npz"),), config, raw, {"test": bundle.rows["test"]})
    assert [(item.count, item.samples) for item in found] == [(7, 12), (0, 12)]
