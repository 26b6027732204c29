"""Inputs and golden values shared by the tests of objectives, and one way to evaluate an objective on tensors."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from compressor.distil.objectives.base import Batch, Context, Step
from compressor.distil.objectives.registry import get

_STORED = json.loads((Path(__file__).parents[3] / "data" / "objective_values.json").read_text())
GOLDEN = _STORED["values"]
TEACHER, STUDENT, TEACHER_FEATURES, STUDENT_FEATURES = (
    torch.tensor(_STORED["inputs"][name], dtype=torch.float32)
    for name in ("teacher_logits", "student_logits", "teacher_features", "student_features")
)
LABELS = torch.tensor(_STORED["inputs"]["labels"])
FIRST = Step(0, 10, 0)


def made(name, options=None, match=None, student=None, teacher=None):
    """A bound objective; prepared when signals are given."""
    loaded = get(name)
    objective = loaded(loaded.Options.model_validate(options or {}), match)
    offered = {"logits": 1, "hidden": 1}
    assert objective.bind(offered, offered) == []
    if student is not None:
        objective.prepare(Context(student, teacher, torch.Generator().manual_seed(0), "cpu"))
    return objective


def evaluate(name, student, teacher, batch=None, options=None, match=None, step=FIRST, signal="logits"):
    """sum / count of one objective on one tensor a model."""
    own, other = {signal: student}, {signal: teacher}
    objective = made(name, options, match, own, other)
    term = objective(own, other, batch or Batch(LABELS, None), step)
    return term.sum / term.count


def value(*arguments, **named):
    """:func:`evaluate` as a number."""
    return float(evaluate(*arguments, **named))


def gradient(name, student, teacher, **named):
    """Gradient of the value by the student's tensor."""
    leaf = student.clone().requires_grad_()
    evaluate(name, leaf, teacher, **named).backward()
    return leaf.grad
