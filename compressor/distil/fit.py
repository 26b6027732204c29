"""Does a stage fit its task, its data and the way it is launched? Asked by the planner, before the first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.distil.objectives import registry
from compressor.errors import CompressError, Problem
from compressor.recipe import DistilStage
from compressor.strategy import MixStrategy, MixupStrategy, SelectStrategy, SubsetStrategy
from compressor.types import Array

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compressor.data.pairs import Groups
    from compressor.data.types import DataBundle

EMBEDDING_TASKS = frozenset({"sentence-embedding", "sentence-similarity", "retrieval"})
SINGLE_LABEL = frozenset({"text-classification", "image-classification"})
UNLABELLED = -100


def fit_problems(
    stage: DistilStage,
    where: str,
    *,
    task: str,
    module: nn.Module,
    example: Mapping[str, Tensor],
    data: DataBundle,
    processes: int = 1,
) -> list[Problem]:
    """Everything about one distil stage that would fail at its first step.

    Args:
        stage, where: the stage and its key in the recipe.
        task: of the teacher.
        module: the teacher, whose outputs the student's have the shape of.
        example: model inputs of a few samples.
        data: all parts.
        processes: how many train together.
    """
    found = _embedding_problems(stage, where) if task in EMBEDDING_TASKS else []
    found += _class_problems(where, module, example, data) if task.endswith("-classification") else []
    found += _group_problems(stage, where, getattr(data.splits["train"], "groups", None), processes)
    found += _memory_problems(stage, where, module, processes)
    found += _strategy_problems(stage, where, example)
    if any(isinstance(item, MixStrategy) and item.by == "domain" for item in stage.strategy) and not data.domains:
        found.append(Problem(f"{where}.strategy", "mix by domain needs the column of domains: give `data.domain`"))
    names = [name for name, _ in module.named_parameters()]
    if stage.freeze and all(any(fnmatch(name, pattern) for pattern in stage.freeze) for name in names):
        found.append(Problem(f"{where}.freeze", "freezes every parameter: nothing would train"))
    if "mask" in stage.augment:
        from compressor.distil.stream import TrainingSet

        if TrainingSet.of(data).mask_id is None:
            found.append(Problem(f"{where}.augment", "`mask` needs a tokenizer with a mask token"))
        if "token-drop" in stage.augment:
            found.append(Problem(f"{where}.augment", "`mask` and `token-drop` do not go together"))
    found += _estimate_problems(stage, where, task, data)
    if stage.data == "transfer" and "transfer" not in data.splits:
        found.append(Problem(f"{where}.data", "there is no transfer part; give `data.transfer`"))
    return found


def _estimate_problems(stage: DistilStage, where: str, task: str, data: DataBundle) -> list[Problem]:
    """What the estimate of the labels' weight and rounds of self-distillation need."""
    found = []
    if stage.labels == "estimate":
        whys = [] if task in SINGLE_LABEL else [f"the task is {task}, not one class a sample"]
        whys += [f"{n} has no labels" for n in ("train", "validation") if data.splits[n].labels is None]
        whys += [] if stage.objective else ["there is no objective to weigh them against"]
        found += [Problem(f"{where}.labels", f'`"estimate"` is not possible: {why}') for why in whys[:1]]
    if stage.rounds > 1:
        named = [i for i, item in enumerate(stage.objective) if item.match is not None and ":" in item.match.teacher]
        text = "names a further teacher, but after the first of several `rounds` the student's last self teaches"
        found += [Problem(f"{where}.objective.{i}.match", text) for i in named]
    return found


def _embedding_problems(stage: DistilStage, where: str) -> list[Problem]:
    """Embeddings are no class scores, so nothing that reads probabilities out of them means anything."""
    from compressor.distil.objectives.rows import LogitObjective

    found = []
    for number, item in enumerate(stage.objective):
        try:
            loaded = registry.get(item.use)
        except CompressError:
            continue  # reported by the check of the objectives
        if issubclass(loaded, LogitObjective):
            text = (
                f"`{item.use}` compares class probabilities, and this model gives embeddings; use `cosine` or `hidden`"
            )
            found.append(Problem(f"{where}.objective.{number}.use", text))
    for number, strategy in enumerate(stage.strategy):
        if not isinstance(strategy, SubsetStrategy | MixupStrategy):
            text = f"`{strategy.use}` reads class probabilities, and this model gives embeddings"
            found.append(Problem(f"{where}.strategy.{number}.use", text))
    return found


def _group_problems(stage: DistilStage, where: str, groups: Groups | None, processes: int) -> list[Problem]:
    """Lists of passages: have they wrong ones, and do the scores speak of all of them?"""
    from compressor.distil.terms import made

    found = []
    if groups is None:
        if stage.negatives is not None:
            found.append(Problem(f"{where}.negatives", "needs queries with passages: the task `retrieval`"))
        return found
    bare = int((groups.sizes < 3).sum())
    for number, item in enumerate(stage.objective):
        objective, place = made(item), f"{where}.objective.{number}.use"
        if objective is None or not reads_groups(objective):
            continue
        offline = getattr(objective.options, "teacher", "") == "offline"  # type: ignore[attr-defined]
        if getattr(objective, "several", False) and bare == len(groups) and stage.negatives is None:
            text = f"`{item.use}` compares right with wrong passages, and the data have none: give rows whose "
            found.append(Problem(place, text + "`data.label` is 0, or `negatives = { count = 4 }`"))
        if offline and bare and stage.negatives is not None:
            text = f"`{item.use}` reads scores, which mined passages have not: {bare} queries have no wrong passage"
            found.append(Problem(f"{where}.negatives", text))
    if groups.answers and stage.labels and (stage.accumulate > 1 or processes > 1):
        text = "pairs are taught against the whole batch: leave `accumulate` out, launch one process, or set labels = 0"
        found.append(Problem(f"{where}.labels", text))
    return found


def reads_groups(objective: Any) -> bool:
    """Does an unbound objective read lists that the data group?"""
    options = objective.options
    return not hasattr(options, "student") or options.student != "score" or options.teacher == "offline"


def _class_problems(where: str, module: nn.Module, example: Mapping[str, Tensor], data: DataBundle) -> list[Problem]:
    import torch

    with torch.no_grad():
        classes = int(module.eval()(**example).shape[-1])
    found = []
    for name, split in data.splits.items():
        highest = _highest(split.labels)
        if highest >= classes:
            found.append(
                Problem(f"{where}.labels", f"the labels of {name} go up to {highest}, the model has {classes} classes")
            )
    if len(data.labels) > classes:
        text = f"the data names {len(data.labels)} classes, the model has {classes} outputs"
        found.append(Problem(f"{where}.labels", text))
    return found


def _highest(labels: Array | None) -> int:
    if labels is None or not np.issubdtype(np.asarray(labels).dtype, np.integer) or not np.size(labels):
        return -1
    return int(np.max(labels))


def _memory_problems(stage: DistilStage, where: str, module: nn.Module, processes: int) -> list[Problem]:
    found = []
    if stage.checkpoint_activations:
        from compressor.distil.activations import blocks

        if not blocks(module):
            text = "the model has neither a list of layers nor a Sequential to compute again"
            found.append(Problem(f"{where}.checkpoint_activations", text))
    cut = stage.accumulate > 1 or processes > 1
    if stage.rollouts is not None and stage.rollouts.used and cut:
        text = "`rollouts` writes whole batches: leave `accumulate` out and launch one process"
        found.append(Problem(f"{where}.rollouts", text))
    return found


def _strategy_problems(stage: DistilStage, where: str, example: Mapping[str, Tensor]) -> list[Problem]:
    found = []
    kinds = [type(strategy) for strategy in stage.strategy]
    for kind in (SelectStrategy, MixStrategy, MixupStrategy):
        if kinds.count(kind) > 1:
            found.append(Problem(f"{where}.strategy", f"more than one `{_name(stage, kind)}`"))
    if MixupStrategy in kinds:
        if any(not tensor.is_floating_point() for tensor in example.values()):
            found.append(Problem(f"{where}.strategy", "`mixup` blends pictures, and this model reads token numbers"))
        if stage.cache == "on":
            found.append(
                Problem(f"{where}.cache", "`mixup` shows the teacher new blends at every step: nothing can be cached")
            )
    if stage.rollouts is not None and any(kind in kinds for kind in (SelectStrategy, MixupStrategy)):
        found.append(Problem(f"{where}.strategy", "`select` and `mixup` do not work with `rollouts`"))
    return found


def _name(stage: DistilStage, kind: type) -> str:
    return next(strategy.use for strategy in stage.strategy if isinstance(strategy, kind))


def warnings(stage: DistilStage, module: nn.Module) -> Sequence[str]:
    """What works, but not as one might think."""
    from compressor.distil.norms import batch_norms

    found, pieces = _pattern_warnings(stage, module), stage.accumulate  # processes share their statistics
    if pieces > 1 and batch_norms(module):
        found += [f"batch normalisation sees pieces of {stage.batch // pieces} samples, not the batch of {stage.batch}"]
    return tuple(found)


def _pattern_warnings(stage: DistilStage, module: nn.Module) -> list[str]:
    """Patterns of parameter names that match nothing; heads of the stage's own objectives are not known here."""
    names = [name for name, _ in module.named_parameters()]
    lost = {
        key: [pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in names)]
        for key, patterns in (("freeze", stage.freeze), ("unfreeze", stage.unfreeze))
    }
    return [f"`{key}`: `{pattern}` matches no parameter" for key, patterns in lost.items() for pattern in patterns]
