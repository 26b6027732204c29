"""On-policy steps that keep the data's rows beside the student's, and rollouts whose share follows a schedule."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from pydantic import ValidationError  # noqa: E402

from compressor.distil.objectives.base import Batch  # noqa: E402
from compressor.distil.rollouts import OnPolicy  # noqa: E402
from compressor.language import Rollouts  # noqa: E402
from tests.unit.distil.test_language import gpt, train  # noqa: E402

pytestmark = pytest.mark.train
DATA = {"input_ids": torch.full((2, 8), 3), "attention_mask": torch.ones(2, 8, dtype=torch.int64)}
LABELS = torch.full((2, 8), 4)
DISTILLM2 = {"labels": 0.0, "objective": [{"use": "distillm2"}]}


def rollouts(**settings: object) -> OnPolicy:
    made = OnPolicy(Rollouts(prompt_tokens=3, max_new_tokens=7, **settings), gpt(0), seed=1)
    made.end = None
    return made


def test_rows_of_both_models_stand_in_one_batch_and_are_marked() -> None:
    inputs, batch = rollouts(fraction=1.0, beside=True).step(dict(DATA), Batch(LABELS, DATA["attention_mask"]), 0)
    assert inputs["input_ids"].shape == (4, 10)
    assert batch.student_made.tolist() == [False, False, True, True]
    assert batch.labels[:2, :8].unique().tolist() == [4]  # the data's rows keep their labels, the student's have none
    assert batch.labels[2:].unique().tolist() == [-100]
    assert batch.mask.sum(1).tolist() == [8, 8, 10, 10]
    assert batch.response[:2].sum(1).tolist() == [8, 8]
    assert batch.response[2:].sum(1).tolist() == [7, 7]
    assert torch.equal(inputs["attention_mask"], batch.mask)


def test_a_step_without_rollouts_says_that_nothing_was_made() -> None:
    inputs, batch = rollouts(fraction=0.0, beside=True).step(dict(DATA), Batch(LABELS, DATA["attention_mask"]), 0)
    assert inputs["input_ids"].shape == (2, 8)
    assert not batch.student_made.any()


def test_both_answers_train_from_blocks_and_the_share_follows_validation(tmp_path) -> None:
    feedback = {"kind": "feedback", "from": 0.3, "watch": "loss", "when": "falls", "by": 0.2}
    replay = {"kind": "linear", "from": 1.0, "to": 0.0}
    settings = {
        "rollouts": {"beside": True, "fraction": feedback, "replay": replay, "prompt_tokens": 4, "max_new_tokens": 4}
    }
    first, result = train(tmp_path, "first", epochs=3, **DISTILLM2, **settings)
    again, _ = train(tmp_path, "again", epochs=3, **DISTILLM2, **settings)
    assert all(torch.equal(first[name], again[name]) for name in first)
    shares = [record.values["rollouts.fraction"] for record in result.history]
    fell = result.history[1].loss < result.history[0].loss
    assert shares == pytest.approx([0.3, 0.3, 0.5 if fell else 0.3])
    assert [record.values["rollouts.replay"] for record in result.history][-1] == 0.0


def test_guesses_replace_tokens_of_the_data_in_one_pass() -> None:
    ids = torch.randint(1, 12, (3, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][0, 6:] = 0
    made = rollouts(fraction=1.0, guess=1.0)
    found, batch = made.step(dict(inputs), Batch(LABELS, inputs["attention_mask"]), 0)
    expected = made.student(**inputs).argmax(-1)
    assert torch.equal(found["input_ids"][1:, 1:], expected[1:, :-1])  # each after the data's own prefix
    assert torch.equal(found["input_ids"][:, 0], ids[:, 0])
    assert torch.equal(found["input_ids"][0, 6:], ids[0, 6:])  # padding stays
    assert batch.response.sum(1).tolist() == [5, 8, 8]
    none, _ = rollouts(fraction=1.0, guess=0.0).step(dict(inputs), Batch(LABELS, inputs["attention_mask"]), 0)
    assert torch.equal(none["input_ids"], ids)
    some, _ = rollouts(fraction=1.0, guess=0.5).step(dict(inputs), Batch(LABELS, inputs["attention_mask"]), 0)
    assert 0 < int((some["input_ids"] != ids).sum()) < int((found["input_ids"] != ids).sum())


def test_the_plan_says_that_the_teacher_judges_what_is_written(tmp_path) -> None:
    from compressor.cli.teachers import _decision
    from compressor.distil.terms import build
    from compressor.recipe import DistilStage

    for more, words in (
        ({"rollouts": {"fraction": 0.5}}, "judges what the student writes"),
        ({"strategy": [{"use": "mixup"}]}, "`mixup` makes new ones"),
    ):
        stage = DistilStage.model_validate({"kind": "distil", "objective": [{"use": "kd"}], **more})
        weighted = build(stage, {"logits": 1}, {"logits": 1})
        assert words in _decision(None, None, stage, weighted, None, None, tmp_path)


@pytest.mark.parametrize("value", [1.5, -0.1, {"kind": "linear", "from": 0.0, "to": 2.0}])
def test_shares_lie_between_0_and_1(value: object) -> None:
    with pytest.raises(ValidationError):
        Rollouts.model_validate({"fraction": value})
