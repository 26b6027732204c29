"""Augmentation, batch order, learning rates: functions of their arguments alone."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from compressor.distil.augment import augment, uniforms  # noqa: E402
from compressor.distil.optim import MovingAverage, learning_rate, optimiser  # noqa: E402
from compressor.distil.stream import UNLABELLED, TrainingSet  # noqa: E402
from compressor.recipe import DistilStage  # noqa: E402
from tests.unit.distil.toy import Pictures, Sentences, convnet  # noqa: E402

pytestmark = pytest.mark.train


def test_random_numbers_are_uniform_and_belong_to_sample_view_and_seed():
    u = uniforms(0, np.arange(20000), 0, 3)
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(float(u.mean()) - 0.5) < 0.01
    assert abs(np.corrcoef(u.T)[0, 1]) < 0.03
    assert np.array_equal(uniforms(0, np.array([7, 3]), 0, 3), u[[7, 3]])
    assert not np.array_equal(uniforms(0, np.arange(5), 1, 3), u[:5])
    assert not np.array_equal(uniforms(1, np.arange(5), 0, 3), u[:5])


def test_a_picture_does_not_depend_on_its_batch():
    pictures = {"image": torch.randn(20, 3, 28, 28)}
    names = ("flip", "shift", "erase")
    whole = augment(pictures, names, np.arange(20), 1, 5)["image"]
    part = augment({"image": pictures["image"][[4, 9]]}, names, np.array([4, 9]), 1, 5)["image"]
    assert torch.equal(whole[[4, 9]], part)
    assert not torch.equal(whole, augment(pictures, names, np.arange(20), 2, 5)["image"])


def test_flip_and_shift_move_pixels_and_nothing_else():
    pictures = torch.arange(28 * 28, dtype=torch.float32).view(1, 1, 28, 28).repeat(200, 1, 1, 1)
    flipped = augment({"image": pictures}, ("flip",), np.arange(200), 0, 0)["image"]
    turned = (flipped != pictures).flatten(1).any(1)
    assert 60 < int(turned.sum()) < 140
    assert torch.equal(flipped[turned], pictures[turned].flip(3))
    moved = augment({"image": pictures}, ("shift",), np.arange(200), 0, 0)["image"]
    offsets = {int(value) for value in moved[:, 0, 14, 14] - pictures[0, 0, 14, 14]}
    assert offsets == {28 * y + x for y in range(-2, 3) for x in range(-2, 3)}
    small = augment({"image": pictures[..., :8, :8]}, ("shift",), np.arange(200), 0, 0)["image"]
    assert len({int(value) for value in small[:, 0, 4, 4]}) == 9


def test_channels_last_pictures_are_augmented_alike():
    pictures = torch.randn(6, 3, 20, 20)
    names = ("flip", "shift", "erase")
    first = augment({"image": pictures}, names, np.arange(6), 0, 0)["image"]
    last = augment({"image": pictures.permute(0, 2, 3, 1).contiguous()}, names, np.arange(6), 0, 0)["image"]
    assert torch.allclose(first, last.permute(0, 3, 1, 2), atol=1e-6)


def test_token_drop_keeps_special_tokens_and_order():
    data = Sentences("train", 200, 1)
    positions = np.arange(200)
    inputs = {name: torch.from_numpy(array) for name, array in data.batch(positions).items()}
    found = augment(inputs, ("token-drop",), positions, 0, 0)
    lengths = found["attention_mask"].sum(1)
    before = inputs["attention_mask"].sum(1)
    assert (lengths <= before).all()
    dropped = float((before - lengths).sum()) / float((before - 2).sum())
    assert 0.07 < dropped < 0.13
    for i in range(200):
        row = found["input_ids"][i, : int(lengths[i])].tolist()
        assert row[0] == 1
        assert row[-1] == 2
        original = iter(data.tokens[i].tolist())
        assert all(token in original for token in row)  # a subsequence
    assert (found["input_ids"][found["attention_mask"] == 0] == 0).all()


def test_every_sample_is_seen_once_and_text_is_grouped_by_length():
    data = TrainingSet([Sentences("train", 333, 1), Sentences("transfer", 50, 2, labelled=False)])
    batches = data.order(0, 16, 7)
    assert sorted(np.concatenate(batches).tolist()) == list(range(383))
    assert all((a == b).all() for a, b in zip(batches, data.order(0, 16, 7), strict=True))
    assert not np.array_equal(batches[0], data.order(1, 16, 7)[0])
    padding = [int((data.lengths[b].max() - data.lengths[b]).sum()) for b in batches]
    shuffled = np.random.default_rng(0).permutation(383)
    plain = [int((data.lengths[p].max() - data.lengths[p]).sum()) for p in np.array_split(shuffled, len(batches))]
    assert sum(padding) < 0.35 * sum(plain)


def test_transfer_samples_have_no_labels_and_mix_with_the_others():
    data = TrainingSet([Pictures("train", 30, 1), Pictures("transfer", 20, 2)])
    assert (data.labels[30:] == UNLABELLED).all()
    mixed = data.batch(np.array([45, 2, 31, 29]))["image"]
    assert torch.equal(mixed[1], data.batch(np.array([2]))["image"][0])
    assert torch.equal(mixed[0], data.batch(np.array([45]))["image"][0])


def test_no_batch_of_one():
    data = TrainingSet([Pictures("train", 33, 1)])
    assert sorted(len(batch) for batch in data.order(0, 16, 0)) == [16, 17]


def test_learning_rates():
    def rates(**settings):
        stage = DistilStage.model_validate({"kind": "distil", "learning_rate": 1.0, "warmup": 0.1} | settings)
        return [learning_rate(step, 100, stage) for step in range(100)]

    cosine, linear, constant, cycle = (rates(schedule=s) for s in ("cosine", "linear", "constant", "one-cycle"))
    for found in (cosine, linear, constant):
        assert found[0] == pytest.approx(0.1)
        assert found[9] == found[10] == pytest.approx(1.0)
    assert cosine[55] == pytest.approx(0.5)
    assert linear[55] == pytest.approx(0.5)
    assert constant[-1] == 1.0
    assert cycle[0] == pytest.approx(0.04)
    assert cycle[30] == pytest.approx(1.0)
    assert 0 < cycle[-1] < 0.01


def test_biases_and_norms_have_no_weight_decay():
    student = convnet(3, 0)
    chosen = optimiser(student, [], DistilStage(kind="distil", weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in chosen.param_groups for p in group["params"]}
    assert decay == {id(p): 0.3 if p.dim() > 1 else 0.0 for p in student.parameters()}


def test_the_moving_average_follows_and_lends_its_weights():
    student = convnet(3, 0)
    average = MovingAverage(student, 0.9)
    start = student.head.bias.detach().clone()
    with torch.no_grad():
        student.head.bias.add_(1.0)
    average.update(1000)
    with average.applied():
        assert torch.allclose(student.head.bias, start + 0.1, atol=1e-6)
    assert torch.allclose(student.head.bias, start + 1.0)
