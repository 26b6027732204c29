"""Self-distillation in rounds, and the weight of the labels estimated on validation (methods L10)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from compressor.ledger import StageOutput, code_digest
from compressor.recipe import DistilStage
from compressor.schedule import Schedule
from compressor.stages.run import Line, Run
from compressor.types import Array

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

FILE = "weight.json"
Distil = Callable[..., Line]


def in_rounds(run: Run, line: Line, stage: DistilStage, distil: Distil) -> Line:
    """Train ``line`` once a round: first on the teacher, then on what the round before made of the same student.

    Every round starts from the student as it enters the stage and is a stored stage of its own. ``labels =
    "estimate"`` is settled anew in each round, by :func:`estimated`.

    Args:
        distil: :func:`compressor.stages.training.distil`.
    """
    one, taught = stage.model_copy(update={"rounds": 1}), run
    found = line
    for number in range(stage.rounds):
        config = weighed(one, estimated(run, taught, line, one, distil)) if one.labels == "estimate" else one
        found = distil(run, line, config, labels_only=False, taught=taught)
        if number + 1 < stage.rounds:
            taught = replace(with_teacher(run, found.load(), found.key), before=found)
    return found


def with_teacher(run: Run, module: nn.Module, digest: str) -> Run:
    """``run`` with a trained student in the place of its teachers."""
    origin = replace(run.model.provenance, source="the student of the round before", digest=digest)
    return replace(run, model=replace(run.model, module=module, provenance=origin), panel=None)


def weighed(stage: DistilStage, alpha: float) -> DistilStage:
    """The stage with ``alpha`` on the labels and every objective's weight times ``1 - alpha``."""
    share = 1.0 - alpha
    objectives = tuple(
        item.model_copy(update={"weight": _times(item.weight, share)}) for item in stage.objective if share > 0
    )
    return stage.model_copy(update={"labels": alpha, "objective": objectives})


def _times(weight: float | Schedule, share: float) -> float | Schedule:
    if not isinstance(weight, Schedule):
        return weight * share
    return weight.model_copy(update={"from_": weight.first * share, "to": weight.final * share})


def label_weight(by_labels: Array, by_teacher: Array, labels: Array) -> tuple[float, Array]:
    """The mixture of two predictions that is nearest to the labels, clipped to [0, 1].

    alpha = argmin sum |alpha f_y + (1 - alpha) f_T - y|^2 = sum (f_y - f_T)(y - f_T) / sum (f_y - f_T)^2, over held-out
    samples; f_y was fitted on the labels, f_T on the teacher. Source: after Borup and Andersen, "Even your Teacher
    Needs Guidance: Ground-Truth Targets Dampen Regularization Imposed by Self-Distillation", 2021; the estimate is
    derived (methods L10).

    Args:
        by_labels, by_teacher: probabilities (N, C), or values (N,) of a regression.
        labels: one-hot (N, C), or values (N,).

    Returns:
        alpha, and the mean squared errors at alpha, 1 (labels alone) and 0 (teacher alone).

    >>> y = np.array([[1.0, 0.0], [0.0, 1.0]])
    >>> label_weight(y, 1 - y, y)[0], label_weight(1 - y, y, y)[0], label_weight(y, y, y)[0]
    (1.0, 0.0, 0.5)
    """
    apart, gap = by_labels - by_teacher, labels - by_teacher
    size = float((apart**2).sum())
    alpha = 0.5 if size == 0 else float(np.clip(float((apart * gap).sum()) / size, 0.0, 1.0))
    errors = [float(((a * apart - gap) ** 2).mean()) for a in (alpha, 1.0, 0.0)]
    return alpha, np.array(errors)


def estimated(run: Run, taught: Run, line: Line, stage: DistilStage, distil: Distil) -> float:
    """:func:`label_weight` of this student on the validation part: two fits, of which one is the null twin's.

    The fits and the estimate are stored stages.
    """
    by_labels = distil(run, line, stage.model_copy(update={"labels": 1.0}), labels_only=True)
    by_teacher = distil(run, line, stage.model_copy(update={"labels": 0.0}), labels_only=False, taught=taught)
    key = {
        "labels": by_labels.key,
        "teacher": by_teacher.key,
        "data": run.data.digests["validation"],
        "code": code_digest("stages/rounds"),
    }

    def work(folder: Path) -> StageOutput:
        wanted = np.asarray(run.data.splits["validation"].labels)
        known = wanted >= 0
        first, second = (_probabilities(run, fit)[known] for fit in (by_labels, by_teacher))
        alpha, errors = label_weight(first, second, np.eye(first.shape[-1])[wanted[known]])
        numbers = {"alpha": round(alpha, 6), "mse": errors[0], "mse_labels": errors[1], "mse_teacher": errors[2]}
        (folder / FILE).write_text(json.dumps({"alpha": alpha, **numbers}, indent=1))
        return StageOutput({name: round(float(value), 6) for name, value in numbers.items()})

    result = run.ledger.stage("label-weight", key, work)
    return float(json.loads((result.folder / FILE).read_text())["alpha"])


def _probabilities(run: Run, line: Line) -> Array:
    from compressor.evaluate import SplitEvalSet, predict

    logits = predict(run.runner(line.load()), SplitEvalSet(run.data.splits["validation"]), 256).astype(np.float64)
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    found: Array = shifted / shifted.sum(-1, keepdims=True)
    return found
