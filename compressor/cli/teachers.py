"""What the command line adds to a plan about teachers: further ones, what they read, how large their bank will be."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.data.types import DataBundle
from compressor.errors import ConfigError, Problem
from compressor.models.types import LoadedModel
from compressor.recipe import DistilStage, Recipe
from compressor.strategy import MixupStrategy

if TYPE_CHECKING:
    from compressor.data.raw import RawData
    from compressor.distil.panel import Panel
    from compressor.distil.terms import Weighted

_OPTION = re.compile(r"(?P<name>[a-z][a-z0-9-]*)=(?P<entry>[A-Za-z_][\w.]*:[A-Za-z_]\w*)")


def factories_of(options: Sequence[str]) -> dict[str, str]:
    """``NAME=pkg.mod:factory`` of each ``--teacher`` by name."""
    found: dict[str, str] = {}
    for text in options:
        match = _OPTION.fullmatch(text)
        if match is None or match["name"] == "main":
            what = f"`{text}` is not of the form NAME=pkg.mod:factory"
            hint = "For instance `--teacher second=my.models:build`; the main teacher is `--model`."
            raise ConfigError.single("the command line", "--teacher", what, hint=hint)
        found[match["name"]] = match["entry"]
    return found


def open_panel(
    options: Sequence[str], recipe: Recipe, model: LoadedModel, raw: RawData, data: DataBundle, *, remote: bool
) -> tuple[Panel | None, DataBundle]:
    """The panel of teachers, and the data with what the declared training data of all teachers showed."""
    from compressor.data.gate import TEST_SIDE, check_declared
    from compressor.distil.panel import MAIN, load_panel

    panel = load_panel(recipe, model, raw, data, factories_of(options), remote=remote) if model.module else None
    tests = {name: data.rows[name] for name in TEST_SIDE if name in data.rows}
    declared = [(MAIN, recipe.teacher.trained_on), *((item.name, item.trained_on) for item in recipe.teacher.more)]
    found = [check_declared(name, sources, recipe.data, raw, tests) for name, sources in declared if sources]
    return panel, replace(data, near=(*data.near, *(item for part in found for item in part)))


def offered(panel: Panel | None, model: LoadedModel, mapping: Mapping[str, str]) -> dict[str, int]:
    """What all teachers together offer to objectives."""
    from compressor.distil.ensemble import others
    from compressor.distil.panel import panel_signals
    from compressor.models.signals import available

    assert model.module is not None
    return panel_signals(panel, available(model.module, mapping), others(panel))


def reading_problems(
    panel: Panel | None, model: LoadedModel, stage: DistilStage, taught: Mapping[str, int], where: str
) -> list[Problem]:
    """What the stage's objectives read that these teachers cannot give in their views. Only for a stage that checks."""
    from compressor.distil.panel import view_problems

    weighted = _built(model, stage, taught, panel)
    readers = [(item.name, item.objective.needs.teacher) for item in weighted]
    foreign = {teacher.name for teacher in panel.teachers if teacher.foreign} if panel is not None else set()
    lost = [item for item in weighted if "ends" in item.objective.needs.batch and item.teacher not in foreign]
    found = [Problem(where, f"`{i.name}`: teacher `{i.teacher}` has the student's own tokenizer") for i in lost]
    return found + view_problems(panel, stage, readers, where)


def _built(
    model: LoadedModel, stage: DistilStage, taught: Mapping[str, int], panel: Panel | None = None
) -> list[Weighted]:
    from compressor.distil.terms import build, offered_fields
    from compressor.models.signals import available

    assert model.module is not None
    return build(
        stage, available(model.module), taught, fields=offered_fields(stage, panel) | {"groups", "scores"}
    )  # checked before


def bank_lines(
    panel: Panel | None, model: LoadedModel, recipe: Recipe, data: DataBundle, root: Path
) -> tuple[str, ...]:
    """For each distil stage: will the teachers be cached, with how many bytes at most, found on four samples."""
    if model.module is None:
        return ()
    taught = offered(panel, model, recipe.teacher.signals)
    lines = []
    for number, stage in enumerate(recipe.stage, 1):
        if isinstance(stage, DistilStage):
            weighted = _built(model, stage, taught, panel)
            lines.append(f"stage {number}: {_decision(panel, model, stage, weighted, recipe, data, root)}")
    return tuple(lines)


def _decision(
    panel: Panel | None,
    model: LoadedModel,
    stage: DistilStage,
    weighted: Sequence[Weighted],
    recipe: Recipe,
    data: DataBundle,
    root: Path,
) -> str:
    from compressor.distil import teachers
    from compressor.distil.stream import TrainingSet

    names = frozenset[str]().union(*(item.objective.needs.teacher for item in weighted))
    if not names:
        return "the teacher is not run"
    if any(item.objective.needs.online_teacher for item in weighted):
        return "the teacher runs on every batch: an objective needs it online"
    if stage.rollouts is not None and stage.rollouts.used:
        return "the teacher runs on every batch: it judges what the student writes"
    if any(isinstance(strategy, MixupStrategy) for strategy in stage.strategy):
        return "the teacher runs on every batch: `mixup` makes new ones"
    samples = TrainingSet.of(data, stage.data)
    layouts = _layouts(panel, model, stage, weighted, names, recipe, samples)
    views = min(stage.views, stage.epochs) if stage.augment else 1
    found = teachers.decide(stage.cache, layouts, samples, views, False, root)
    if not found.cached:
        return f"the teacher runs on every batch: {found.reason}"
    return f"teacher outputs are cached: at most {found.reason} of {len(samples):,} samples in `{root}`"


def _layouts(
    panel: Panel | None,
    model: LoadedModel,
    stage: DistilStage,
    weighted: Sequence[Weighted],
    names: frozenset[str],
    recipe: Recipe,
    samples: Any,
) -> dict[str, Any]:
    import numpy as np
    import torch

    from compressor.distil.bank import Layout
    from compressor.distil.ensemble import PanelTap
    from compressor.distil.top import top_signals
    from compressor.models.signals import SignalTap, output_mask

    assert model.module is not None
    if panel is not None:
        with PanelTap(panel, model.module, names, recipe.teacher.signals, samples, dict) as tap:
            return tap.layouts()
    inputs = samples.batch(np.arange(min(4, len(samples))))
    with torch.no_grad(), SignalTap(model.module, sorted(names), recipe.teacher.signals) as single:
        found = dict(single(inputs))
    if stage.cache_logits is not None and "logits" in found:
        read: list[Any] = [item.objective for item in weighted if "logits" in item.objective.needs.teacher]
        tau = {float(objective.options.temperature) for objective in read}
        found |= top_signals(found.pop("logits"), stage.cache_logits, sorted(tau))
    return {name: Layout.of(name, signal, output_mask(inputs)) for name, signal in found.items()}
