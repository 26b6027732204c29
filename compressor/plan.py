"""The plan: what will happen per profile, and every problem at once, before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from compressor.config import suggestion
from compressor.errors import Problem
from compressor.exits import early_exits, exit_problems
from compressor.profile import HardwareProfile
from compressor.recipe import DistilStage, PruneStage, QuantizeStage, Recipe, StudentStage
from compressor.rounds import round_problems
from compressor.schedule import shown
from compressor.types import TEXT2TEXT, Task


@dataclass(frozen=True)
class TargetView:
    """What the planner knows of a back end: enough to say what will be possible here."""

    name: str
    ready: bool
    runs: str | None  # origin of figures taken here; None: compiles only
    reason: str = ""  # why it is missing, or why it cannot run
    hint: str = ""


@dataclass(frozen=True)
class ProfilePlan:
    """What will be done for one profile, in words."""

    profile: str
    target: str
    accuracy: str  # "measured", "proxy", "unavailable: reason"
    latency: str
    variants: tuple[str, ...]
    rejected: Mapping[str, str]
    missing: str = ""


@dataclass(frozen=True)
class Plan:
    """The whole run as it will happen."""

    recipe: Recipe
    profiles: tuple[HardwareProfile, ...]
    steps: tuple[str, ...]
    per_profile: tuple[ProfilePlan, ...]
    model: Mapping[str, str]
    data: Mapping[str, int]
    channel_multiple: int
    warnings: tuple[str, ...] = field(default=())
    banks: tuple[str, ...] = ()  # per distil stage: are the teachers cached, and with how many bytes at most


def channel_multiple(profiles: Sequence[HardwareProfile]) -> int:
    """The widest channel multiple any profile wants: one student serves all profiles."""
    return max((profile.constraints.channel_multiple for profile in profiles), default=1)


def recipe_problems(recipe: Recipe, kind: str, objectives: Sequence[str]) -> list[Problem]:
    """What in the recipe cannot work with this kind of model (``checkpoint``, ``factory``, ``onnx``)."""
    problems: list[Problem] = []
    for position, stage in enumerate(recipe.stage):
        where = f"stage.{position}.{stage.kind}"
        if kind == "onnx" and not isinstance(stage, PruneStage | QuantizeStage):
            what = "an ONNX file cannot be trained here; only `prune` and `quantize` apply to it"
            problems.append(Problem(where, what))
        if isinstance(stage, DistilStage):
            problems += _objective_problems(stage, where, objectives)
    problems += round_problems(recipe, kind)
    positions = [type(stage) for stage in recipe.stage]
    if QuantizeStage in positions and positions.index(QuantizeStage) != len(positions) - 1:
        problems.append(
            Problem("stage", "`quantize` must be the last stage: nothing can train or cut a quantized file")
        )
    students = [stage for stage in recipe.stage if isinstance(stage, StudentStage) and not stage.drops_only]
    if len(students) > 1:
        problems.append(Problem("stage", "more than one `student` stage"))
    return problems + _token_problems(recipe)


def _token_problems(recipe: Recipe) -> list[Problem]:
    """What cannot follow a stage that drops tokens (another one, surgery that would have to look through it), and what
    cannot come before another tokenizer."""
    problems: list[Problem] = []
    dropped = False
    for number, stage in enumerate(recipe.stage):
        where = f"stage.{number}.{stage.kind}"
        if number and isinstance(stage, StudentStage) and stage.tokenizer is not None:
            what = "is exchanged in the first stage: all others read its tokens"
            problems.append(Problem(f"{where}.tokenizer", what))
        cuts = isinstance(stage, PruneStage) and stage.zeros is None
        if dropped and (
            cuts or (isinstance(stage, DistilStage) and (stage.cofi is not None or stage.supernet is not None))
        ):
            problems.append(Problem(where, "cuts the model: it must stand before the tokens are dropped"))
        if isinstance(stage, StudentStage) and stage.drop_tokens:
            if dropped:
                problems.append(Problem(f"{where}.drop_tokens", "tokens are dropped already: say it in one stage"))
            dropped = True
    return problems


def task_problems(recipe: Recipe, task: Task, positions: int | None = None) -> list[Problem]:
    """What in the recipe does not fit the task; ``positions``: the longest text the model takes."""
    problems = (_text2text_problems(recipe) if task in TEXT2TEXT else []) + exit_problems(recipe, task)
    for number, stage in enumerate(recipe.stage):
        where = f"stage.{number}.{stage.kind}"
        if isinstance(stage, StudentStage) and stage.decoder_layers is not None and task not in TEXT2TEXT:
            problems.append(Problem(f"{where}.decoder_layers", f"is for encoder-decoder models; the task is {task}"))
        if not isinstance(stage, DistilStage):
            continue
        problems += _generation_problems(stage, where, task, positions)
        if stage.rollouts is not None and stage.rollouts.used and stage.cache == "on":
            problems.append(Problem(f"{where}.cache", "the teacher must see what the student writes: nothing to cache"))
        if stage.rollouts is not None and not stage.objective:
            problems.append(
                Problem(f"{where}.rollouts", "teach nothing without an objective: add `kd`, `jsd` or another")
            )
    return problems


def _generation_problems(stage: DistilStage, where: str, task: Task, positions: int | None) -> list[Problem]:
    """What of ``rollouts`` and ``sequences`` the model cannot write."""
    problems: list[Problem] = []
    for name, part in (("rollouts", stage.rollouts), ("sequences", stage.sequences)):
        if part is None:
            continue
        if getattr(part, "guess", None) is not None and task in TEXT2TEXT:
            problems.append(Problem(f"{where}.{name}.guess", "is for causal language models"))
        prompt = 0 if task in TEXT2TEXT else part.prompt_tokens  # an encoder-decoder model writes whole targets
        if task != "causal-lm" and task not in TEXT2TEXT:
            what = f"is for causal language models and encoder-decoder models; the task is {task}"
            problems.append(Problem(f"{where}.{name}", what))
        elif positions is not None and prompt + part.max_new_tokens > positions:
            what = f"asks for {prompt} + {part.max_new_tokens} tokens, the model has {positions} positions"
            problems.append(Problem(f"{where}.{name}.max_new_tokens", what))
    return problems


def _text2text_problems(recipe: Recipe) -> list[Problem]:
    """What is not offered for encoder-decoder models."""
    problems = []
    if recipe.teacher.more or recipe.teacher.max_length is not None:
        key = "teacher.more" if recipe.teacher.more else "teacher.max_length"
        problems.append(Problem(key, "an encoder-decoder student has one teacher, which sees what it sees"))
    for number, stage in enumerate(recipe.stage):
        where = f"stage.{number}.{stage.kind}"
        if isinstance(stage, StudentStage) and stage.vocabulary is not None:
            problems.append(Problem(f"{where}.vocabulary", "encoder-decoder models keep their vocabulary"))
        if isinstance(stage, DistilStage) and stage.rollouts is not None and stage.rollouts.beside:
            problems.append(Problem(f"{where}.rollouts.beside", "is for causal language models"))
        if isinstance(stage, DistilStage) and "token-drop" in stage.augment:
            problems.append(Problem(f"{where}.augment", "`token-drop` is for models that read one text"))
    return problems


def _objective_problems(stage: DistilStage, where: str, known: Sequence[str]) -> list[Problem]:
    return [
        Problem(
            f"{where}.objective.{number}.use", f"unknown objective `{item.use}`{suggestion(item.use, tuple(known))}"
        )
        for number, item in enumerate(stage.objective)
        if item.use not in known
    ]


def steps_of(recipe: Recipe, kind: str) -> tuple[str, ...]:
    """The stages in words, in the order they run."""
    lines = (
        ["teacher: load, export to ONNX, optimise, check parity"]
        if kind != "onnx"
        else ["teacher: check the ONNX file"]
    )
    for stage in recipe.stage:
        match stage:
            case StudentStage():
                lines.append(f"student: {_student(stage)}")
            case PruneStage():
                lines.append(f"prune: {_settings(stage)}")
            case DistilStage():
                lines.append(_distil_line(stage, recipe.null_twin))
                if recipe.null_twin:
                    lines.append(
                        f"null twin: {stage.epochs} epochs with labels only, same student, steps, data and seeds"
                    )
            case QuantizeStage():
                pass
    if kind != "onnx":
        lines.append("export: ONNX, optimise, check parity")
    for stage in recipe.stage:
        if isinstance(stage, QuantizeStage):
            lines.append(
                f"quantize, for each target's rules: {', '.join(stage.engines)}, {stage.samples} calibration samples"
            )
    return (*lines, *_exit_lines(recipe), "per profile: compile, run, measure, gate, package")


def _exit_lines(recipe: Recipe) -> list[str]:
    early = early_exits(recipe)
    if early is None:
        return []
    how = "chosen on validation" if early.threshold is None else f"{early.threshold:g}"
    return [f"exits: of each of these files one that stops at the first sure exit, threshold {how}"]


def _distil_line(stage: DistilStage, null_twin: bool) -> str:
    objectives = ", ".join(item.use for item in stage.objective) or "labels only"
    times = f"{stage.rounds} rounds of " if stage.rounds > 1 else ""
    line = f"distil: {times}{stage.epochs} epochs, labels x{shown(stage.labels)} + {objectives}{_masks(stage)}"
    if stage.labels != "estimate":
        return line
    own = " (the null twin's)" if null_twin else ""
    each = " in each round" if stage.rounds > 1 else ""
    return f"{line}; two extra fits for the labels' weight: on labels alone{own}, on the teacher alone{each}"


def _masks(stage: DistilStage) -> str:
    """What the stage takes away while it trains."""
    if stage.qat is not None:
        return f"; {stage.qat.weights} weights and the target's activations are rounded while it trains"
    if stage.masks is not None:
        return f"; zeros grow to {stage.masks.zeros.shown}"
    if stage.supernet is not None:
        return f"; {stage.supernet.size:,} sub-nets share the weights, the best within the budget is cut out"
    return "" if stage.cofi is None else f"; masks learn which {stage.cofi.target:.0%} of the weights go"


def _student(stage: StudentStage) -> str:
    if stage.search is None:
        return _settings(stage)
    fixed = stage.changed - {"kind", "search"}
    return stage.search.shown + (f"; {_settings(stage)}" if fixed else "")


def _settings(stage: StudentStage | PruneStage) -> str:
    given = stage.model_dump(exclude={"kind", "search"}, exclude_defaults=True)
    return ", ".join(f"{name} {value}" for name, value in given.items()) or "as it is"


def profile_plan(
    profile: HardwareProfile, target: TargetView, variants: Sequence[str], rejected: Mapping[str, str]
) -> ProfilePlan:
    """Say where each figure of a profile will come from."""
    if not target.ready:
        gone = f"unavailable: {target.reason}"
        return ProfilePlan(
            profile.name, profile.target, gone, gone, (), rejected, missing=f"{target.reason}. {target.hint}"
        )
    here = profile.here == "this-machine"
    if target.runs is None:
        accuracy, latency = "proxy (ONNX Runtime on this machine)", f"unavailable: {target.reason}"
    elif target.runs == "simulated":
        attached = "" if here else f"no {profile.name} is attached: "
        accuracy, latency = "simulated", f"unavailable: {attached}a simulator's speed says nothing about a device"
    elif here:
        accuracy = latency = target.runs
    else:
        accuracy = "proxy (same runtime on this machine)"
        latency = f"unavailable: no {profile.name} is attached"
    return ProfilePlan(profile.name, profile.target, accuracy, latency, tuple(variants), rejected)
