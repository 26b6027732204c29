"""A cut in rounds: the stages of a recipe as they are carried out, with training between the steps of a cut."""

from __future__ import annotations

from collections.abc import Sequence

from compressor.errors import Problem
from compressor.recipe import DistilStage, PruneStage, Recipe, Stage

SHARES = ("ratio", "channels", "heads", "neurons", "experts")


def expanded(stages: Sequence[Stage]) -> list[Stage]:
    """``stages`` with every ``rounds`` written out: cut a little, train a part of the epochs, and again.

    Each round keeps the same share of what the one before left, so that all together keep what the stage asks for;
    whole layers and epochs are spread as evenly as they divide, the remainder of the epochs to the last rounds.
    """
    made: list[Stage] = []
    waiting: PruneStage | None = None
    for stage in stages:
        if isinstance(stage, PruneStage) and stage.rounds > 1:
            waiting = stage
        elif waiting is not None and isinstance(stage, DistilStage):
            made += _rounds(waiting, stage)
            waiting = None
        else:
            made.append(stage)
    return made


def _rounds(cut: PruneStage, train: DistilStage) -> list[Stage]:
    made: list[Stage] = []
    for number in range(cut.rounds):
        part = _part(cut, number)
        epochs = train.epochs * (number + 1) // cut.rounds - train.epochs * number // cut.rounds
        made += [part] if part is not None else []
        made.append(train.model_copy(update={"epochs": epochs}))
    return made


def _part(cut: PruneStage, number: int) -> PruneStage | None:
    """The cut of one round; None when nothing falls on it (fewer layers than rounds)."""
    wish = {name: getattr(cut, name) for name in SHARES}
    wish = {name: value if value is None else 1 - (1 - value) ** (1 / cut.rounds) for name, value in wish.items()}
    layers = cut.layers * (number + 1) // cut.rounds - cut.layers * number // cut.rounds
    speedup = cut.target_speedup ** (1 / cut.rounds) if cut.target_speedup is not None else None
    if not any([*wish.values(), layers, speedup]):
        return None
    return cut.model_copy(update={**wish, "layers": layers, "target_speedup": speedup, "rounds": 1})


def round_problems(recipe: Recipe, kind: str) -> list[Problem]:
    """Rounds that no training follows, or fewer epochs than rounds. ``kind`` is that of the teacher."""
    problems = []
    for position, stage in enumerate(recipe.stage):
        if not isinstance(stage, PruneStage) or stage.rounds == 1:
            continue
        where, after = f"stage.{position}.prune.rounds", next(iter(recipe.stage[position + 1 :]), None)
        if kind == "onnx" or not isinstance(after, DistilStage):
            problems.append(Problem(where, "needs a `distil` stage right after it, whose epochs follow the rounds"))
        elif after.epochs < stage.rounds:
            what = f"{stage.rounds} rounds cannot share {after.epochs} epochs: give the next stage more epochs"
            problems.append(Problem(where, what))
    return problems


__all__ = ["expanded", "round_problems"]
