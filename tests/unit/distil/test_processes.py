"""Two processes over gloo train what one process trains; only the first writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

pytestmark = [pytest.mark.train, pytest.mark.slow]
ROOT = Path(__file__).parents[3]
SETTINGS = {
    "kind": "distil",
    "epochs": 3,
    "batch": 16,
    "precision": "fp32",
    "patience": 3,
    "ema": 0.9,
    "labels": 0.5,
    "objective": [{"use": "kd"}, {"use": "hidden", "weight": 0.2}],
}


class Convolutions(torch.nn.Module):
    """With batch norm, whose statistics are those of all processes' pieces together."""

    def __init__(self, width, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.first = torch.nn.Sequential(torch.nn.Conv2d(1, width, 3, padding=1), torch.nn.BatchNorm2d(width))
        self.second = torch.nn.Conv2d(width, width + 2, 3, stride=2)
        self.head = torch.nn.Linear(width + 2, 4)

    def forward(self, image):
        return self.head(self.second(self.first(image).relu()).relu().mean((2, 3)))


def parts(kind):
    """Student, teacher and data: ragged text, or pictures; part of it unlabelled."""
    from tests.unit.distil.toy import Pictures, Sentences, bundle, transformer

    if kind == "text":
        return transformer(2, 1, 8), transformer(4, 2), bundle(Sentences, transfer=25)
    return Convolutions(3, 1), Convolutions(8, 2), bundle(Pictures, transfer=25)


def train(folder, settings):
    """Called in every process."""
    from compressor.distil.loop import distil
    from compressor.distil.processes import is_main
    from compressor.recipe import DistilStage

    student, teacher, data = parts(settings.pop("parts"))
    result = distil(
        student, teacher, data, DistilStage.model_validate(settings),
        seed=3, work=folder / "work", bank=folder / "bank", teacher_digest="t", signals={},
    )  # fmt: skip
    if is_main():
        torch.save(student.state_dict(), folder / "student.pt")
        history = [(record.loss, record.score, dict(record.terms)) for record in result.history]
        (folder / "history.json").write_text(json.dumps([history, result.teacher_forwards, result.steps]))
    else:
        (folder / "other.json").write_text(json.dumps(result.steps))


def launch(folder, settings, processes):
    folder.mkdir()
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes),
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
        str(Path(__file__)), str(folder), json.dumps(settings),
    ]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=env, check=True)


PICTURES = {"objective": [{"use": "kd"}], "learning_rate": 0.05}  # channels-last convolutions


@pytest.mark.parametrize(
    ("kind", "optimiser", "accumulate", "more"),
    [("text", "adamw", 1, {}), ("text", "sgd", 2, {}), ("pictures", "sgd", 1, PICTURES)],
)
def test_two_processes_give_the_curve_of_one(tmp_path, kind, optimiser, accumulate, more):
    (tmp_path / "one").mkdir()
    settings = SETTINGS | {"optimiser": optimiser, "parts": kind} | more
    train(tmp_path / "one", dict(settings))
    launch(tmp_path / "two", settings | {"accumulate": accumulate}, 2)
    one, two = (json.loads((tmp_path / name / "history.json").read_text()) for name in ("one", "two"))
    assert (tmp_path / "two" / "other.json").exists()  # the second process really took part
    assert one[2] == two[2]
    for (loss, score, terms), (other_loss, other_score, other_terms) in zip(one[0], two[0], strict=True):
        assert other_loss == pytest.approx(loss, abs=1e-4)
        assert other_score == pytest.approx(score, abs=0.05)
        assert other_terms == pytest.approx(terms, abs=1e-4)
    assert len(list((tmp_path / "two" / "work").iterdir())) == 1
    if optimiser == "adamw":
        return  # its steps have one size even where the gradient is rounding error, so weights drift apart
    left, right = (torch.load(tmp_path / name / "student.pt", weights_only=True) for name in ("one", "two"))
    assert max(float((left[name] - right[name]).abs().max()) for name in left) < 1e-5


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), json.loads(sys.argv[2]))
