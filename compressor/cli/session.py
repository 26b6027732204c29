"""From the command line's words to a checked plan: recipe, profiles, model, data and targets joined."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compressor.budgets import search_problems
from compressor.cli.devices import check_devices
from compressor.cli.lengths import length_problems, with_lengths
from compressor.cli.seeds import seed_problems
from compressor.cli.teachers import bank_lines, offered, open_panel, reading_problems
from compressor.cli.warnings import plan_warnings
from compressor.config import validate
from compressor.data.raw import RawData
from compressor.data.types import DataBundle
from compressor.distil.panel import Panel
from compressor.errors import ConfigError, PlanError, Problem, ProblemList
from compressor.models.types import LoadedModel
from compressor.plan import Plan, TargetView, channel_multiple, profile_plan, recipe_problems, steps_of, task_problems
from compressor.profile import HardwareProfile, expanded, load_profile
from compressor.profit import sparsity_notes, sparsity_problems
from compressor.recipe import DistilStage, PruneStage, Recipe, StudentStage, load_recipe
from compressor.rules import qat_problems
from compressor.types import EMBEDDING, MULTI_LABEL, TEXT2TEXT

TEXT_TASKS = (
    EMBEDDING
    | TEXT2TEXT
    | {
        "text-classification",
        "multi-label-text-classification",
        "token-classification",
        "causal-lm",
    }
)
IMPORT_STRING = re.compile(r"[A-Za-z_][\w]*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Request:
    """What the user asked for on the command line."""

    recipe: Path | None
    model: str | None
    data: str | None
    profiles: tuple[str, ...]
    max_drop: str | None
    task: str | None
    out: Path
    trust_remote_code: bool = False
    teachers: tuple[str, ...] = ()  # NAME=pkg.mod:factory
    seeds: int = 1  # pairs of student and null twin that are trained and compared
    devices: tuple[str, ...] = ()  # PROFILE=ssh://user@host

    def device_of(self, profile: str) -> str | None:
        """Address of the device that is attached for a profile."""
        return dict(word.split("=", 1) for word in self.devices).get(profile)

    @property
    def factory(self) -> str | None:
        return self.model if self.model and IMPORT_STRING.fullmatch(self.model) else None

    @property
    def loader(self) -> str | None:
        return self.data if self.data and IMPORT_STRING.fullmatch(self.data) else None


@dataclass(frozen=True)
class Session:
    """Everything a run needs, checked."""

    request: Request
    recipe: Recipe
    profiles: tuple[HardwareProfile, ...]
    model: LoadedModel
    data: DataBundle
    plan: Plan
    panel: Panel | None = None
    original: tuple[LoadedModel, DataBundle] | None = None  # the teacher's own, where the vocabulary is a smaller one


def recipe_of(request: Request) -> Recipe:
    """The recipe file, or the default stages of the one-line form, with the command line's words on top."""
    if request.recipe is not None:
        recipe = load_recipe(request.recipe)
    elif request.model is None:
        raise ConfigError.single(
            "the command line", "RECIPE", "give a recipe file, or --model with --data",
            hint="compress-for-device run --model DIR --data PATH --profile this-machine --max-drop 1%",
        )  # fmt: skip
    else:
        recipe = Recipe(name=_name_of(request.model))
    return _overridden(recipe, request)


def _name_of(model: str) -> str:
    stem = Path(model.split(":")[0]).stem if model.endswith(".onnx") else Path(model.split(":")[0]).name
    return re.sub(r"[^A-Za-z0-9-]+", "-", stem).strip("-").lower() or "run"


def _overridden(recipe: Recipe, request: Request) -> Recipe:
    data: dict[str, Any] = recipe.model_dump(mode="json", exclude_unset=True)
    if recipe.name != "run":
        data["name"] = recipe.name
    if request.model and not request.factory:
        data.setdefault("teacher", {})["model"] = request.model
    if request.task:
        data.setdefault("teacher", {})["task"] = request.task
    if request.data and not request.loader:
        data.setdefault("data", {})["source"] = request.data
    if request.max_drop is not None:
        data.setdefault("accept", {})["max_drop"] = request.max_drop
    if request.profiles:
        data["profiles"] = list(request.profiles)
    return validate(Recipe, data, "the command line")


def default_stages(recipe: Recipe, model: LoadedModel) -> Recipe:
    """Stages for the one-line form, by the kind of model; a recipe that has stages stays as it is."""
    if recipe.stage:
        return recipe
    quantize: dict[str, Any] = {"kind": "quantize"}
    if model.kind == "onnx":
        stages = [quantize]
    elif model.task in TEXT_TASKS:
        stages = [*_text_stages(model), quantize]
    else:
        kd: dict[str, Any] = {"use": "kd", "options": {"temperature": 2.0}}
        if model.task in MULTI_LABEL:
            kd = {"use": "multi-label"}
        stages = [{"kind": "prune", "ratio": 0.5}, {"kind": "distil", "epochs": 5, "objective": [kd]}, quantize]
    data = {**recipe.model_dump(mode="json", exclude_unset=True), "name": recipe.name, "stage": stages}
    return validate(Recipe, data, "the default recipe")


def _text_stages(model: LoadedModel) -> list[dict[str, Any]]:
    """A third of the layers, half of the heads and neurons go; the rest learns from outputs and hidden states."""
    from compressor.models.signals import available

    assert model.module is not None
    layers = max(0, available(model.module).get("hidden", 1) - 1)
    hidden = {"use": "hidden", "match": {"map": "last"}}
    kd = {"use": "kd", "options": {"temperature": 2.0}}
    cosine = {"use": "cosine", "match": {"student": "logits", "teacher": "logits"}}
    distil = {"kind": "distil", "epochs": 3, "batch": 32, "learning_rate": 1e-4}
    if model.task == "causal-lm":
        distil |= {"objective": [{"use": "kd", "weight": 0.5, "options": {"temperature": 1.0}}]}
        return [{"kind": "student", "keep_layers": max(1, layers // 2)}, distil]
    if model.task in TEXT2TEXT:
        distil |= {"objective": [{"use": "kd", "weight": 0.5, "options": {"temperature": 1.0}}]}
        encoder = max(0, available(model.module).get("encoder.hidden", 1) - 1)
        keep = {"keep_layers": max(1, encoder // 2), "decoder_layers": max(1, layers // 2)}
        return [{"kind": "student", **keep}, distil]
    if model.task not in EMBEDDING:
        distil["objective"] = [{"use": "multi-label"} if model.task in MULTI_LABEL else kd, hidden]
    else:
        distil |= {"objective": [cosine, hidden], "labels": 0.0}
    return [{"kind": "prune", "heads": 0.5, "neurons": 0.5, "layers": layers // 3}, distil]


def open_session(request: Request) -> Session:
    """Load, check and join everything; raises one error with every problem found."""
    from compressor.data import load_data, read_raw
    from compressor.models import load_model

    recipe = recipe_of(request)
    profiles = _load_profiles(recipe)
    check_devices(request.devices, profiles)
    if recipe.data.source is None and request.loader is None:
        raise PlanError.single("data.source", "is required", hint="Give `[data] source` in the recipe, or --data.")
    raw = read_raw(recipe.data, loader=request.loader)
    model = load_model(
        recipe.teacher,
        factory=request.factory,
        data=recipe.data,
        allow_remote_code=request.trust_remote_code,
        sample=raw.sample,
    )
    recipe = default_stages(recipe, model)
    problems = recipe_problems(recipe, model.kind, _objective_names())
    problems += qat_problems(recipe, profiles)
    problems += sparsity_problems(recipe, profiles) + search_problems(recipe, profiles[0])
    problems += task_problems(recipe, model.task, _positions(model))
    data: DataBundle | None = None
    panel: Panel | None = None
    try:
        data = load_data(recipe.data, model, seed=recipe.seed, raw=raw)
    except ProblemList as error:
        problems += error.problems
    if data is not None:
        problems += seed_problems(request.seeds, recipe, model, data) + length_problems(recipe, data)
    original, told = None, ""
    if data is not None and not problems:
        model, data, original, told = _smaller_vocabulary(recipe, model, data, raw)
    if data is not None and model.module is not None and not problems:
        panel, data = open_panel(request.teachers, recipe, model, raw, data, remote=request.trust_remote_code)
        problems += _module_problems(recipe, model, data, panel)
    if data is not None and model.onnx is not None and not problems:
        import numpy as np

        from compressor.stages.onnx_surgery import onnx_problems
        from compressor.stages.sized import size_problems

        problems += onnx_problems(recipe, model.onnx, data.splits["calibration"].batch(np.arange(2)))
        problems += size_problems(recipe, profiles, model.onnx)
    if problems or data is None:
        raise PlanError("the plan", problems)
    profiles = with_lengths(profiles, [model, *([original[0]] if original else [])], recipe.data.fixed_length)
    plan = _plan(recipe, profiles, model, data, target_views(profile.target for profile in profiles))
    plan = replace(plan, steps=(plan.steps[0], told, *plan.steps[1:])) if told else plan
    if request.seeds > 1:
        first, last = recipe.seed + 1, recipe.seed + request.seeds - 1
        which = f"seed {first}" if first == last else f"seeds {first} to {last}"
        more = f"student and null twin again with {which}: trained and scored, not shipped"
        plan = replace(plan, steps=(*plan.steps, more))
    banks = bank_lines(panel, model, recipe, data, request.out / "cache" / "teacher")
    return Session(request, recipe, profiles, model, data, replace(plan, banks=banks), panel, original)


def _smaller_vocabulary(
    recipe: Recipe, model: LoadedModel, data: DataBundle, raw: RawData
) -> tuple[LoadedModel, DataBundle, tuple[LoadedModel, DataBundle] | None, str]:
    """Model and data as the student sees them, those of the teacher where they differ, and what became of the words."""
    from compressor.students.transplant import Transplanted, transplant
    from compressor.students.vocabulary import Trimmed, trim

    made: Trimmed | Transplanted | None = trim(model, data, raw, recipe) or transplant(model, data, raw, recipe)
    return (model, data, None, "") if made is None else (made.model, made.data, (model, data), made.text)


def _positions(model: LoadedModel) -> int | None:
    """The longest text of a language model with position embeddings or a stated limit."""
    config = getattr(getattr(model.module, "model", None), "config", None)
    found = getattr(config, "max_position_embeddings", None)
    writes = model.task == "causal-lm" or model.task in TEXT2TEXT
    return found if writes and isinstance(found, int) else None


def _load_profiles(recipe: Recipe) -> tuple[HardwareProfile, ...]:
    """All profiles of a recipe; their problems are listed together. Targets must be registered."""
    from targets.registry import names

    profiles: list[HardwareProfile] = []
    problems: list[Problem] = []
    for name in expanded(recipe.profiles):
        try:
            profile = load_profile(name)
        except ConfigError as error:
            problems += [Problem(f"profiles.{name}", problem.what) for problem in error.problems]
            continue
        if profile.target not in names():
            from compressor.config import suggestion

            what = f"unknown target `{profile.target}`{suggestion(profile.target, names())}"
            problems.append(Problem(f"profiles.{name}.target", what))
        profiles.append(profile)
    if problems:
        raise ConfigError("the list of profiles", problems, hint="`compress-for-device profiles list` shows all.")
    return tuple(profiles)


def _objective_names() -> Sequence[str]:
    from compressor.distil.objectives.registry import names

    return tuple(names())


def _module_problems(recipe: Recipe, model: LoadedModel, data: DataBundle, panel: Panel | None = None) -> list[Problem]:
    """Problems that only a look at the module shows: what cannot be cut, matches that name no signal."""
    import numpy as np
    import torch

    from compressor import prune, students
    from compressor.distil.changes import stage_problems
    from compressor.distil.fit import fit_problems
    from compressor.distil.masks import mask_problems
    from compressor.distil.processes import launched
    from compressor.distil.rounding import problems as rounding_problems
    from compressor.distil.terms import check, offered_fields
    from compressor.models.signals import available

    example = {name: torch.from_numpy(array) for name, array in data.splits["calibration"].batch(np.arange(2)).items()}
    problems: list[Problem] = []
    assert model.module is not None
    signals = available(model.module)
    taught = offered(panel, model, recipe.teacher.signals)
    for position, stage in enumerate(recipe.stage):
        where = f"stage.{position}.{stage.kind}"
        if isinstance(stage, PruneStage | StudentStage):
            check_cut: Any = prune.check if isinstance(stage, PruneStage) else students.check
            found = check_cut(model.module, example, stage)
            problems += [Problem(f"{where}.{item.where}".rstrip("."), item.what) for item in found]
            if (
                isinstance(stage, StudentStage) and stage.drop_tokens
            ):  # others do not lie at the teacher's tokens any more
                signals = {name: count for name, count in signals.items() if name in ("logits", "pooled")}
        elif isinstance(stage, DistilStage):
            fields = offered_fields(stage, panel, getattr(data.splits["train"], "groups", None))
            problems += mask_problems(stage, where, model.module, example)
            problems += rounding_problems(stage, where, model.module, example)
            wrong = check(stage, signals, taught, where, launched(), fields)
            problems += wrong or reading_problems(panel, model, stage, taught, where)
            problems += [] if wrong else stage_problems(stage, model.module, taught, where, fields)
            problems += fit_problems(
                stage, where, task=model.task, module=model.module, example=example, data=data, processes=launched()
            )
    return problems


def target_views(wanted: Iterable[str] | None = None) -> Mapping[str, TargetView]:
    """What the back ends (all, or those ``wanted``: probing loads their runtimes) can do here."""
    from targets.base import Ready
    from targets.registry import names, probe

    views: dict[str, TargetView] = {}
    for name in names() if wanted is None else sorted(set(wanted)):
        found = probe(name)
        if isinstance(found, Ready):
            views[name] = TargetView(name, True, found.runs.value if found.runs else None, found.why_not)
        else:
            views[name] = TargetView(name, False, None, found.reason, found.hint)
    return views


def _plan(
    recipe: Recipe,
    profiles: tuple[HardwareProfile, ...],
    model: LoadedModel,
    data: DataBundle,
    views: Mapping[str, TargetView],
) -> Plan:
    per_profile = []
    for profile in profiles:
        names, rejected = _variant_names(recipe, profile, model)
        per_profile.append(profile_plan(profile, views[profile.target], names, rejected))
    facts = {
        "source": model.provenance.source,
        "kind": model.kind,
        "task": model.task,
        "digest": model.provenance.digest,
        "licence": model.provenance.licence or "unknown",
        "classes": str(len(model.labels)) if model.labels else "-",
    }
    sizes = {name: len(split) for name, split in data.splits.items()}
    warnings = plan_warnings(recipe, model, data) + sparsity_notes(recipe, profiles)
    return Plan(
        recipe,
        profiles,
        steps_of(recipe, model.kind),
        tuple(per_profile),
        facts,
        sizes,
        channel_multiple(profiles),
        warnings,
    )


def _variant_names(
    recipe: Recipe, profile: HardwareProfile, model: LoadedModel
) -> tuple[tuple[str, ...], Mapping[str, str]]:
    """Quantized candidates by name; for a torch teacher the exact list needs the exported graph, which comes later."""
    from compressor.recipe import QuantizeStage

    stage = next((item for item in recipe.stage if isinstance(item, QuantizeStage)), None)
    if stage is None or model.onnx is None:
        return ("int8 variants that fit the target",) if stage is not None and profile.quantization.int8 else (), {}
    from compressor.models.onnx_facts import describe
    from compressor.quantize import variants

    wanted, rejected = variants(stage, profile.quantization, describe(model.onnx), profile.constraints.precisions)
    return tuple(item.name for item in wanted), rejected
