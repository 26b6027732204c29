"""The label term of each kind of task, and a run on several labels with objectives that keep a state."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402

from compressor.data.types import DataBundle  # noqa: E402
from compressor.distil.loop import distil  # noqa: E402
from compressor.distil.objectives.base import Batch  # noqa: E402
from compressor.distil.step import label_term  # noqa: E402
from compressor.recipe import DistilStage  # noqa: E402
from tests.unit.distil.toy import Pictures, convnet  # noqa: E402

pytestmark = pytest.mark.train


def test_one_class_a_sample():
    logits, labels = torch.randn(4, 3), torch.tensor([0, -100, 2, 1])
    term = label_term(logits, Batch(labels, None))
    assert int(term.count) == 3
    assert float(term.sum / term.count) == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)


def test_one_class_a_token():
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[0, -100, 2], [1, 4, -100]])
    term = label_term(logits, Batch(labels, None))
    assert int(term.count) == 4
    expected = F.cross_entropy(logits.transpose(1, 2), labels)
    assert float(term.sum / term.count) == pytest.approx(float(expected), rel=1e-5)


def test_several_labels_a_sample():
    logits, labels = torch.randn(4, 3), torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]])
    term = label_term(logits, Batch(labels, None))
    expected = F.binary_cross_entropy_with_logits(logits, labels.float())
    assert float(term.sum / term.count) == pytest.approx(float(expected), rel=1e-5)


class Composites(Pictures):
    """Pictures with several labels: which of the four quarters are bright."""

    def __init__(self, name, count, seed, labelled=True):
        super().__init__(name, count, seed, labelled)
        random = np.random.default_rng(seed)
        marks = random.integers(0, 2, (count, 4))
        self.pictures = random.normal(0, 0.5, (count, 1, 12, 12)).astype(np.float32)
        for row, mark in enumerate(marks):
            for quarter in np.flatnonzero(mark):
                y, x = (quarter // 2) * 6, (quarter % 2) * 6
                self.pictures[row, 0, y : y + 6, x : x + 6] += 1.0
        self.labels = marks.astype(np.int64) if labelled else None


def learn(folder, objectives, labels, teacher, **more):
    parts = {"train": Composites("train", 96, 1), "transfer": Composites("transfer", 64, 3, labelled=False)}
    config = DistilStage.model_validate(
        {"kind": "distil", "epochs": 8, "batch": 16, "learning_rate": 0.01, "labels": labels, "objective": objectives}
    )
    student = more.pop("student", None) or convnet(4, 1)
    result = distil(
        student,
        teacher,
        DataBundle(parts, ("a", "b", "c", "d"), "toy", {}),
        config,
        seed=0,
        work=folder / "work",
        bank=folder / "bank",
        teacher_digest="t",
        signals={},
        **more,
    )
    return student, result


def test_a_multi_label_student_learns_from_labels_and_teacher(tmp_path):
    teacher, _ = learn(tmp_path / "teacher", [], 1.0, None, student=convnet(8, 5), labels_only=True)
    objectives = [{"use": "multi-label", "weight": 1.0}, {"use": "taid", "weight": 0.1}]
    student, result = learn(tmp_path / "student", objectives, 1.0, teacher)
    first, last = result.history[0], result.history[-1]
    assert set(last.terms) == {"labels", "multi-label", "taid"}
    assert last.terms["labels"] < first.terms["labels"] < 0.8
    assert last.terms["multi-label"] < 0.5 * first.terms["multi-label"]
    held = Composites("test", 100, 9)
    with torch.no_grad():
        right = (student(torch.from_numpy(held.pictures)) > 0).numpy() == held.labels
    assert right.mean() > 0.8
