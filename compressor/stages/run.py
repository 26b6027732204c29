"""One run as every stage sees it: recipe, teacher, data and store, and what is derived from them on demand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.data.types import DataBundle
from compressor.distil.panel import Panel
from compressor.errors import StageError
from compressor.ledger import Event, Ledger, ignore_event
from compressor.models.types import LoadedModel
from compressor.profile import QuantizationRules
from compressor.recipe import Recipe
from compressor.stages.batches import Batches, tensors
from compressor.types import TEXT2TEXT, Inputs, Role, TensorSpec

if TYPE_CHECKING:
    from torch import nn

MODEL_FILE = "model.onnx"
RECORD_FILE = "record.json"  # beside a student's weights: compressor.models.rebuild


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


@dataclass
class Run:
    """What the stages of one run share. Nothing here changes once it is made; results live in the ledger."""

    recipe: Recipe
    model: LoadedModel
    data: DataBundle
    ledger: Ledger
    round_to: int  # channel multiple: the widest wish of the profiles
    on_event: Event = ignore_event
    panel: Panel | None = None  # several teachers, or one that sees something else than its student
    cost: Callable[[Any], float] | None = None  # of a layer's shape, for latency-aware pruning; else operations
    cost_name: str = "operations"
    before: Line | None = None  # the student of the round before, where it is the teacher
    rules: QuantizationRules = field(default_factory=QuantizationRules)  # of fake quantization
    original: LoadedModel | None = None  # the teacher with its own vocabulary, where the student's differs
    teacher_data: DataBundle | None = None  # as the teacher's own file takes it, where the student's vocabulary differs

    @cached_property
    def teacher(self) -> nn.Module:
        """The teacher's module.

        Raises:
            StageError: the teacher is an ONNX file, which cannot be trained or cut.
        """
        if self.model.module is None:
            raise StageError("the teacher has no module to train", hint="Give a checkpoint or a factory.")
        return self.model.module

    def stored_module(self, folder: Path) -> Callable[[], nn.Module]:
        """Rebuilds a student from the store when it is called."""

        def load() -> nn.Module:
            from compressor.models.rebuild import load_student

            return load_student(folder, self.teacher)

        return load

    def samples(self, split: str, count: int) -> Inputs:
        """The first ``count`` inputs of a split."""
        part = self.data.splits[split]
        return part.batch(np.arange(min(count, len(part))))

    def calibration_tensors(self, samples: int, batch: int = 32) -> Batches:
        """Batches of the calibration split as torch tensors, one in memory at a time."""
        return Batches(self.data.splits["calibration"], samples, batch)

    @staticmethod
    def tensors(inputs: Inputs) -> dict[str, Any]:
        """Arrays as torch tensors."""
        return tensors(inputs)

    def runner(self, module: nn.Module) -> Callable[[Inputs], Mapping[str, Any]]:
        """A function from inputs to outputs by name that runs ``module`` in evaluation mode."""
        import torch

        training = module.training

        def run(inputs: Inputs) -> Mapping[str, Any]:
            module.eval()
            with torch.inference_mode():
                output = module(**self.tensors(inputs))
            module.train(training)
            made = output if isinstance(output, tuple) else (output,)
            names = [spec.name for spec in self.outputs(module)]
            return {name: one.float().numpy() for name, one in zip(names, made, strict=True)}

        return run

    def outputs(self, module: nn.Module) -> tuple[TensorSpec, ...]:
        """The teacher's outputs, as a student has them: further exits are outputs too, an embedding may be narrower."""
        from compressor.models.heads import Exits, ProjectedPooling

        found = list(self.model.outputs)
        for part in module.modules():
            if isinstance(part, ProjectedPooling):
                found[0] = replace(found[0], shape=(*found[0].shape[:-1], part.dense.out_features))
            elif isinstance(part, Exits) and part.mode == "outputs":
                found += [replace(found[0], name=f"exit_{number}") for number in range(len(part.heads))]
        return tuple(found)

    def validation_score(self, module: nn.Module, watch: Callable[[Any], None] | None = None) -> float:
        """The task metric of a torch module on validation (never on test); a perplexity as minus its logarithm.

        Of an encoder-decoder model the perplexity of the targets.

        ``watch`` is shown the outputs.
        """
        from compressor.evaluate import SplitEvalSet, batch_size, predict, quality, score, unit_of

        task = self.model.task
        split = SplitEvalSet(self.data.splits["validation"])
        if task in TEXT2TEXT:
            task = "causal-lm"  # teacher-forced: an epoch's end is no time to write the whole set
        size = batch_size(task, self.model.outputs[0].shape[-1], 256)
        outputs = predict(self.runner(module), split, size, task=task)
        if watch is not None:
            watch(outputs)
        reference = self.teacher_validation if task == "sentence-embedding" else None
        return quality(score(task, outputs, split.labels, reference, self.data.labels), unit_of(task))

    @cached_property
    def teacher_validation(self) -> np.ndarray[Any, Any]:
        """The teacher's first output on the validation split."""
        from compressor.evaluate import SplitEvalSet, predict

        return predict(self.runner(self.teacher), SplitEvalSet(self.data.splits["validation"]), 256)


def version(package: str) -> str:
    """The installed version of a package, or ``absent``."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"
