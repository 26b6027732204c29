"""Batches of whole groups, wrong passages found for them, and short and long texts run apart."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from compressor.data.pairs import groups_of  # noqa: E402
from compressor.distil.groups import GroupOrder, candidates, grouped, pair_term  # noqa: E402
from compressor.distil.lengths import apart, best_cut  # noqa: E402
from compressor.distil.objectives.base import Batch, Step  # noqa: E402
from compressor.distil.strategies.draws import Draw  # noqa: E402
from compressor.strategy import Negatives  # noqa: E402

pytestmark = pytest.mark.train


class Texts:
    """Positions 0-19 are queries, 20-39 their passages, 40-99 wrong ones, 100-109 stand alone."""

    lengths = np.where(np.arange(110) < 20, 5, 50)

    def __len__(self) -> int:
        return 110


GROUPS = groups_of([np.array([q, 20 + q, *range(40 + 3 * q, 43 + 3 * q)]) for q in range(20)], answers=True)


def test_every_epoch_shows_each_group_whole_and_once():
    order = GroupOrder(Texts(), GROUPS, negatives=2)
    steps = [order.order(epoch, 16, seed=1) for epoch in (0, 1)]
    assert len(steps[0]) == len(steps[1]) == -(-(20 * 4 + 10) // 16)
    for batches in steps:
        seen = [tuple(at[numbers == number]) for at, numbers in batches for number in np.unique(numbers)]
        pairs = {group[:2] for group in seen if len(group) > 1}
        assert pairs == {(q, 20 + q) for q in range(20)}
        assert all(set(group[2:]) <= set(range(40 + 3 * group[0], 43 + 3 * group[0])) for group in seen)
        assert {len(group) for group in seen} == {1, 4}
        assert sorted(group[0] for group in seen if len(group) == 1) == list(range(100, 110))
    assert [p.tolist() for p, _ in steps[0]] == [p.tolist() for p, _ in order.order(0, 16, seed=1)]
    assert [p.tolist() for p, _ in steps[0]] != [p.tolist() for p, _ in steps[1]]


def test_a_selection_keeps_groups_whose_pair_is_left():
    kept = np.array([0, 20, 40, 42, 1, 3, 23])  # query 1 lost its passage
    left = GROUPS.among(kept, 110)
    assert [left.of(number).tolist() for number in range(len(left))] == [[0, 1, 2, 3], [5, 6]]
    assert left.answers


def test_mined_passages_are_the_nearest_that_are_wrong():
    bare = groups_of([np.array([q, 20 + q]) for q in range(20)] + [np.array([0, 21])], answers=True)
    places = torch.arange(40).float() % 20  # on an arc: the nearest of query q are passages q, q - 1, q + 1 ...

    def embed(positions):
        angle = places[torch.from_numpy(positions)] / 20
        return torch.stack([angle.cos(), angle.sin()], dim=1)

    found = candidates(bare, Negatives(pool=3), embed, seed=0)
    assert {29, 31} < set(found[10]) < {28, 29, 31, 32}
    assert found[0].tolist() == [22, 23, 24]  # 20 and 21 both answer query 0
    random = candidates(bare, Negatives(pool=3), None, seed=0)
    assert all(len(wrong) == 3 and 20 + q not in wrong for q, wrong in enumerate(random[:20]))
    assert candidates(GROUPS, Negatives(), None, seed=0)[4].tolist() == [52, 53, 54]  # the data's own come first


def test_a_batch_knows_groups_and_scores():
    scores = np.where(np.arange(110) < 20, np.nan, np.arange(110)).astype(np.float32)
    order = GroupOrder(Texts(), groups_of([np.array([0, 20])], scores))
    batch = grouped(Batch(None, None), Draw(0, np.array([0, 20]), np.array([0, 0])), order)
    assert batch.groups.tolist() == [0, 0]
    assert batch.scores[1] == 20
    assert grouped(batch, Draw(0, np.array([0])), order) is batch


def test_pairs_teach_without_a_teacher_whatever_else_is_in_the_batch():
    vectors = torch.eye(6)
    groups = torch.tensor([0, 0, 1, 1])
    alone = pair_term(vectors[[0, 0, 1, 1]], Batch(None, None, groups=groups), Step(0, 1, 0))
    more = torch.tensor([0, 0, 0, 1, 1, 2])  # a wrong passage and a text that stands alone
    beside = pair_term(vectors[[0, 0, 5, 1, 1, 4]], Batch(None, None, groups=more), Step(0, 1, 0))
    assert float(alone.sum) == pytest.approx(float(beside.sum))
    assert alone.count == beside.count == 2


class Mean(nn.Module):
    """Mean over real tokens of an embedding, and the embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 4)
        self.shapes: list[tuple[int, int]] = []

    def tap(self, inputs):
        self.shapes.append(tuple(inputs["input_ids"].shape))
        mask = inputs["attention_mask"].unsqueeze(-1)
        hidden = self.table(inputs["input_ids"]) * mask
        return {"hidden[0]": hidden, "logits": hidden.sum(1) / mask.sum(1)}


def test_short_and_long_texts_run_apart_with_the_same_signals():
    torch.manual_seed(0)
    lengths = torch.tensor([3, 20, 2, 19, 3])
    mask = (torch.arange(20)[None] < lengths[:, None]).long()
    inputs = {"input_ids": torch.randint(1, 50, (5, 20)) * mask, "attention_mask": mask}
    model = Mean()
    whole, split = model.tap(inputs), apart(model.tap)(inputs)
    assert model.shapes == [(5, 20), (3, 3), (2, 20)]
    for name, signal in whole.items():
        assert torch.allclose(signal, split[name], atol=1e-6)
    assert best_cut(torch.tensor([18, 20, 19])) is None
