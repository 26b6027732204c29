"""The loop: resume to the same bytes, cache equals online, null twin, stops, best epoch, frozen parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from compressor.distil.loop import CHECKPOINT, distil  # noqa: E402
from compressor.errors import ConfigError, StageError  # noqa: E402
from compressor.recipe import DistilStage  # noqa: E402
from tests.unit.distil import toy  # noqa: E402
from tests.unit.distil.toy import Pictures, Sentences, bundle, convnet, transformer  # noqa: E402

pytestmark = pytest.mark.train
SCRIPT = Path(__file__).with_name("toy.py")
ROOT = Path(__file__).parents[3]
ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
RICH = {
    "kind": "distil",
    "epochs": 3,
    "batch": 16,
    "precision": "fp32",
    "augment": ["flip", "shift"],
    "views": 2,
    "ema": 0.9,
    "patience": 3,
    "objective": [{"use": "kd"}, {"use": "hidden", "weight": 0.2}],
}


def stage(**settings):
    return DistilStage.model_validate({"kind": "distil", "epochs": 2, "batch": 16, "precision": "fp32"} | settings)


def run(folder, config, *, data=None, student=None, teacher=None, name="work", **more):
    student = student if student is not None else convnet(3, 5)
    teacher = teacher if teacher is not None else convnet(8, 6)
    settings = {"seed": 3, "teacher_digest": "t", "signals": {}} | more
    data = data or bundle()
    result = distil(student, teacher, data, config, work=folder / name, bank=folder / "bank", **settings)
    return result, student


def same(a, b):
    left, right = a.state_dict(), b.state_dict()
    return all(torch.equal(left[name], right[name]) for name in left)


def test_a_killed_run_ends_with_the_same_bytes(tmp_path):
    """Death without warning in the first epoch (a checkpoint at every step) and in the last (one an epoch)."""
    toy.main(RICH, str(tmp_path / "calm"), -1)
    killed = {die_at: tmp_path / f"killed-{die_at}" for die_at in (9, 22)}
    processes = [
        subprocess.Popen([sys.executable, str(SCRIPT), json.dumps(RICH), str(folder), str(die_at)], cwd=ROOT, env=ENV)
        for die_at, folder in killed.items()
    ]
    assert [process.wait() for process in processes] == [9, 9]
    for folder in killed.values():
        toy.main(RICH, str(folder), -1)
        calm, again = (torch.load(f / "student.pt", weights_only=True) for f in (tmp_path / "calm", folder))
        assert all(torch.equal(calm[name], again[name]) for name in calm)
        assert (folder / "history.json").read_text() == (tmp_path / "calm" / "history.json").read_text()


class StopError(Exception):
    """Raised by a test in the middle of a run."""


def test_an_exception_in_the_middle_and_the_same_call_again(tmp_path):
    config = stage(epochs=3, optimiser="sgd", schedule="one-cycle")
    _, calm = run(tmp_path, config, name="calm")

    def stop_after_one(kind, event):
        if kind == "epoch" and event["epoch"] == 1:
            raise StopError

    with pytest.raises(StopError):
        run(tmp_path, config, name="broken", on_event=stop_after_one)
    seen = []
    result, student = run(
        tmp_path, config, name="broken", on_event=lambda kind, event: seen.append((kind, dict(event)))
    )
    assert ("resume", {"epoch": 2, "step": 0}) in seen
    assert len(result.history) == 3
    assert same(student, calm)


def test_a_finished_run_returns_at_once(tmp_path):
    first, trained = run(tmp_path, stage())
    data = bundle()
    again, student = run(tmp_path, stage(), data=data)
    assert again == first
    assert same(student, trained)
    assert not student.training
    assert data.splits["train"].calls == 1  # for the digest of the data alone


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    run(tmp_path, stage())
    for other in ({"seed": 4}, {"teacher_digest": "u"}, {"data": bundle(train=80)}, {"student": convnet(3, 9)}):
        with pytest.raises(StageError, match="belongs to another run"):
            run(tmp_path, stage(), **other)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    run(tmp_path, stage())
    path = tmp_path / "work" / CHECKPOINT
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(StageError, match="cannot be read"):
        run(tmp_path, stage())


def test_a_pickle_in_the_place_of_the_checkpoint_is_not_executed(tmp_path):
    (tmp_path / "work").mkdir()
    torch.save({"fingerprint": StopError}, tmp_path / "work" / CHECKPOINT)
    with pytest.raises(StageError, match="cannot be read"):
        run(tmp_path, stage())


def test_cached_and_online_teachers_give_the_same_training(tmp_path):
    for objective in ("kd", "hidden"):
        config = {"objective": [{"use": objective}]}
        cached, one = run(tmp_path, stage(cache="on", **config), name=f"{objective}-on")
        online, other = run(tmp_path, stage(cache="off", **config), name=f"{objective}-off")
        assert cached.cached
        assert not online.cached
        for a, b in zip(cached.history, online.history, strict=True):
            assert a.loss == pytest.approx(b.loss, rel=2e-3)
        gaps = [float((x - y).abs().max()) for x, y in zip(one.parameters(), other.parameters(), strict=True)]
        assert max(gaps) < 2e-3


def test_text_with_cached_hidden_states_and_relations(tmp_path):
    settings = {"objective": [{"use": "kd"}, {"use": "hidden"}, {"use": "minilm-relations"}], "epochs": 2}
    found = {}
    for cache in ("on", "off"):
        result, _ = run(
            tmp_path, stage(cache=cache, **settings), data=bundle(Sentences, transfer=24), name=cache,
            student=transformer(2, 1, 8), teacher=transformer(4, 2),
        )  # fmt: skip
        found[cache] = result
    assert found["on"].cache_bytes > 0
    for a, b in zip(found["on"].history, found["off"].history, strict=True):
        assert a.terms == pytest.approx(b.terms, rel=2e-3)


def test_the_second_run_reads_the_bank(tmp_path):
    first, _ = run(tmp_path, stage(), name="one")
    second, _ = run(tmp_path, stage(learning_rate=2e-3), name="two")
    assert first.teacher_forwards == 96
    assert second.teacher_forwards == 8  # the samples on which the bank is compared with the teacher


def test_another_teacher_under_the_same_digest_is_noticed(tmp_path):
    run(tmp_path, stage(), name="one")
    with pytest.raises(StageError, match="differs from this teacher"):
        run(tmp_path, stage(), name="two", teacher=convnet(8, 7))


def test_views_are_cached_one_by_one(tmp_path):
    result, _ = run(tmp_path, stage(epochs=3, augment=["shift", "erase"], views=2))
    assert result.teacher_forwards == 2 * 96
    assert result.cache_bytes == 2 * 96 * 4 * 4


def test_the_null_twin_sees_the_same_steps_and_no_teacher(tmp_path):
    seen = {}

    def watched(name):
        data = bundle()
        batch = data.splits["train"].batch
        seen[name] = []
        data.splits["train"].batch = lambda index: (seen[name].append(np.array(index)), batch(index))[1]
        return data

    config = stage(augment=["shift"], views=2, cache="off")
    student, _ = run(tmp_path, config, data=watched("student"), name="student")
    teacher = convnet(8, 6)
    teacher.register_forward_hook(lambda *_: pytest.fail("the null twin ran the teacher"))
    twin, _ = run(tmp_path, config, data=watched("twin"), name="twin", teacher=teacher, labels_only=True)
    assert twin.steps == student.steps
    assert twin.teacher_forwards == 0
    assert student.teacher_forwards == 192
    steps = twin.steps
    assert all((a == b).all() for a, b in zip(seen["student"][-steps:], seen["twin"][-steps:], strict=True))
    assert set(twin.history[0].terms) == {"labels"}


def test_the_student_learns_and_the_teacher_does_not_change(tmp_path):
    teacher = convnet(8, 6)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    result, _ = run(tmp_path, stage(epochs=8, learning_rate=1e-2), teacher=teacher)
    assert result.history[-1].loss < 0.8 * result.history[0].loss
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_the_terms_add_up_to_the_loss(tmp_path):
    result, _ = run(tmp_path, stage(objective=[{"use": "kd"}, {"use": "kd", "options": {"temperature": 1}}]))
    for record in result.history:
        assert set(record.terms) == {"labels", "kd", "kd#2"}
        assert sum(record.terms.values()) == pytest.approx(record.loss)


def test_not_a_number_stops_with_the_step_and_keeps_the_checkpoint(tmp_path):
    data = bundle()
    data.splits["train"].pictures[7] = np.nan
    order_of_7 = None
    from compressor.distil.setup import seed_of
    from compressor.distil.stream import TrainingSet

    batches = TrainingSet.of(data).order(0, 16, seed_of(3, "order"))
    order_of_7 = next(i for i, batch in enumerate(batches) if 7 in batch)
    with pytest.raises(StageError, match=rf"nan at step {order_of_7} \(epoch 0\)") as caught:
        run(tmp_path, stage(), data=data, labels_only=True)
    assert "learning_rate" in caught.value.hint
    state = torch.load(tmp_path / "work" / CHECKPOINT, weights_only=True)
    assert all(torch.isfinite(tensor).all() for tensor in state["student"].values())


def test_exploding_weights_stop_too(tmp_path):
    with pytest.raises(StageError, match=r"at step|not finite"):
        run(tmp_path, stage(optimiser="sgd", learning_rate=1e20, clip=None, warmup=0, epochs=3), labels_only=True)


def test_patience_keeps_the_best_epoch(tmp_path):
    scores = iter([0.2, 0.9, 0.5, 0.4, 0.3])
    states = []

    def score(module):
        assert not module.training
        states.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
        return next(scores)

    result, student = run(tmp_path, stage(epochs=10, patience=2), score=score)
    assert result.best_epoch == 1
    assert [record.score for record in result.history] == [0.2, 0.9, 0.5, 0.4]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in student.state_dict().items())


def test_without_patience_the_last_epoch_counts_and_the_average_is_what_is_left(tmp_path):
    seen = {}
    result, student = run(
        tmp_path, stage(epochs=2, ema=0.5), score=lambda module: seen.update(module.state_dict()) or 1.0
    )
    assert result.best_epoch == 1
    assert all(torch.isfinite(p).all() for p in student.parameters())
    _, plain = run(tmp_path, stage(epochs=2), name="plain")
    assert not same(student, plain)


def test_patience_without_a_score_uses_validation_labels(tmp_path):
    result, _ = run(tmp_path, stage(patience=1, epochs=3))
    assert all(record.score is not None and 0 <= record.score <= 1 for record in result.history)


def test_frozen_parameters_do_not_move(tmp_path):
    before = convnet(3, 5).state_dict()
    _, student = run(tmp_path, stage(freeze=["stage1.*"], weight_decay=0.1))
    after = student.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("stage1"))
    assert not torch.equal(before["head.weight"], after["head.weight"])
    assert all(p.requires_grad for p in student.parameters())


def test_unlabelled_transfer_samples_are_seen_by_the_teacher_only(tmp_path):
    result, _ = run(tmp_path, stage(), data=bundle(transfer=32))
    assert result.teacher_forwards == 96 + 32
    assert result.steps == 2 * 8


def test_without_any_label_the_teacher_alone_teaches(tmp_path):
    data = bundle()
    data.splits["train"] = Pictures("train", 64, 1, labelled=False)
    result, _ = run(tmp_path, stage(), data=data)
    assert set(result.history[0].terms) == {"kd"}
    with pytest.raises(StageError, match="no labels"):
        run(tmp_path, stage(), data=data, labels_only=True, name="twin")


def test_bfloat16_trains_and_is_recorded(tmp_path):
    result, student = run(tmp_path, stage(precision="bf16"))
    assert result.precision == "bf16"
    assert all(p.dtype == torch.float32 for p in student.parameters())


def test_automatic_precision_is_decided_once_for_a_network(tmp_path):
    first, one = run(tmp_path, stage(precision="auto"), name="one")
    second, other = run(tmp_path, stage(precision="auto"), name="two")
    assert first.precision == second.precision
    assert same(one, other)


def test_objectives_that_cannot_be_are_refused_before_training(tmp_path):
    with pytest.raises(ConfigError, match="no `qkv` signals"):
        run(tmp_path, stage(objective=[{"use": "minilm-relations"}]))
    with pytest.raises(StageError, match="the teacher's \\(16, 5\\)"):
        run(tmp_path, stage(), teacher=wrong_classes())


def wrong_classes():
    from tests.unit.distil.toy import ConvNet

    return ConvNet(8, classes=5).eval()


def test_callers_random_state_and_settings_are_left_alone(tmp_path):
    student, teacher = convnet(3, 5), convnet(8, 6)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    run(tmp_path, stage(), student=student, teacher=teacher)
    assert torch.equal(torch.rand(3), expected)
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_null_twin_does_not_compute_what_has_no_label(tmp_path, monkeypatch):
    """Same weights as with all samples computed, and fewer samples; batch statistics would need them all."""
    from compressor.distil import step

    def trained(name):
        sizes = []
        twin = transformer(1, 7)
        twin.register_forward_pre_hook(
            lambda _, __, named: sizes.append(len(named["input_ids"])) if twin.training else None, with_kwargs=True
        )
        data = bundle(Sentences, 64, transfer=128)
        run(tmp_path, stage(optimiser="sgd"), data=data, student=twin, name=name, labels_only=True)
        return twin, sum(sizes)

    spared, few = trained("spared")
    monkeypatch.setattr(step, "_mixes_samples", lambda _: True)
    whole, all_ = trained("whole")
    assert all_ == 2 * 192
    assert 2 * 64 <= few <= 2 * 64 + 2  # a batch without any label keeps one sample
    for mine, theirs in zip(spared.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_batch_statistics_keep_the_null_twins_unlabelled_samples(tmp_path):
    data, seen = bundle(transfer=96), []
    batch = data.splits["transfer"].batch
    data.splits["transfer"].batch = lambda index: (seen.append(len(index)), batch(index))[1]
    run(tmp_path, stage(epochs=1), data=data, labels_only=True)
    assert sum(seen) >= 96
