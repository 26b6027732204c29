"""One profile: probe, compile, score on validation, measure, decide, score what counts on test.

A candidate that fails to compile or to run becomes a FAILED row with its reason; the others go on.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compressor.errors import CompileError, CompressError, DeviceLost, TargetUnavailable, sdk_errors
from compressor.evaluate import (
    EvalSet,
    agreement,
    class_loyalty,
    further,
    is_distribution,
    paired_error,
    score,
    unit_of,
    value_loyalty,
)
from compressor.profile import HardwareProfile
from compressor.types import Array, Artifact, Figure, Measurement, Origin, Unavailable
from targets.base import Missing, Ready, TargetBackend
from targets.clock import Clock
from targets.dearest import with_nodes
from targets.exits import sentence, with_shares
from targets.gate import PAIRED_ERROR, confirmed, decide
from targets.measure import Settings
from targets.nearness import nearness
from targets.outcome import Loyalty, Nearness, ProfileOutcome, Promise, Row, State
from targets.site import find_site
from targets.trial import (
    Deployment,
    EvaluationData,
    Event,
    Trial,
    exits_taken,
    measure_all,
    predictions,
    reference_of,
    site_of,
    without_simulator,
)

CLASSIFICATION = frozenset({"image-classification", "text-classification"})
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
    ready = probed(backend)
    if isinstance(ready, Missing):
        return _missing(profile, candidates, promise, ready)
    site = find_site(profile, backend, ready)
    whole = data
    if site is not None and site.origin is Origin.SIMULATED:
        data = data.for_simulators()
    store: MutableMapping[str, Array] = {} if cache is None else cache
    run = Deployment(profile, backend, data, out, site, store, settings or Settings(), clock, on_event or _silent)
    entrants = (entrant for artifact in candidates.ordered() for entrant in backend.entrants(artifact, profile))
    run.trials.extend(compiled_trial(run, artifact) for artifact in entrants)
    _score_validation(run)
    notes = measure_all(run)
    notes += [
        f"a simulator: {name} is its first {len(part)} of {len(every)} samples"
        for name, part, every in (("validation", data.validation, whole.validation), ("test", data.test, whole.test))
        if part is not None and every is not None and len(part) < len(every)
    ]
    rows = _rows(run)
    decision = decide(rows, promise)
    decision = confirmed(replace(decision, rows=_with_test(run, with_nodes(run, decision.rows))), promise)
    final = decision.rows
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
        notes=(*notes, *(told for row in final if (told := sentence(row)))),
    )


def _silent(_name: str, _facts: Mapping[str, Any]) -> None:
    """For callers that do not listen."""


def probed(backend: TargetBackend) -> Ready | Missing:
    """What the back end says of this machine; an SDK that breaks is missing."""
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


def compiled_trial(run: Deployment, artifact: Artifact) -> Trial:
    """The artifact compiled for the profile, or with the reason why it was not."""
    run.event("deploy", {"text": f"{run.profile.name}: compiling {artifact.name}"})
    trial = Trial(artifact)
    if artifact.format not in run.backend.accepts:
        trial.failure = f"{run.backend.name} does not take {artifact.format.value} files"
        return trial
    try:
        with sdk_errors(CompileError, f"compile `{artifact.name}`"):
            if problems := run.backend.check(artifact, run.profile):
                trial.failure = "; ".join(problems)
            else:
                trial.compiled = run.backend.compile(artifact, run.profile, run.out)
    except TargetUnavailable as error:
        trial.failure, trial.missing = f"{error}. {error.hint}".strip(), True
    except DeviceLost:
        raise
    except CompressError as error:
        trial.failure = str(error)
    return trial


# ---------------------------------------------------------------- accuracy


def _score_validation(run: Deployment) -> None:
    for trial in run.trials:
        if trial.compiled is None and trial.artifact.role != "teacher":
            trial.unscored = trial.failure
            continue
        run.event("deploy", {"text": f"{run.profile.name}: scoring {trial.artifact.name} on validation"})
        try:
            trial.validation = predictions(run, trial, run.data.validation)
        except DeviceLost:
            raise
        except CompressError as error:
            trial.unscored = trial.failure or str(error)
            if (site := site_of(run, trial)) is not None and not site.stand_in:
                trial.failure = str(error)


def figure_of(run: Deployment, trial: Trial, outputs: Array, evalset: EvalSet, reference: Array | None) -> Figure:
    """The task's metric of a trial's outputs; ``reference`` holds the teacher's, for metrics that need them."""
    site = site_of(run, trial)
    assert site is not None
    try:
        value = score(run.data.task, outputs, evalset.labels, reference, run.data.labels)
    except ValueError as error:
        return Unavailable(str(error))
    detail = {"samples": len(evalset), **further(run.data.task, outputs, evalset.labels, reference)}
    return Measurement(value, unit_of(run.data.task), site.origin, site.device, detail)


# ---------------------------------------------------------------- rows


def _rows(run: Deployment) -> list[Row]:
    reference = reference_of(run).validation
    return [_row(run, trial, reference) for trial in run.trials]


def _row(run: Deployment, trial: Trial, reference: Array | None) -> Row:
    validation: Figure = Unavailable(trial.unscored or "not scored")
    if trial.validation is not None:
        validation = figure_of(run, trial, trial.validation, run.data.validation, reference)
        validation = with_shares(validation, exits_taken(run, trial, run.data.validation))
    if trial.failure:
        state = State.UNAVAILABLE if trial.missing else State.FAILED
    elif (site := site_of(run, trial)) is not None and trial.validation is not None:
        state = site.state
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


def _with_test(run: Deployment, rows: Sequence[Row]) -> tuple[Row, ...]:
    """Test figures for the teacher, the null twin, the student's fp32 file and what ships; for nothing else."""
    test = run.data.test
    if test is None:
        return tuple(replace(row, test=Unavailable("there is no test split")) for row in rows)
    wanted = [row.shipped or row.artifact.role != "student" or row.artifact.precision == "fp32" for row in rows]
    found: dict[str, Array] = {}
    taken: dict[str, Array | None] = {}
    near: dict[str, Nearness | None] = {}
    failed: dict[str, str] = {}
    for trial, row, needed in zip(run.trials, rows, wanted, strict=True):
        if needed and trial.validation is not None:
            where = run if row.shipped else without_simulator(run)
            run.event("deploy", {"text": f"{run.profile.name}: scoring {trial.artifact.name} on test"})
            try:
                outputs = found[trial.artifact.name] = predictions(where, trial, test)
                taken[trial.artifact.name] = exits_taken(where, trial, test)
                near[trial.artifact.name] = nearness(where, trial, test, outputs, classes=_has_classes(run, outputs))
            except DeviceLost:
                raise
            except CompressError as error:
                failed[trial.artifact.name] = str(error)
    scored = (
        _test_row(run if row.shipped else without_simulator(run), trial, row, test, found, failed) if needed else row
        for trial, row, needed in zip(run.trials, rows, wanted, strict=True)
    )
    return tuple(
        replace(
            row,
            test=with_shares(row.test, taken.get(row.artifact.name)),
            nearness=near.get(row.artifact.name),
        )
        for row in scored
    )


def _test_row(
    run: Deployment, trial: Trial, row: Row, test: EvalSet, found: dict[str, Array], failed: dict[str, str]
) -> Row:
    outputs = found.get(row.artifact.name)
    if outputs is None:
        return replace(row, test=Unavailable(failed.get(row.artifact.name) or row.reason or "it did not run"))
    reference = found.get(reference_of(run).artifact.name)
    figure = figure_of(run, trial, outputs, test, reference)
    teacher = reference if reference_of(run).artifact.role == "teacher" and row.artifact.role != "teacher" else None
    shares = class_loyalty(run.data.task, teacher, outputs, test.labels) if teacher is not None else None
    loyal = Loyalty(*shares) if shares is not None else None
    near = value_loyalty(run.data.task, teacher, outputs) if teacher is not None else None
    if teacher is not None and run.data.task in CLASSIFICATION and test.labels is not None:
        figure = _paired(figure, paired_error(teacher, outputs, test.labels))
    plain = next((trial.artifact for trial in run.trials if _is_plain(trial.artifact, row)), None)
    equal = None
    if plain is not None and plain.name in found and _has_classes(run, found[plain.name]):
        equal = agreement(found[plain.name], outputs)
    return replace(row, test=figure, loyalty=loyal, regression_loyalty=near, agreement=equal)


def _paired(figure: Figure, error: float | None) -> Figure:
    if error is None or not isinstance(figure, Measurement):
        return figure
    return replace(figure, detail={**figure.detail, PAIRED_ERROR: error})


def _is_plain(artifact: Artifact, row: Row) -> bool:
    """Is it the fp32 file of the same role, and not the row's own?"""
    return artifact.role == row.artifact.role and artifact.precision == "fp32" and row.artifact.precision != "fp32"


def _has_classes(run: Deployment, outputs: Array) -> bool:
    return run.data.task in CLASSIFICATION or (
        run.data.task == "generic" and outputs.ndim == 2 and (run.data.test is not None) and _labelled(run, outputs)
    )


def _labelled(run: Deployment, outputs: Array) -> bool:
    return (run.data.test is not None and run.data.test.labels is not None) or is_distribution(outputs)
