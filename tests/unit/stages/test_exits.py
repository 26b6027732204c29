"""The threshold of early exits: the lowest that keeps the promise on validation, and all above it."""

from __future__ import annotations

import numpy as np
import pytest

from compressor.errors import StageError
from compressor.exits import EarlyExit, early_exits, exit_problems
from compressor.export.exits import chosen
from compressor.plan import steps_of
from compressor.recipe import Recipe
from compressor.stages.exits import _choice

NAMES = ["exit_0"]


class Accuracy:
    """Scores logits against labels, as the stage's own scorer does."""

    def __init__(self, labels: np.ndarray, baseline: float) -> None:
        self.labels, self.baseline = labels, baseline

    def score_of(self, logits: np.ndarray) -> float:
        return float(np.mean(logits.argmax(1) == self.labels))


def outputs(count: int = 400) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """An end that is always right, and an exit that is right where it is sure."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, count)
    sharp = random.uniform(0.0, 4.0, count)
    right = random.uniform(size=count) < 0.34 + 0.16 * sharp
    guess = np.where(right, labels, (labels + 1) % 3)
    return {"logits": 5.0 * np.eye(3)[labels], "exit_0": sharp[:, None] * np.eye(3)[guess]}, labels


def test_lowest_threshold_within_the_drop() -> None:
    made, labels = outputs()
    found = _choice(EarlyExit(None), 0.02, Accuracy(labels, 1.0), made, NAMES)
    assert 0.98 - 1e-9 <= found.score < 1.0
    assert sum(found.shares) == pytest.approx(1.0)
    assert found.shares[0] > 0.1
    answer, number = chosen([made["exit_0"]], made["logits"], found.threshold)
    assert found.shares[0] == np.mean(number == 0)
    lower = _choice(EarlyExit(None), 0.05, Accuracy(labels, 1.0), made, NAMES)
    assert lower.threshold < found.threshold
    assert lower.shares[0] > found.shares[0]
    assert Accuracy(labels, 1.0).score_of(answer) == found.score


def test_a_given_threshold_is_taken() -> None:
    made, labels = outputs()
    assert _choice(EarlyExit(0.9), None, Accuracy(labels, 1.0), made, NAMES).threshold == 0.9


def test_what_no_exit_can_mend_is_said() -> None:
    made, labels = outputs()
    with pytest.raises(StageError, match="whole student loses"):
        _choice(EarlyExit(None), 0.01, Accuracy((labels + 1) % 3, 1.0), made, NAMES)
    wrong = {**made, "exit_0": 9.0 * np.eye(3)[(labels + 1) % 3]}
    with pytest.raises(StageError, match="no threshold"):
        _choice(EarlyExit(None), 0.0, Accuracy(labels, 1.0), wrong, NAMES)
    with pytest.raises(StageError, match="not logits"):
        _choice(EarlyExit(0.9), None, Accuracy(labels, 1.0), {**made, "logits": np.eye(3)[labels]}, NAMES)


def test_recipes_that_cannot_have_one() -> None:
    distil = {"kind": "distil", "objective": [{"use": "multi-exit", "options": {"export": "threshold"}}]}
    recipe = Recipe(stage=[distil], accept={"max_drop": None})  # type: ignore[list-item,arg-type]
    assert [item.where for item in exit_problems(recipe, "image-classification")] == ["accept.max_drop"]
    fine = Recipe(stage=[distil])  # type: ignore[list-item]
    assert early_exits(fine) == EarlyExit(None)
    assert not exit_problems(fine, "text-classification")
    assert "sentence-embedding" in exit_problems(fine, "sentence-embedding")[0].what
    assert any("first sure exit" in line for line in steps_of(fine, "checkpoint"))
    assert early_exits(Recipe()) is None
