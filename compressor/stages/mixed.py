"""Layers back to float: the int8 candidate that is made when none keeps the accuracy that was promised."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from compressor.errors import StageError, sdk_errors
from compressor.ledger import StageOutput, code_digest
from compressor.profile import QuantizationRules
from compressor.recipe import Correction, QuantizeStage
from compressor.stages.run import MODEL_FILE, Run, version
from compressor.types import Array, Artifact, Format, Inputs, file_digest

if TYPE_CHECKING:
    from compressor.quantize import Variant
    from compressor.quantize.watch import Calibration

BATCH = 64  # samples scored at once


def calibration_of(run: Run, samples: int) -> tuple[Calibration, str]:
    """The calibration data as the quantizer reads it, one sample at a time, and a record of how it was chosen."""
    from compressor.quantize.calibration import choose

    split = run.data.splits["calibration"]
    chosen = choose(split.labels, len(split), samples)

    def calibration() -> Iterator[Inputs]:
        for position in range(len(chosen.index)):
            yield split.batch(chosen.index[position : position + 1])

    return calibration, f"{chosen.rule}, split {run.data.digests['calibration'].removeprefix('sha256:')[:12]}"


def mixed_candidate(
    run: Run,
    student: Artifact,
    stage: QuantizeStage,
    rules: QuantizationRules,
    made: Sequence[tuple[Variant, Artifact]],
    scorer: Scorer,
) -> tuple[Artifact | None, str]:
    """The mixed file, or why there is none (empty: a plain int8 file keeps the promise, nothing is needed)."""
    drop = run.recipe.accept.max_drop
    if drop is None:
        return None, ""
    ours = [(variant, artifact) for variant, artifact in made if variant.engine == "onnxruntime"]
    bases = [pair for pair in ours if pair[0].kind != "weights"] or ours  # of weights alone nothing gets faster
    if not bases:
        return None, "layers can be put back only in files of ONNX Runtime's quantizer"
    floor = scorer.baseline - drop
    scores = {variant.name: scorer(artifact) for variant, artifact in made}
    if max(scores.values()) >= floor - 1e-9:
        return None, ""
    if hopeless := cannot_hold(student, scorer, floor):
        return None, hopeless
    base = max(bases, key=lambda pair: scores[pair[0].name])
    try:
        return _stored(run, student, settled(*base), stage, rules, scorer, floor), ""
    except StageError as error:
        return None, str(error)


def cannot_hold(student: Artifact, scorer: Scorer, floor: float) -> str:
    """Why no precision keeps the promise; empty where the fp32 file does."""
    plain = scorer(student)
    if plain >= floor - 1e-9:
        return ""
    lost, allowed = 100 * (scorer.baseline - plain), 100 * (scorer.baseline - floor)
    what = f"{lost:.2f} points on validation, {allowed:.2f} are allowed"
    return f"the fp32 student itself loses {what}: no precision can mend that"


def settled(variant: Variant, made: Artifact) -> Variant:
    """The variant with what `auto` chose for its file, so that it is not chosen again for every trial."""
    if variant.kind != "static":
        return variant
    corrections = tuple(name for name in get_args(Correction) if name in made.scheme["corrections"].split(", "))
    method: Any = made.scheme["calibration"]
    return replace(variant, calibration=method, corrections=corrections)


def _stored(
    run: Run,
    student: Artifact,
    variant: Variant,
    stage: QuantizeStage,
    rules: QuantizationRules,
    scorer: Scorer,
    floor: float,
) -> Artifact:
    key = {
        "source": student.digest,
        "variant": vars(variant),
        "rules": rules.model_dump(mode="json"),
        "calibration": run.data.digests["calibration"],
        "validation": run.data.digests["validation"],
        "floor": floor,
        "samples": stage.samples,
        "trials": stage.trials,
        "code": code_digest("quantize", "stages/mixed", "models/onnx_graph", "models/onnx_facts"),
        "versions": [version("onnxruntime")],
    }

    def work(folder: Path) -> StageOutput:
        from compressor.quantize.promise import restore

        calibration, record = calibration_of(run, stage.samples)
        cache, out = run.ledger.cache / "ranges", folder / MODEL_FILE
        found = restore(student, variant, rules, calibration, scorer, floor, out, cache=cache, trials=stage.trials)
        scheme = {**found.artifact.scheme, "precision": found.artifact.precision, "calibrated on": record}
        (folder / "scheme.json").write_text(json.dumps(scheme, indent=1))
        metrics: dict[str, float | int | str] = {
            "layers_in_float": len(found.kept_float),
            "validation": round(found.score, 6),
            "trials": len(found.trials),
            "holds": str(found.holds).lower(),
        }
        return StageOutput(metrics, found.artifact.facts)

    result = run.ledger.stage("quantize-int8-mixed-ort", key, work)
    scheme = json.loads((result.folder / "scheme.json").read_text())
    path = result.folder / MODEL_FILE
    return Artifact(
        "student/int8-mixed-ort", "student", path, Format.ONNX, scheme.pop("precision"), student.inputs,
        student.outputs, file_digest(path), student.parameters, scheme, result.facts,
    )  # fmt: skip


class Scorer:
    """The task metric of ONNX files on the validation split, in ONNX Runtime on this machine. The reference, whose
    score is the ``baseline``, is run when it is first asked for."""

    def __init__(self, run: Run, reference: Artifact) -> None:
        from compressor.evaluate import SplitEvalSet

        self.task, self.names = run.model.task, run.data.labels
        self.data = SplitEvalSet(run.data.splits["validation"])
        self.teacher_data = SplitEvalSet((run.teacher_data or run.data).splits["validation"])
        self.known: dict[str, float] = {}
        self._reference = reference

    @cached_property
    def reference(self) -> Array:
        return self._outputs(self._reference)

    @cached_property
    def baseline(self) -> float:
        return self.score_of(self.reference)

    def __call__(self, artifact: Artifact) -> float:
        if artifact.digest not in self.known:
            self.known[artifact.digest] = self.score_of(self._outputs(artifact))
        return self.known[artifact.digest]

    def score_of(self, outputs: Array) -> float:
        """The metric of the model's first output on validation, as a number that grows with quality."""
        from compressor.evaluate import quality, score, unit_of

        found = score(self.task, outputs, self.data.labels, self.reference, self.names)
        return quality(found, unit_of(self.task))

    def _outputs(self, artifact: Artifact) -> Array:
        from compressor.evaluate import batch_size, predict

        with sdk_errors(StageError, f"score `{artifact.name}` on validation", hint="Does the file run here?"):
            call = _session(artifact)
            data = self.teacher_data if artifact.role == "teacher" else self.data
            size = batch_size(self.task, artifact.outputs[0].shape[-1], BATCH)
            return predict(call, data, size, specs=artifact.inputs, task=self.task)

    def all_outputs(self, artifact: Artifact) -> dict[str, Array]:
        """Every output of a student's file on validation, by name, the first one first."""
        from compressor.evaluate import fill_batch, fit_inputs, fixed_batch

        static, parts = fixed_batch(artifact.inputs), list[Mapping[str, Array]]()
        with sdk_errors(StageError, f"run `{artifact.name}` on validation", hint="Does the file run here?"):
            call = _session(artifact)
            for inputs, _ in self.data.batches(static or BATCH):
                count = len(next(iter(inputs.values())))
                made = call(fill_batch(fit_inputs(inputs, artifact.inputs), static))
                parts.append({name: array[:count] for name, array in made.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _session(artifact: Artifact) -> Callable[[Inputs], Mapping[str, Any]]:
    """A file in ONNX Runtime, as a function of its inputs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(artifact.path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, dict(inputs)), strict=True))
