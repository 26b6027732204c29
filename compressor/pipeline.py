"""From a plan to artifacts: the only module that knows the order of stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from compressor.data.types import DataBundle, labelled
from compressor.distil.panel import Panel
from compressor.errors import StageError
from compressor.exits import early_exits
from compressor.ledger import Event, Ledger, ignore_event
from compressor.models.types import LoadedModel
from compressor.profile import HardwareProfile, QuantizationRules
from compressor.recipe import DistilStage, PruneStage, QuantizeStage, Recipe, StudentStage
from compressor.rounds import expanded
from compressor.stages.exits import early_candidates
from compressor.stages.export import export, onnx_teacher
from compressor.stages.onnx_surgery import prune_onnx
from compressor.stages.qat import qat_candidates
from compressor.stages.quantization import int8_candidates
from compressor.stages.run import Line, Run
from compressor.stages.surgery import surgery
from compressor.stages.training import distil
from compressor.types import Artifact, Role, StageResult

if TYPE_CHECKING:
    from compressor.export.verify import Parity


@dataclass(frozen=True)
class Built:
    """The fp32 artifacts of a run, shared by every profile."""

    teacher: Artifact
    student: Artifact
    null_twin: Artifact | None
    parity: tuple[Parity, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pair:
    """Student and null twin of one seed, as checked fp32 ONNX files, and the stages that made them."""

    seed: int
    student: Artifact
    null_twin: Artifact
    stages: tuple[StageResult, ...] = ()


def trains_twin(recipe: Recipe, stage: DistilStage, data: DataBundle) -> bool:
    """Does this stage train the null twin? It needs labels, or texts that answer others."""
    return recipe.null_twin and labelled(data) and stage.data != "transfer"


class Pipeline:
    """Carries one recipe through its stages. All results live in the ledger."""

    def __init__(
        self,
        recipe: Recipe,
        model: LoadedModel,
        data: DataBundle,
        ledger: Ledger,
        *,
        round_to: int,
        on_event: Event = ignore_event,
        panel: Panel | None = None,
        original: tuple[LoadedModel, DataBundle] | None = None,
        cost: tuple[str, Callable[[Any], float]] | None = None,
        rules: QuantizationRules | None = None,
    ) -> None:
        """``original`` is the teacher with its own vocabulary, where ``model`` and ``data`` have a smaller one.

        ``cost`` names and prices layer shapes for latency-aware pruning. ``rules``: what fake quantization trains for.
        """
        self.run = Run(recipe, model, data, ledger, round_to, on_event, panel)
        if original is not None:
            self.run.original, self.run.teacher_data = original
        self.run.rules = rules or self.run.rules
        if cost is not None:
            self.run.cost_name, self.run.cost = cost
        self.teacher_run = self.run
        if original is not None:
            self.teacher_run = Run(recipe, *original, ledger, round_to, on_event)
        self._teacher: Artifact | None = None
        self._trained: tuple[Line, Line | None] | None = None  # student and null twin as modules

    def build(self) -> Built:
        """Teacher, student and null twin as checked fp32 ONNX files."""
        run = self.run
        if run.model.onnx is not None:
            teacher = self._teacher = onnx_teacher(run, run.model.onnx)
            smaller = replace(teacher, name="student/fp32", role="student")
            for stage in run.recipe.stage:
                if isinstance(stage, PruneStage):
                    smaller = prune_onnx(run, smaller, stage)
            return Built(teacher, smaller, None, ())
        teacher, parity = export(self.teacher_run, self._start("teacher"))
        self._teacher = teacher
        student, twin = self._trained = self._lines(run)
        exported, more = export(run, student)
        parity += more
        twin_file = None
        if twin is not None:
            twin_file, more = export(run, twin)
            parity += more
        return Built(teacher, exported, twin_file, parity)

    def pair(self, seed: int, ledger: Ledger) -> Pair:
        """Student and null twin trained with another seed on the same cut of the data.

        ``ledger`` is another view of the same store, so that its stages are not counted as stages of this run, and
        hears of the training.

        Raises:
            StageError: the recipe trains no null twin.
        """
        recipe = self.run.recipe.model_copy(update={"seed": seed})
        run = replace(self.run, recipe=recipe, ledger=ledger, on_event=ledger.on_event)
        student, twin = self._lines(run)
        if twin is None:
            raise StageError("there is no null twin to compare with", hint="Leave --seeds out.")
        exported, twin_file = (export(run, line)[0] for line in (student, twin))
        return Pair(seed, exported, twin_file, tuple(ledger.results))

    def variants(self, student: Artifact, profile: HardwareProfile) -> tuple[tuple[Artifact, ...], Mapping[str, str]]:
        """What may ship beside the fp32 file: the int8 candidates of a profile, and of each file one that leaves early
        where the recipe wants it; and what was not made. The promise of accuracy refers to the teacher that
        :meth:`build` exported."""
        found, missing = self._quantized(student, profile)
        if (wanted := early_exits(self.run.recipe)) is None:
            return found, missing
        early, why = early_candidates(self.run, wanted, (student, *found), self._teacher)
        return (*found, *early), {**missing, **why}

    def _quantized(self, student: Artifact, profile: HardwareProfile) -> tuple[tuple[Artifact, ...], Mapping[str, str]]:
        """The int8 candidates, quantized once for equal rules."""
        made: tuple[Artifact, ...] = ()
        failed: Mapping[str, str] = {}
        if self._trained is not None:
            made, failed = qat_candidates(self.run, self._trained[0], student, profile)
        stage = next((stage for stage in self.run.recipe.stage if isinstance(stage, QuantizeStage)), None)
        if stage is None:
            return made, failed
        found, more = int8_candidates(self.run, student, stage, profile, self._teacher)
        return (*made, *found), {**failed, **more}

    def _start(self, role: Role) -> Line:
        run = self.teacher_run if role == "teacher" else self.run
        return Line(role, run.model.provenance.digest, lambda: run.teacher)

    def _lines(self, run: Run) -> tuple[Line, Line | None]:
        student = self._start("student")
        twin: Line | None = None
        for stage in expanded(run.recipe.stage):
            match stage:
                case StudentStage() | PruneStage():
                    student = surgery(run, student, stage)
                    twin = surgery(run, twin, stage) if twin is not None else None
                case DistilStage():
                    before = student
                    student = distil(run, before, stage, labels_only=False)
                    if trains_twin(run.recipe, stage, run.data):
                        twin = distil(run, twin or replace(before, role="null-twin"), stage, labels_only=True)
                case QuantizeStage():
                    pass
        return student, twin
