"""What a user should know before a run: the warnings that `plan` and every report show."""

from __future__ import annotations

from typing import Any

from compressor.data.types import DataBundle, labelled
from compressor.models.types import LoadedModel
from compressor.recipe import DistilStage, Recipe
from compressor.types import MULTI_LABEL, TEXT2TEXT


def plan_warnings(recipe: Recipe, model: LoadedModel, data: DataBundle) -> tuple[str, ...]:
    """Of the model, the data and the stages, in words."""
    from compressor.distil.objectives.registry import describe
    from compressor.distil.probes.smoothing import smoothing_warnings

    found = list(model.provenance.notes) + list(data.notes)
    if model.provenance.licence is None:
        found.append("the teacher's licence is unknown; packages will say so (set `teacher.licence`)")
    if model.task in TEXT2TEXT:
        found.append(
            "latency is of one pass over a source and its whole target, the dearest step of writing it; "
            "`python infer.py --benchmark TEXT` times all of it"
        )
    if model.task in MULTI_LABEL and any(_competing(stage) for stage in recipe.stage):
        found.append("`kd` makes the labels of a sample compete; the objective `multi-label` does not")
    found += smoothing_warnings(recipe, lambda use: {name: value for name, _, value in describe(use).options})
    found += [
        f"{item.count} samples of {item.part} are nearly samples of {item.against}" for item in data.near if item.count
    ]
    if data.duplicates_dropped:
        found.append(f"{data.duplicates_dropped} train samples that also stand in test were dropped")
    found += _training_warnings(recipe, model)
    found += _pass_notes(recipe) + _tokenizer_notes(recipe, model)
    if recipe.null_twin and not any(isinstance(stage, DistilStage) for stage in recipe.stage):
        found.append("no null twin: nothing is trained in this recipe")
    elif recipe.null_twin and not labelled(data):
        found.append("no null twin: there are no labels that it could learn from")
    return tuple(found)


def _competing(stage: Any) -> bool:
    return isinstance(stage, DistilStage) and any(item.use == "kd" for item in stage.objective)


def _training_warnings(recipe: Recipe, model: LoadedModel) -> list[str]:
    if model.module is None:
        return []
    from compressor.distil.fit import warnings

    stages = [stage for stage in recipe.stage if isinstance(stage, DistilStage)]
    return [text for stage in stages for text in warnings(stage, model.module)]


def _tokenizer_notes(recipe: Recipe, model: LoadedModel) -> list[str]:
    """What another tokenizer means for teaching and for scores."""
    if recipe.student_with("tokenizer") is None:
        return []
    found = []
    if any(item.use for stage in recipe.stage if isinstance(stage, DistilStage) for item in stage.objective):
        found.append(
            "the main teacher reads the new tokens as averages of its own; give its checkpoint again as "
            "`[[teacher.more]]` to be taught by it under its own tokenizer (`alm`, `uld`, `vocab-match`, `vocab-map`)"
        )
    if model.task == "causal-lm":
        found.append("perplexities of teacher and student are per token, and their tokens differ")
    return found


def _pass_notes(recipe: Recipe) -> list[str]:
    """What objectives cost before the first step."""
    from compressor.distil.changes import passes_of

    names = [name for stage in recipe.stage if isinstance(stage, DistilStage) for name in passes_of(stage)]
    return [f"`{name}` reads the training set once before the first step; cached outputs cost little" for name in names]
