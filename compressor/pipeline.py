"""From a plan to artifacts: the only module that knows the order of stages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.data.types import DataBundle
from compressor.errors import StageError
from compressor.ledger import Event, Ledger, StageOutput, code_digest, ignore_event
from compressor.models.types import LoadedModel
from compressor.profile import HardwareProfile, QuantizationRules
from compressor.recipe import DistilStage, PruneStage, QuantizeStage, Recipe, StudentStage
from compressor.types import Artifact, Format, Inputs, Role, file_digest

if TYPE_CHECKING:
    from torch import nn

    from compressor.export.verify import Parity
    from compressor.quantize import Variant

PARITY_SAMPLES = 64
MODEL_FILE = "model.onnx"


@dataclass
class Line:
    """One lineage of a model on its way through the stages: the student's, or the null twin's.

    ``load`` rebuilds the module from the store only when a stage really needs it, so that a run whose stages are all
    stored never touches torch. ``key`` identifies everything done so far.
    """

    role: Role
    key: str
    load: Callable[[], nn.Module]
    record: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Built:
    """The fp32 artifacts of a run, shared by every profile."""

    teacher: Artifact
    student: Artifact
    null_twin: Artifact | None
    parity: tuple[Parity, ...]
    notes: tuple[str, ...] = ()


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
    ) -> None:
        self.recipe = recipe
        self.model = model
        self.data = data
        self.ledger = ledger
        self.round_to = round_to
        self.on_event = on_event
        self.parity: list[Parity] = []

    # ---------------------------------------------------------------- fp32 artifacts

    def build(self) -> Built:
        """Teacher, student and null twin as checked fp32 ONNX files."""
        if self.model.onnx is not None:
            teacher = self._onnx_teacher(self.model.onnx)
            return Built(teacher, replace(teacher, name="student/fp32", role="student"), None, ())
        teacher = self._export(Line("teacher", self.model.provenance.digest, self._teacher_module))
        student, twin = self._lines()
        exported = self._export(student)
        twin_file = self._export(twin) if twin is not None else None
        return Built(teacher, exported, twin_file, tuple(self.parity))

    def _lines(self) -> tuple[Line, Line | None]:
        student = Line("student", self.model.provenance.digest, self._teacher_module)
        twin: Line | None = None
        for stage in self.recipe.stage:
            match stage:
                case StudentStage() | PruneStage():
                    student = self._surgery(student, stage)
                    twin = self._surgery(twin, stage) if twin is not None else None
                case DistilStage():
                    before = student
                    student = self._distil(before, stage, labels_only=False)
                    if self.recipe.null_twin and self.data.splits["train"].labels is not None:
                        twin = self._distil(twin or replace(before, role="null-twin"), stage, labels_only=True)
                case QuantizeStage():
                    pass
        return student, twin

    @cached_property
    def _teacher(self) -> nn.Module:
        if self.model.module is None:
            raise StageError("the teacher has no module to train", hint="Give a checkpoint or a factory.")
        return self.model.module

    def _teacher_module(self) -> nn.Module:
        return self._teacher

    def _stored_module(self, folder: Path) -> Callable[[], nn.Module]:
        def load() -> nn.Module:
            from compressor.models.rebuild import load_student

            return load_student(folder, self._teacher)

        return load

    # ---------------------------------------------------------------- surgeries and training

    def _surgery(self, line: Line, stage: StudentStage | PruneStage) -> Line:
        key = {
            "previous": line.key,
            "config": stage.model_dump(mode="json"),
            "calibration": self.data.digests["calibration"],
            "round_to": self._multiple(stage),
            "seed": self.recipe.seed,
            "code": code_digest("prune", "students", "models/rebuild", "models/cost", "models/structure"),
        }
        result = self.ledger.stage(stage.kind, key, lambda folder: self._cut(line, stage, folder))
        record = json.loads((result.folder / "record.json").read_text())
        return Line(line.role, result.key, self._stored_module(result.folder), record)

    def _multiple(self, stage: StudentStage | PruneStage) -> int:
        """The channel multiple of a cut: the recipe's own, otherwise the widest wish of the profiles."""
        return (stage.round_to if isinstance(stage, PruneStage) else None) or self.round_to

    def _cut(self, line: Line, stage: StudentStage | PruneStage, folder: Path) -> StageOutput:
        from compressor.models.rebuild import save_student

        module, example = line.load(), self._tensors(self._samples("calibration", 2))
        match stage:
            case PruneStage():
                from compressor.prune import prune

                done = prune(
                    module,
                    example,
                    stage,
                    self._calibration_tensors(512),
                    round_to=self._multiple(stage),
                    seed=self.recipe.seed,
                )
                metrics = {
                    "parameters_before": done.parameters_before,
                    "parameters_after": done.parameters_after,
                    "macs_before": done.macs_before,
                    "macs_after": done.macs_after,
                }
                made, record, facts = done.module, done.record, done.facts
            case StudentStage():
                from compressor.students import make_student

                student = make_student(
                    module, stage, example, seed=self.recipe.seed, calibration=self._calibration_tensors(256)
                )
                made, record, facts = student.module, student.record, student.facts
                metrics = {"parameters_after": sum(p.numel() for p in made.parameters())}
        save_student(folder, made, [*line.record, *record])
        return StageOutput(metrics, facts)

    def _distil(self, line: Line, stage: DistilStage, *, labels_only: bool) -> Line:
        config = stage.model_dump(mode="json")
        if labels_only:  # what only the teacher's terms use must not make a new twin
            config = {name: value for name, value in config.items() if name not in {"objective", "cache", "labels"}}
        key = {
            "previous": line.key,
            "config": config,
            "labels_only": labels_only,
            "teacher": None if labels_only else self.model.provenance.digest,
            "signals": self.recipe.teacher.signals,
            "data": {name: self.data.digests[name] for name in sorted(self.data.digests) if name != "test"},
            "seed": self.recipe.seed,
            "code": code_digest("distil", "models/signals"),
        }
        name = "null-twin" if labels_only else "distil"
        result = self.ledger.stage(
            name, key, lambda folder: self._train(line, stage, folder, labels_only=labels_only), resumable=True
        )
        return Line(line.role, result.key, self._stored_module(result.folder), line.record)

    def _train(self, line: Line, stage: DistilStage, folder: Path, *, labels_only: bool) -> StageOutput:
        from copy import deepcopy

        from compressor.distil.loop import distil
        from compressor.models.rebuild import save_student

        student = deepcopy(line.load())
        for parameter in student.parameters():
            parameter.requires_grad_(True)
        result = distil(
            student,
            self._teacher,
            self.data,
            stage,
            seed=self.recipe.seed,
            work=folder / "scratch",
            bank=self.ledger.cache / "teacher",
            labels_only=labels_only,
            teacher_digest=self.model.provenance.digest,
            signals=self.recipe.teacher.signals,
            score=self._validation_score,
            on_event=self.on_event,
        )
        save_student(folder, student.eval(), line.record)
        best = result.history[result.best_epoch]
        metrics: dict[str, float | int | str] = {
            "best_epoch": result.best_epoch + 1,
            "epochs": len(result.history),
            "steps": result.steps,
            "teacher_forwards": result.teacher_forwards,
            "precision": result.precision,
        }
        if best.score is not None:
            metrics["validation"] = round(best.score, 6)
        history = [{**vars(epoch), "terms": dict(epoch.terms)} for epoch in result.history]
        (folder / "history.json").write_text(json.dumps(history, indent=1))
        return StageOutput(metrics)

    def _validation_score(self, module: nn.Module) -> float:
        """The task metric of a torch module on the validation split (never on test)."""
        from compressor.evaluate import SplitEvalSet, predict, score

        split = SplitEvalSet(self.data.splits["validation"])
        outputs = predict(self._runner(module), split, 256)
        reference = self._teacher_validation if self.model.task == "sentence-embedding" else None
        return score(self.model.task, outputs, split.labels, reference)

    @cached_property
    def _teacher_validation(self) -> np.ndarray[Any, Any]:
        from compressor.evaluate import SplitEvalSet, predict

        return predict(self._runner(self._teacher), SplitEvalSet(self.data.splits["validation"]), 256)

    # ---------------------------------------------------------------- export

    def _onnx_teacher(self, path: Path) -> Artifact:
        from compressor.models.onnx_facts import describe

        return Artifact(
            "teacher/fp32", "teacher", path, Format.ONNX, "fp32", self.model.inputs, self.model.outputs,
            file_digest(path), describe(path).parameters,
        )  # fmt: skip

    def _export(self, line: Line) -> Artifact:
        key = {
            "previous": line.key,
            "role": line.role,
            "inputs": [vars(spec) for spec in self.model.inputs],
            "samples": self.data.digests["validation"],
            "code": code_digest("export", "models/onnx_graph", "models/onnx_facts"),
            "torch": _version("torch"),
        }
        result = self.ledger.stage(f"export-{line.role}", key, lambda folder: self._export_to(line, folder))
        from compressor.export.verify import Parity

        self.parity += [Parity(**row) for row in json.loads((result.folder / "parity.json").read_text())]
        path = result.folder / MODEL_FILE
        return Artifact(
            f"{line.role}/fp32", line.role, path, Format.ONNX, "fp32", self.model.inputs, self.model.outputs,
            file_digest(path), int(result.metrics["parameters"]), facts=result.facts,
        )  # fmt: skip

    def _export_to(self, line: Line, folder: Path) -> StageOutput:
        from compressor.export.onnx import export_onnx
        from compressor.export.optimise import optimise
        from compressor.export.verify import verify
        from compressor.models.onnx_facts import describe

        module = line.load().eval()
        scratch = folder / "scratch"
        scratch.mkdir(exist_ok=True)
        raw = scratch / MODEL_FILE
        metadata = {"role": line.role, "licence": self.model.provenance.licence or "unknown"}
        export_onnx(
            module, self._samples("validation", 2), self.model.inputs, self.model.outputs, raw,
            name=f"{self.recipe.name}-{line.role}", metadata=metadata,
        )  # fmt: skip
        facts = optimise(raw, folder / MODEL_FILE)
        run = self._runner(module)
        rows = verify(run, folder / MODEL_FILE, self._parity_batches(), artifact=f"{line.role}/fp32")
        (folder / "parity.json").write_text(json.dumps([vars(row) for row in rows], indent=1))
        for row in rows:
            if not row.passed:
                raise StageError(
                    f"the ONNX export of the {line.role} differs from its torch module: output `{row.output}` by "
                    f"{row.worst:.2e} (tolerance {row.tolerance:.0e})",
                    hint="The exporter or an optimisation changed the numbers; please report this model.",
                )
        described = describe(folder / MODEL_FILE)
        return StageOutput(
            {"parameters": described.parameters, "macs": described.macs or 0, "worst": rows[0].worst}, facts
        )

    # ---------------------------------------------------------------- quantization, per profile

    @property
    def quantize_stage(self) -> QuantizeStage | None:
        return next((stage for stage in self.recipe.stage if isinstance(stage, QuantizeStage)), None)

    def variants(self, student: Artifact, profile: HardwareProfile) -> tuple[tuple[Artifact, ...], Mapping[str, str]]:
        """The int8 candidates of a profile, quantized once for equal rules, and what was not made."""
        from compressor.models.onnx_facts import describe
        from compressor.quantize import variants

        stage = self.quantize_stage
        if stage is None:
            return (), {}
        wanted, rejected = variants(stage, profile.quantization, describe(student.path))
        made: list[Artifact] = []
        failed: dict[str, str] = dict(rejected)
        for variant in wanted:
            try:
                made.append(self._quantized(student, variant, stage, profile.quantization))
            except StageError as error:
                failed[variant.name] = str(error)
        return tuple(made), failed

    def _quantized(
        self, student: Artifact, variant: Variant, stage: QuantizeStage, rules: QuantizationRules
    ) -> Artifact:
        key = {
            "source": student.digest,
            "variant": {name: value for name, value in vars(variant).items()},
            "rules": rules.model_dump(mode="json"),
            "calibration": self.data.digests["calibration"],
            "samples": stage.samples,
            "code": code_digest("quantize", "models/onnx_graph", "models/onnx_facts"),
            "versions": [_version("onnxruntime"), _version("nncf")],
        }
        result = self.ledger.stage(
            f"quantize-{variant.name}", key, lambda folder: self._quantize_to(student, variant, stage, rules, folder)
        )
        scheme = json.loads((result.folder / "scheme.json").read_text())
        path = result.folder / MODEL_FILE
        return Artifact(
            f"student/{variant.name}", "student", path, Format.ONNX, scheme.pop("precision"), student.inputs,
            student.outputs, file_digest(path), student.parameters, scheme, result.facts,
        )  # fmt: skip

    def _quantize_to(
        self, student: Artifact, variant: Variant, stage: QuantizeStage, rules: QuantizationRules, folder: Path
    ) -> StageOutput:
        from compressor.quantize import quantize

        split = self.data.splits["calibration"]
        index = np.arange(min(stage.samples, len(split)))

        def calibration() -> Iterator[Inputs]:
            for position in index:
                yield split.batch(index[position : position + 1])

        ranges = self.ledger.cache / "ranges"
        made = quantize(student, variant, rules, calibration, folder / MODEL_FILE, cache=ranges)
        (folder / "scheme.json").write_text(json.dumps({**made.scheme, "precision": made.precision}, indent=1))
        return StageOutput({"bytes": made.file_bytes}, made.facts)

    # ---------------------------------------------------------------- samples

    def _samples(self, split: str, count: int) -> Inputs:
        part = self.data.splits[split]
        return part.batch(np.arange(min(count, len(part))))

    def _calibration_tensors(self, samples: int, batch: int = 32) -> list[dict[str, Any]]:
        part = self.data.splits["calibration"]
        count = min(samples, len(part))
        return [
            self._tensors(part.batch(np.arange(start, min(start + batch, count)))) for start in range(0, count, batch)
        ]

    @staticmethod
    def _tensors(inputs: Inputs) -> dict[str, Any]:
        import torch

        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()}

    def _parity_batches(self) -> Iterator[Inputs]:
        """Batches of sizes 1, 3, 16 ... so that the dynamic axes are really exercised."""
        part = self.data.splits["validation"]
        total, start = min(PARITY_SAMPLES, len(part)), 0
        for size in (1, 3, 16, PARITY_SAMPLES):
            stop = min(start + size, total)
            if stop > start:
                yield part.batch(np.arange(start, stop))
            start = stop

    def _runner(self, module: nn.Module) -> Callable[[Inputs], Mapping[str, Any]]:
        import torch

        name = self.model.outputs[0].name
        training = module.training

        def run(inputs: Inputs) -> Mapping[str, Any]:
            module.eval()
            with torch.inference_mode():
                output = module(**self._tensors(inputs))
            module.train(training)
            return {name: output.float().numpy()}

        return run


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
