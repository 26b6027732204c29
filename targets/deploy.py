"""One profile: probe, compile, score on validation, measure, decide, score what counts on test.

A candidate that fails to compile or to run becomes a FAILED row with its reason; the others go on.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from compressor.errors import CompileError, CompressError, RunError, TargetUnavailable, sdk_errors
from compressor.evaluate import (
    EvalSet,
    agreement,
    fill_batch,
    fit_inputs,
    fixed_batch,
    is_distribution,
    loyalty,
    predict,
    score,
)
from compressor.profile import HardwareProfile
from compressor.types import Array, Artifact, Figure, Inputs, Measurement, Origin, Task, Unavailable
from targets.base import Compiled, Missing, Ready, Session, TargetBackend
from targets.clock import Clock, pinned
from targets.gate import decide
from targets.measure import Measured, Settings, Timing, measure
from targets.memory import peak_memory
from targets.outcome import Loyalty, ProfileOutcome, Promise, Row, State
from targets.site import Site, find_site

EVALUATION_BATCH = 64
CLASSIFICATION = frozenset({"image-classification", "text-classification"})
Event = Callable[[str, Mapping[str, Any]], None]
NOT_MEASURED = Unavailable("not measured")
NOT_CHOSEN = Unavailable("not chosen: the test set is touched once")


@dataclass(frozen=True)
class Candidates:
    """What may ship and what it is compared with. ``teacher`` may be the very file that ``student`` is (ONNX input)."""

    teacher: Artifact | None
    null_twin: Artifact | None
    student: Artifact
    variants: tuple[Artifact, ...] = ()

    def ordered(self) -> tuple[Artifact, ...]:
        """Teacher, null twin, student fp32, variants."""
        first = (item for item in (self.teacher, self.null_twin) if item is not None)
        return (*first, self.student, *self.variants)


@dataclass(frozen=True)
class EvaluationData:
    """Validation chooses, test reports. ``latency_inputs`` are real samples of batch 1; ``labels`` are class names."""

    task: Task
    validation: EvalSet
    test: EvalSet | None
    labels: tuple[str, ...] = ()
    latency_inputs: Sequence[Inputs] = ()


@dataclass
class _Trial:
    """One candidate on its way through the stages."""

    artifact: Artifact
    compiled: Compiled | None = None
    failure: str = ""
    validation: Array | None = None  # predictions
    unscored: str = ""  # why there are no predictions
    latency: Figure = NOT_MEASURED
    speedup: Figure = NOT_MEASURED
    memory: Figure = NOT_MEASURED


@dataclass(frozen=True)
class _Run:
    """What stays the same during one deployment."""

    profile: HardwareProfile
    backend: TargetBackend
    data: EvaluationData
    out: Path
    site: Site | None
    cache: MutableMapping[str, Array]
    settings: Settings
    clock: Clock | None
    event: Event
    trials: list[_Trial] = field(default_factory=list)


def deploy(
    profile: HardwareProfile,
    backend: TargetBackend,
    candidates: Candidates,
    data: EvaluationData,
    promise: Promise,
    out: Path,
    *,
    cache: MutableMapping[str, Array] | None = None,
    settings: Settings | None = None,
    clock: Clock | None = None,
    on_event: Event | None = None,
) -> ProfileOutcome:
    """Compile, run, measure and judge all candidates on one profile; compiled files go to ``out``.

    ``cache`` keeps predictions by (file, runtime, inputs), so that profiles that share a runtime score a file once.
    Never raises for a candidate that fails or a target that is missing: the outcome says so.
    """
    ready = _probe(backend)
    if isinstance(ready, Missing):
        return _missing(profile, candidates, promise, ready)
    store: MutableMapping[str, Array] = {} if cache is None else cache
    site = find_site(profile, backend, ready)
    run = _Run(profile, backend, data, out, site, store, settings or Settings(), clock, on_event or _silent)
    run.trials.extend(_compile(run, artifact) for artifact in candidates.ordered())
    _score_validation(run)
    notes = _measure(run)
    rows = _rows(run)
    decision = decide(rows, promise)
    final = _with_test(run, decision.rows)
    return ProfileOutcome(
        profile=profile.name,
        title=profile.title,
        target=backend.name,
        device=site.device if site is not None and site.state is State.EXECUTED else profile.compute.processor,
        rows=final,
        promise=promise,
        kept=decision.kept,
        verdict=decision.verdict,
        versions=ready.versions,
        notes=tuple(notes),
    )


def _silent(_name: str, _facts: Mapping[str, Any]) -> None:
    """For callers that do not listen."""


def _probe(backend: TargetBackend) -> Ready | Missing:
    try:
        with sdk_errors(TargetUnavailable, f"probe target `{backend.name}`"):
            return backend.probe()
    except TargetUnavailable as error:
        return Missing(str(error), error.hint)


def _missing(profile: HardwareProfile, candidates: Candidates, promise: Promise, missing: Missing) -> ProfileOutcome:
    gone = Unavailable(missing.reason, missing.hint)
    rows = tuple(
        Row(item, State.UNAVAILABLE, gone, gone, gone, gone, _file_bytes((item.path,)), gone, reason=missing.reason)
        for item in candidates.ordered()
    )
    verdict = f"nothing ships: target {profile.target} is missing here ({missing.reason})"
    return ProfileOutcome(
        profile.name,
        profile.title,
        profile.target,
        profile.compute.processor,
        rows,
        promise,
        kept=False,
        verdict=verdict,
        missing=missing.reason,
    )


def _compile(run: _Run, artifact: Artifact) -> _Trial:
    run.event("deploy", {"text": f"{run.profile.name}: compiling {artifact.name}"})
    trial = _Trial(artifact)
    if artifact.format not in run.backend.accepts:
        trial.failure = f"{run.backend.name} does not take {artifact.format.value} files"
        return trial
    try:
        with sdk_errors(CompileError, f"compile `{artifact.name}`"):
            if problems := run.backend.check(artifact, run.profile):
                trial.failure = "; ".join(problems)
            else:
                trial.compiled = run.backend.compile(artifact, run.profile, run.out)
    except CompressError as error:
        trial.failure = str(error)
    return trial


# ---------------------------------------------------------------- accuracy


def _score_validation(run: _Run) -> None:
    for trial in run.trials:
        if trial.compiled is None:
            trial.unscored = trial.failure
            continue
        run.event("deploy", {"text": f"{run.profile.name}: scoring {trial.artifact.name} on validation"})
        try:
            trial.validation = _predictions(run, trial, run.data.validation)
        except CompressError as error:
            trial.unscored = str(error)
            if run.site is not None and not run.site.stand_in:
                trial.failure = str(error)


def _predictions(run: _Run, trial: _Trial, evalset: EvalSet) -> Array:
    """The artifact's outputs on a set, from the cache or by running it. Raises :class:`RunError`."""
    site, artifact = run.site, trial.artifact
    if site is None or trial.compiled is None:
        raise RunError("there is no runtime here that could run the file")
    inputs_digest = getattr(evalset, "digest", None)
    level = site.profile.runtime.graph_level
    key = json.dumps(
        [artifact.digest, site.key, level, run.profile.options if not site.stand_in else {}, inputs_digest]
    )
    if inputs_digest is not None and key in run.cache:
        return run.cache[key]
    with sdk_errors(RunError, f"run `{artifact.name}`"), site.open(trial.compiled) as session:
        found = predict(session.run, evalset, EVALUATION_BATCH, specs=artifact.inputs)
    if not np.isfinite(found).all():
        raise RunError(f"`{artifact.name}` gives NaN or infinite outputs")
    if inputs_digest is not None:
        run.cache[key] = found
    return found


def _metric(run: _Run, outputs: Array, evalset: EvalSet, reference: Array | None) -> Figure:
    assert run.site is not None
    try:
        value = score(run.data.task, outputs, evalset.labels, reference)
    except ValueError as error:
        return Unavailable(str(error))
    return Measurement(value, "1", run.site.origin, run.site.device, {"samples": len(evalset)})


def _reference(run: _Run) -> _Trial:
    """Teacher, or the first candidate (the student's fp32 file) where there is none."""
    return run.trials[0]


# ---------------------------------------------------------------- latency and memory


def _measure(run: _Run) -> list[str]:
    """Memory and interleaved latency of everything that ran; returns notes for the report."""
    site = run.site
    running = [trial for trial in run.trials if trial.validation is not None]
    if site is None or site.no_latency or not run.data.latency_inputs:
        gone = Unavailable(site.no_latency if site and site.no_latency else "nothing to measure with")
        for trial in run.trials:
            trial.latency = trial.speedup = trial.memory = gone
        return []
    files = {trial.artifact.digest: trial for trial in reversed(running)}  # a file that has two roles is measured once
    inputs = {digest: _latency_inputs(run, trial.artifact) for digest, trial in files.items()}
    for digest, trial in files.items():
        assert trial.compiled is not None
        run.event("deploy", {"text": f"{run.profile.name}: memory of {trial.artifact.name}"})
        trial.memory = peak_memory(run.backend.name, trial.compiled, run.profile, inputs[digest], site.device)
    run.event("deploy", {"text": f"{run.profile.name}: timing {len(files)} files in turn"})
    measured = _time(run, files, inputs)
    for trial in running:
        trial.memory = files[trial.artifact.digest].memory
        if measured is not None and trial.artifact.digest in measured.timings:
            _set_latency(run, trial, measured)
    return [] if measured is None else [f"latency: {measured.contention.describe()}"]


def _latency_inputs(run: _Run, artifact: Artifact) -> list[dict[str, Array]]:
    size = fixed_batch(artifact.inputs) or run.profile.runtime.batch
    return [fill_batch(fit_inputs(sample, artifact.inputs), size) for sample in run.data.latency_inputs]


def _time(run: _Run, files: dict[str, _Trial], inputs: dict[str, list[dict[str, Array]]]) -> Measured | None:
    """All files in one process, interleaved; a file that breaks is left out and its row fails."""
    assert run.site is not None
    with contextlib.ExitStack() as stack:
        stack.enter_context(pinned(run.profile.runtime.threads))
        runs: dict[str, Callable[[int], object]] = {}
        for digest, trial in files.items():
            assert trial.compiled is not None
            samples = inputs[digest]
            try:
                session = stack.enter_context(run.site.open(trial.compiled))
                with sdk_errors(RunError, f"run `{trial.artifact.name}`"):
                    session.run(samples[0])
            except CompressError as error:
                trial.failure = str(error)
                continue
            runs[digest] = _cycle(session, samples)
        if not runs:
            return None
        reference = _reference(run).artifact.digest
        first = reference if reference in runs else next(iter(runs))
        with sdk_errors(RunError, "measure the latency"):
            return measure(runs, first, len(run.data.latency_inputs), run.settings, run.clock)


def _cycle(session: Session, samples: list[dict[str, Array]]) -> Callable[[int], object]:
    call = session.run
    return lambda index: call(samples[index])


def _set_latency(run: _Run, trial: _Trial, measured: Measured) -> None:
    assert run.site is not None
    timing: Timing = measured.timings[trial.artifact.digest]
    device, origin = run.site.device, run.site.origin
    common: dict[str, float | int | str] = {"threads": run.profile.runtime.threads, "rounds": timing.rounds}
    detail = common | {
        "p90": timing.p90_ms,
        "p95": timing.p95_ms,
        "p99": timing.p99_ms,
        "mean": timing.mean_ms,
        "ci95_low": timing.ci95_low_ms,
        "ci95_high": timing.ci95_high_ms,
        "samples": timing.samples,
        "batch": fixed_batch(trial.artifact.inputs) or run.profile.runtime.batch,
        "preempted_share": timing.preempted_share,
        "p99_with_preempted": timing.p99_all_ms,
        "contention": measured.contention.describe(),
    }
    trial.latency = Measurement(timing.p50_ms, "ms", origin, device, detail)
    teacher = _reference(run).artifact
    if measured.reference != teacher.digest or teacher.role != "teacher":
        trial.speedup = Unavailable("there is no teacher file that runs here")
        return
    interval = {"ci95_low": timing.ratio_low, "ci95_high": timing.ratio_high}
    trial.speedup = Measurement(timing.ratio, "x", origin, device, common | interval)


# ---------------------------------------------------------------- rows


def _rows(run: _Run) -> list[Row]:
    reference = _reference(run).validation
    return [_row(run, trial, reference) for trial in run.trials]


def _row(run: _Run, trial: _Trial, reference: Array | None) -> Row:
    validation: Figure = Unavailable(trial.unscored or "not scored")
    if trial.validation is not None:
        validation = _metric(run, trial.validation, run.data.validation, reference)
    if trial.failure:
        state = State.FAILED
    elif run.site is not None and trial.validation is not None:
        state = run.site.state
    else:
        state = State.COMPILED
    paths = (trial.artifact.path,) if trial.compiled is None else (trial.compiled.path, *trial.compiled.extra_files)
    return Row(
        artifact=trial.artifact,
        state=state,
        validation=validation,
        test=NOT_CHOSEN,
        latency=trial.latency if not trial.failure else Unavailable(trial.failure),
        speedup=trial.speedup if not trial.failure else Unavailable(trial.failure),
        file_bytes=_file_bytes(paths),
        peak_memory=trial.memory if not trial.failure else Unavailable(trial.failure),
        compiled=trial.compiled,
        coverage=None if trial.compiled is None else trial.compiled.coverage,
        reason=trial.failure or (trial.unscored if trial.validation is None else ""),
    )


def _file_bytes(paths: Sequence[Path]) -> Figure:
    return Measurement(float(sum(path.stat().st_size for path in paths)), "bytes", Origin.MEASURED, "file size")


def _with_test(run: _Run, rows: Sequence[Row]) -> tuple[Row, ...]:
    """Test figures for the teacher, the null twin, the student's fp32 file and what ships; for nothing else."""
    test = run.data.test
    if test is None:
        return tuple(replace(row, test=Unavailable("there is no test split")) for row in rows)
    wanted = [row.shipped or row.artifact.role != "student" or row.artifact.precision == "fp32" for row in rows]
    found: dict[str, Array] = {}
    failed: dict[str, str] = {}
    for trial, needed in zip(run.trials, wanted, strict=True):
        if needed and trial.validation is not None:
            run.event("deploy", {"text": f"{run.profile.name}: scoring {trial.artifact.name} on test"})
            try:
                found[trial.artifact.name] = _predictions(run, trial, test)
            except CompressError as error:
                failed[trial.artifact.name] = str(error)
    return tuple(
        _test_row(run, row, test, found, failed) if needed else row for row, needed in zip(rows, wanted, strict=True)
    )


def _test_row(run: _Run, row: Row, test: EvalSet, found: dict[str, Array], failed: dict[str, str]) -> Row:
    outputs = found.get(row.artifact.name)
    if outputs is None:
        return replace(row, test=Unavailable(failed.get(row.artifact.name) or row.reason or "it did not run"))
    reference = found.get(_reference(run).artifact.name)
    figure = _metric(run, outputs, test, reference)
    teacher = reference if _reference(run).artifact.role == "teacher" and row.artifact.role != "teacher" else None
    loyal = None
    if run.data.task in CLASSIFICATION and teacher is not None and teacher.ndim == outputs.ndim == 2:
        loyal = Loyalty(*loyalty(teacher, outputs)) if teacher.shape == outputs.shape and teacher.shape[1] > 1 else None
    plain = next((trial.artifact for trial in run.trials if _is_plain(trial.artifact, row)), None)
    equal = None
    if plain is not None and plain.name in found and _has_classes(run, found[plain.name]):
        equal = agreement(found[plain.name], outputs)
    return replace(row, test=figure, loyalty=loyal, agreement=equal)


def _is_plain(artifact: Artifact, row: Row) -> bool:
    """Is it the fp32 file of the same role, and not the row's own?"""
    return artifact.role == row.artifact.role and artifact.precision == "fp32" and row.artifact.precision != "fp32"


def _has_classes(run: _Run, outputs: Array) -> bool:
    return run.data.task in CLASSIFICATION or (
        outputs.ndim == 2 and (run.data.test is not None) and _labelled(run, outputs)
    )


def _labelled(run: _Run, outputs: Array) -> bool:
    return (run.data.test is not None and run.data.test.labels is not None) or is_distribution(outputs)
