"""Whole runs with objectives that survey, install and commit: resumed in mid-epoch they end with the same bytes."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from compressor.distil.loop import distil  # noqa: E402
from compressor.models.rebuild import load_student, save_student  # noqa: E402
from compressor.recipe import DistilStage  # noqa: E402
from tests.unit.distil.toy import Pictures, bundle, convnet  # noqa: E402

pytestmark = pytest.mark.train
SETS = {
    "heads": [
        {"use": "lelp", "options": {"subclasses": 2}},
        {"use": "multi-exit", "options": {"export": "outputs"}},
        {"use": "norm-direction"},
        {"use": "auxiliary-head", "options": {"answers": "10 01 11 00"}},
    ],
    "filters": [
        {"use": "dual-head"},
        {"use": "ladder", "options": {"hidden": 8}},
        {"use": "task-aware-filters"},
        {"use": "homomorphic-projection", "options": {"size": 3, "keep": False}},
    ],
}


class StopError(Exception):
    """Raised in the middle of a run."""


class Stopping(Pictures):
    def batch(self, index):
        if self.calls == self.die_at:
            raise StopError
        self.calls += 1
        return {"image": self.pictures[index]}


def run(folder, name, die_at=-1):
    data = bundle(Stopping, train=48)
    data.splits["train"].die_at = die_at
    config = DistilStage.model_validate(
        {"kind": "distil", "epochs": 2, "batch": 16, "precision": "fp32", "ema": 0.9, "objective": SETS[name]}
    )
    student = convnet(3, 5)
    settings = {"seed": 3, "teacher_digest": "t", "signals": {}, "checkpoint_seconds": 0.0}
    work, bank = folder / "work", folder / "bank"
    result = distil(student, convnet(8, 6), data, config, work=work, bank=bank, **settings)
    return result, student, data.splits["train"].calls


@pytest.mark.parametrize("name", sorted(SETS))
def test_a_stopped_run_ends_with_the_same_bytes_and_is_rebuilt_from_its_record(name, tmp_path):
    calm, student, calls = run(tmp_path / "calm", name)
    with pytest.raises(StopError):
        run(tmp_path / "stopped", name, die_at=calls - 2)
    again, resumed, _ = run(tmp_path / "stopped", name)
    assert again.record == calm.record
    assert again.facts == calm.facts
    first, second = student.state_dict(), resumed.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)

    done, third, _ = run(tmp_path / "calm", name)  # finished already: read back
    assert done.record == calm.record
    assert all(torch.equal(value, third.state_dict()[key]) for key, value in first.items())
    save_student(tmp_path, student, calm.record)
    rebuilt, picture = load_student(tmp_path, convnet(3, 5)), torch.ones(2, 1, 12, 12)
    made, wanted = rebuilt(picture), student(picture)
    both = zip(made, wanted, strict=True) if isinstance(made, tuple) else [(made, wanted)]
    assert all(torch.equal(a, b) for a, b in both)
