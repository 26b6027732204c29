"""Sparse tuning: only a share of the weights changes, those that changed most at first; resume; the average follows."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from tests.unit.distil.masks.test_zeros import StopError, run, stage  # noqa: E402
from tests.unit.distil.toy import convnet  # noqa: E402

pytestmark = pytest.mark.train


def changed(student, start):
    pairs = zip(student.parameters(), start.parameters(), strict=True)
    return sum(int((a != b).sum()) for a, b in pairs), sum(p.numel() for p in start.parameters())


@pytest.mark.parametrize("ema", [0.0, 0.8])
def test_a_share_of_the_weights_changes_and_weight_decay_leaves_the_rest(tmp_path, ema):
    config = stage(sparse_update={"share": 0.1}, weight_decay=0.2, ema=ema)
    result, student = run(tmp_path, config)
    count, total = changed(student, convnet(8, 5))
    assert 0.09 * total < count <= round(0.1 * total)
    assert [round(dict(record.values)["sparse_update.share"], 2) for record in result.history] == [1.0, 0.1, 0.1]
    assert {fact.action for fact in result.facts} == {"updated"}


def test_they_are_those_that_a_first_pass_changed_most(tmp_path):
    settings = {"schedule": "constant", "warmup": 0.0, "weight_decay": 0.0}
    _, whole = run(tmp_path, stage(epochs=1, **settings), name="first")
    # the first of two epochs selects: the same steps as the run of one epoch alone
    _, student = run(tmp_path, stage(epochs=2, sparse_update={"share": 0.2, "select": 4 / 7}, **settings))
    start = convnet(8, 5)
    first = torch.cat([(a - b).abs().reshape(-1) for a, b in zip(whole.parameters(), start.parameters(), strict=True)])
    now = torch.cat([(a != b).reshape(-1) for a, b in zip(student.parameters(), start.parameters(), strict=True)])
    assert float(first[now].min()) >= float(first[~now].max())


def test_a_broken_run_ends_with_the_same_bytes(tmp_path):
    config = stage(sparse_update={"share": 0.1, "select": 0.4}, ema=0.9)
    _, calm = run(tmp_path, config, name="calm")

    def stop(kind, event):
        if kind == "epoch" and event["epoch"] == 1:
            raise StopError

    with pytest.raises(StopError):
        run(tmp_path, config, name="broken", on_event=stop)
    _, again = run(tmp_path, config, name="broken")
    left, right = calm.state_dict(), again.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)
