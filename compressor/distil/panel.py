"""Several teachers, or one that sees something else than its student: what is known without running them. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from compressor.config import suggestion
from compressor.data.alignment import AlignedSplit, aligned_view
from compressor.data.load import other_view
from compressor.data.raw import RawData
from compressor.data.types import DataBundle, Split
from compressor.errors import PlanError, Problem
from compressor.models.load import load_model
from compressor.models.types import ImageInput, LoadedModel, TextInput
from compressor.recipe import DataConfig, DistilStage, MoreTeacher, Recipe, TeacherConfig, TeacherView
from compressor.strategy import MixupStrategy
from compressor.types import TensorSpec

MAIN = "main"
Weights = Literal["fixed", "learned", "confidence", "agreement"]


@dataclass(frozen=True)
class Teacher:
    """One teacher of a panel.

    ``splits`` are the samples as it sees them; None: as the student does. ``order`` maps the main teacher's classes to
    this one's (empty: the same order).
    """

    name: str
    model: LoadedModel
    weight: float
    clean: bool
    splits: Mapping[str, Split] | None
    order: tuple[int, ...] = ()
    signals: Mapping[str, str] | None = None

    @property
    def tokenizer(self) -> str:
        """Digest of what turns texts into its inputs; empty for other inputs."""
        if not isinstance(self.model.preprocess, TextInput):
            return ""
        data = self.model.files.get(self.model.preprocess.tokenizer_file, b"")
        return hashlib.sha256(data + str(self.model.preprocess.max_length).encode()).hexdigest()[:16]

    @property
    def foreign(self) -> bool:
        """Does it cut a language model's text with a tokenizer of its own? Its logits then are over other classes."""
        return any(isinstance(split, AlignedSplit) for split in (self.splits or {}).values())

    def facts(self) -> dict[str, str]:
        """What identifies it, for keys and manifests."""
        origin = self.model.provenance
        return {
            "name": self.name,
            "source": origin.source,
            "digest": origin.digest,
            "licence": origin.licence or "unknown",
            "revision": origin.revision or "none",
            "weight": f"{self.weight:g}",
            "view": "clean" if self.clean else "same",
            "inputs": "own" if self.splits is not None else "the student's",
        }


@dataclass(frozen=True)
class Panel:
    """The teachers of a run, the main one first, and how they are weighed."""

    teachers: tuple[Teacher, ...]
    weights: Weights
    drop: float

    def facts(self) -> dict[str, Any]:
        """Part of the key of everything that was learned from this panel."""
        own = [{**teacher.facts(), "tokenizer": teacher.tokenizer, "order": teacher.order} for teacher in self.teachers]
        return {"teachers": own, "weights": self.weights, "drop": self.drop}


def load_panel(
    recipe: Recipe, model: LoadedModel, raw: RawData, data: DataBundle, factories: Mapping[str, str], *, remote: bool
) -> Panel | None:
    """Load the further teachers and make everyone's view; None for one teacher that sees what its student sees.

    Args:
        recipe: whose ``[teacher]`` says who there is.
        model: the main teacher, loaded.
        raw, data: the samples, read and cut.
        factories: name -> ``pkg.mod:factory`` of ``--teacher`` options; they add teachers or replace a ``model``.
        remote: allow code that a hub model brings.

    Raises:
        PlanError: a teacher does not fit the task, the classes or the samples.
    """
    wanted = [item for item in recipe.teacher.more if item.name not in factories]
    wanted += [_with_factory(recipe, name) for name in factories]
    main = recipe.teacher
    if not wanted and main.view == "same" and main.max_length is None and main.size is None:
        return None
    found = [Teacher(MAIN, model, main.weight, main.view == "clean", _own_splits(model, main, raw, data))]
    problems: list[Problem] = []
    for item in wanted:
        where = f"teacher.more.{item.name}"
        try:
            found.append(_load(item, recipe, model, raw, data, factories.get(item.name), remote, where))
        except PlanError as error:
            problems += [Problem(where, problem.what) for problem in error.problems]
    problems += _weighing(recipe, model, data)
    if problems:
        raise PlanError("the teachers", problems)
    return Panel(tuple(found), main.weights, main.drop)


def _with_factory(recipe: Recipe, name: str) -> MoreTeacher:
    known = {item.name: item for item in recipe.teacher.more}
    return known.get(name) or MoreTeacher(name=name)


def _load(
    item: MoreTeacher,
    recipe: Recipe,
    model: LoadedModel,
    raw: RawData,
    data: DataBundle,
    factory: str | None,
    remote: bool,
    where: str,
) -> Teacher:
    config = TeacherConfig(
        model=item.model, revision=item.revision, task=model.task, licence=item.licence, signals=item.signals
    )
    if factory is None and item.model is None:
        raise PlanError.single(where, f"has no model; give `model`, or `--teacher {item.name}=pkg.mod:factory`")
    own = load_model(
        config, factory=factory, data=_data_of(recipe.data, item), allow_remote_code=remote, sample=raw.sample
    )
    own = _with_size(own, item)
    splits = None if _same_inputs(own, model) else _view(raw, data, model, own)
    order = () if model.task == "causal-lm" and splits is not None else _order(own, model, where)
    return Teacher(item.name, own, item.weight, item.view == "clean", splits, order, item.signals)


def _view(raw: RawData, data: DataBundle, main: LoadedModel, own: LoadedModel) -> Mapping[str, Split]:
    """The samples as a model with other inputs sees them; blocks of text keep what they say."""
    if main.task == "causal-lm":
        return aligned_view(raw, data.rows, main, own, data.splits)
    return other_view(raw, data.rows, own)


def _data_of(config: DataConfig, view: TeacherView) -> DataConfig:
    """The data's settings as a teacher wants them."""
    changes: dict[str, Any] = {}
    if view.max_length is not None:
        changes["max_length"] = view.max_length
    if view.size is not None and config.preprocess is not None:
        changes["preprocess"] = config.preprocess.model_copy(update={"size": view.size})
    return config.model_copy(update=changes)


def _own_splits(model: LoadedModel, view: TeacherView, raw: RawData, data: DataBundle) -> Mapping[str, Split] | None:
    if view.max_length is None and view.size is None:
        return None
    if model.task == "causal-lm":
        what = "a language model's blocks are as long to the teacher as to the student; leave `max_length` out"
        raise PlanError.single("teacher.max_length", what)
    return other_view(raw, data.rows, _with_size(_with_length(model, view), view))


def _with_length(model: LoadedModel, view: TeacherView) -> LoadedModel:
    if view.max_length is None or not isinstance(model.preprocess, TextInput):
        return model
    preprocess = model.preprocess.model_copy(update={"max_length": view.max_length})
    specs = tuple(replace(spec, shape=(spec.shape[0], "sequence")) for spec in model.inputs)
    return replace(model, preprocess=preprocess, inputs=specs)


def _with_size(model: LoadedModel, view: TeacherView) -> LoadedModel:
    """The same model fed with pictures of another size, where it takes them."""
    if view.size is None or not isinstance(model.preprocess, ImageInput):
        return model
    settings = model.preprocess.settings.model_copy(update={"size": view.size})
    specs = tuple(_resized(spec, view.size, settings.layout) for spec in model.inputs)
    return replace(model, preprocess=model.preprocess.model_copy(update={"settings": settings}), inputs=specs)


def _resized(spec: TensorSpec, size: tuple[int, int], layout: str) -> TensorSpec:
    if len(spec.shape) != 4:
        return spec
    batch, first, _, last = spec.shape
    return replace(spec, shape=(batch, first, *size) if layout == "NCHW" else (batch, *size, last))


def _same_inputs(own: LoadedModel, main: LoadedModel) -> bool:
    """Would both models be given the same tensors?"""
    if own.preprocess != main.preprocess or [spec.name for spec in own.inputs] != [spec.name for spec in main.inputs]:
        return False
    return not isinstance(own.preprocess, TextInput) or own.files == main.files


def _order(own: LoadedModel, main: LoadedModel, where: str) -> tuple[int, ...]:
    """Where the main teacher's classes stand among another teacher's outputs."""
    mine, theirs = main.outputs[0].shape[-1], own.outputs[0].shape[-1]
    if isinstance(mine, int) and isinstance(theirs, int) and mine != theirs:
        raise PlanError.single(where, f"gives {theirs} outputs, the main teacher {mine}")
    if own.labels == main.labels or not own.labels or set(own.labels) != set(main.labels):
        return ()
    return tuple(own.labels.index(label) for label in main.labels)


def _weighing(recipe: Recipe, model: LoadedModel, data: DataBundle) -> list[Problem]:
    rule = recipe.teacher.weights
    if model.task == "sentence-embedding" and (rule != "fixed" or recipe.teacher.drop):
        return [Problem("teacher.weights", "embeddings are combined with fixed weights and without `drop` only")]
    part = {"learned": "validation", "agreement": "train"}.get(rule)
    if part is not None and data.splits[part].labels is None:
        return [Problem("teacher.weights", f"`{rule}` needs labels in {part}")]
    return []


def panel_signals(
    panel: Panel | None, main: Mapping[str, int], others: Mapping[str, Mapping[str, int]]
) -> dict[str, int]:
    """What the teachers offer together: the main one's signals under their own names, everyone's under ``name:``."""
    found = dict(main)
    if panel is None:
        return found
    for teacher in panel.teachers:
        own = main if teacher.name == MAIN else others.get(teacher.name, {"logits": 1})
        found |= {f"{teacher.name}:{signal}": count for signal, count in own.items()}
    return found


TOKEN_SIGNALS = ("hidden", "qkv", "q", "k", "v", "attn", "mask")


def view_problems(
    panel: Panel | None, stage: DistilStage, readers: Sequence[tuple[str, frozenset[str]]], where: str
) -> list[Problem]:
    """Signals that lie on tokens cannot be compared where teacher and student see other tokens; wrong top-k wishes.

    ``readers`` are the stage's objectives with the teacher's signals that each reads.
    """
    problems: list[Problem] = []
    names = sorted(frozenset[str]().union(*(read for _, read in readers)))
    if stage.cache_logits is not None:
        problems += _top_problems(panel, stage, where)
        full = sorted({use for use, read in readers if use != "kd" and "logits" in read})
        problems += [Problem(f"{where}.cache_logits", f"`{use}` reads all logits; only `kd` does not") for use in full]
    for teacher in panel.teachers if panel is not None else ():
        text = isinstance(teacher.model.preprocess, TextInput)
        made = stage.rollouts is not None or any(isinstance(item, MixupStrategy) for item in stage.strategy)
        if made and (teacher.clean or teacher.splits is not None):
            what = f"teacher `{teacher.name}` has a view of its own, but this stage makes its inputs while it trains"
            problems.append(Problem(where, what))
        moved = teacher.splits is not None or (teacher.clean and "token-drop" in stage.augment)
        if teacher.foreign and stage.sequences is not None:
            what = f"teacher `{teacher.name}` knows the text of the data, not what `sequences` writes"
            problems.append(Problem(f"{where}.sequences", what))
        for name in names:
            owner, _, signal = name.rpartition(":")
            if (owner or MAIN) == teacher.name and text and moved and signal.partition("[")[0] in TOKEN_SIGNALS:
                problems.append(
                    Problem(where, f"`{name}` lies on tokens, but teacher `{teacher.name}` sees other tokens")
                )
    return problems


def _top_problems(panel: Panel | None, stage: DistilStage, where: str) -> list[Problem]:
    found = []
    if panel is not None and len(panel.teachers) > 1:
        found.append(Problem(f"{where}.cache_logits", "works with one teacher; several are combined from all logits"))
    for item in stage.objective:
        if item.use == "kd" and not isinstance(item.options.get("temperature", 2.0), int | float):
            found.append(Problem(f"{where}.cache_logits", "needs one temperature, not a schedule of temperatures"))
    return found


def unknown_teacher(name: str, panel: Panel) -> str:
    """The sentence for a teacher that is not there."""
    return f"there is no teacher `{name}`{suggestion(name, [teacher.name for teacher in panel.teachers])}"
