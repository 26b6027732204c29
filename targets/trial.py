"""What one candidate goes through on a profile: its predictions, its peak memory, its latency among the others."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from compressor.errors import CompressError, DeviceLost, RunError, sdk_errors
from compressor.evaluate import EvalSet, FirstSamples, batch_size, fill_batch, fit_inputs, fixed_batch, predict
from compressor.profile import HardwareProfile
from compressor.types import TEXT2TEXT, Array, Artifact, Figure, Inputs, Measurement, Origin, Task, Unavailable
from targets.base import Compiled, SelfTimed, Session, TargetBackend
from targets.clock import Clock, pinned
from targets.exits import EXIT, leaves_early, mean_latency, mean_speedup
from targets.measure import Measured, Settings, Timing, measure
from targets.memory import peak_memory
from targets.site import Site, portable, stand_in
from targets.slow import KeptBatches

EVALUATION_BATCH = 64
WRITTEN = TEXT2TEXT | {"causal-lm"}  # outputs as wide as a vocabulary: too much to keep batch by batch
NOT_MEASURED = Unavailable("not measured")
Event = Callable[[str, Mapping[str, Any]], None]


@dataclass(frozen=True)
class EvaluationData:
    """Validation chooses, test reports. ``latency_inputs`` are real samples of batch 1; ``labels`` are class names."""

    task: Task
    validation: EvalSet
    test: EvalSet | None
    labels: tuple[str, ...] = ()
    latency_inputs: Sequence[Inputs] = ()
    teacher: EvaluationData | None = None  # as the teacher's file takes it, where it has tokens of its own
    simulated: int | None = None  # samples of validation that simulators choose by; None: all
    simulated_test: int | None = None  # samples of test that simulators are tested on; None: all

    def for_simulators(self) -> EvaluationData:
        """With as much of the data as a simulator is to run. Texts that are written are judged whole."""
        if getattr(self.validation, "targets", None) is not None:
            return self
        validation, test = self.validation, self.test
        if self.simulated is not None and self.simulated < len(validation):
            validation = FirstSamples(validation, self.simulated)
        if self.simulated_test is not None and test is not None and self.simulated_test < len(test):
            test = FirstSamples(test, self.simulated_test)
        if validation is self.validation and test is self.test:
            return self
        own = self.teacher
        if own is not None:
            limited = replace(own, simulated=self.simulated, simulated_test=self.simulated_test)
            own = limited.for_simulators()
        return replace(self, validation=validation, test=test, teacher=own)

    def seen_by(self, artifact: Artifact) -> EvaluationData:
        return self.teacher if artifact.role == "teacher" and self.teacher is not None else self


@dataclass
class Trial:
    """One candidate on its way through the stages."""

    artifact: Artifact
    compiled: Compiled | None = None
    failure: str = ""
    missing: bool = False  # is the failure that the tool chain is not installed?
    validation: Array | None = None  # predictions
    unscored: str = ""  # why there are no predictions
    latency: Figure = NOT_MEASURED
    speedup: Figure = NOT_MEASURED
    memory: Figure = NOT_MEASURED

    @property
    def key(self) -> str:
        """What is measured once: a file in a runtime."""
        return f"{self.artifact.digest}@{self.artifact.runtime}"


@dataclass(frozen=True)
class Deployment:
    """What stays the same during one deployment, and the candidates on their way."""

    profile: HardwareProfile
    backend: TargetBackend
    data: EvaluationData
    out: Path
    site: Site | None
    cache: MutableMapping[str, Array]
    settings: Settings
    clock: Clock | None
    event: Event
    trials: list[Trial] = field(default_factory=list)


def site_of(run: Deployment, trial: Trial) -> Site | None:
    """Where this candidate is scored. A simulator takes up to seconds a sample; what can never run on the device, the
    teacher and a file that does not fit into its memory, is scored by ONNX Runtime instead, and its row says so. So is
    a teacher that the target refuses: what ships is judged by it.
    """
    site, compiled = run.site, trial.compiled
    if site is None or site.stand_in:
        return site
    simulated = site.origin is Origin.SIMULATED
    if trial.artifact.role == "teacher" and (simulated or compiled is None):
        return stand_in(site.no_latency or "the target does not take the teacher") or site
    if simulated and compiled is not None and compiled.over:
        return stand_in(site.no_latency) or site
    return site


def without_simulator(run: Deployment) -> Deployment:
    """For the test figures of what does not ship: on a simulator ONNX Runtime's."""
    if run.site is None or run.site.stand_in or run.site.origin is not Origin.SIMULATED:
        return run
    return replace(run, site=stand_in(run.site.no_latency) or run.site)


def predictions(run: Deployment, trial: Trial, evalset: EvalSet, output: str | None = None) -> Array:
    """The artifact's outputs on a set, from the cache or by running it; ``output``: another one than the first.

    Raises :class:`RunError`.
    """
    site, artifact = site_of(run, trial), trial.artifact
    compiled = trial.compiled or (portable(artifact) if site is not None and site.stand_in else None)
    if site is None or compiled is None:
        raise RunError("there is no runtime here that could run the file")
    own = run.data.seen_by(artifact)
    if own is not run.data:
        evalset = own.test if evalset is run.data.test and own.test is not None else own.validation
    inputs_digest = getattr(evalset, "digest", None)
    level = site.profile.runtime.graph_level
    options = run.backend.deciding_options(compiled, run.profile) if not site.stand_in else {}
    parts = [artifact.digest, artifact.runtime, site.key, level, options, inputs_digest, run.data.task]
    key = json.dumps(parts if output is None else [*parts, output])
    if inputs_digest is not None and key in run.cache:
        return run.cache[key]
    with sdk_errors(RunError, f"run `{artifact.name}`"), site.open(compiled) as session:
        batch = batch_size(run.data.task, artifact.outputs[0].shape[-1], EVALUATION_BATCH)
        kept = None
        if inputs_digest is not None and site.origin is Origin.SIMULATED and run.data.task not in WRITTEN:
            name = output or artifact.outputs[0].name
            kept = KeptBatches(session.run, run.cache, key, name, len(evalset), partial(_tell, run, trial, evalset))
        found = predict(kept or session.run, evalset, batch, output, specs=artifact.inputs, task=run.data.task)
    if kept is not None:
        kept.forget()
    if not np.isfinite(found).all():
        raise RunError(f"`{artifact.name}` gives NaN or infinite outputs")
    if inputs_digest is not None:
        run.cache[key] = found
    return found


def _tell(run: Deployment, trial: Trial, evalset: EvalSet, done: int) -> None:
    text = f"{run.profile.name}: {done} of {len(evalset)} samples of {trial.artifact.name} through the simulator"
    run.event("deploy", {"text": text})


def exits_taken(run: Deployment, trial: Trial, evalset: EvalSet) -> Array | None:
    """The number of the exit that each sample took, (N,); None for a file without exits. Raises :class:`RunError`."""
    return predictions(run, trial, evalset, EXIT) if leaves_early(trial.artifact) else None


def reference_of(run: Deployment) -> Trial:
    """Teacher, or the first candidate (the student's fp32 file) where there is none."""
    return run.trials[0]


# ---------------------------------------------------------------- latency and memory


def measure_all(run: Deployment) -> list[str]:
    """Memory and interleaved latency of everything that ran; returns notes for the report."""
    site = run.site
    running = [trial for trial in run.trials if trial.validation is not None and trial.compiled is not None]
    if site is None or site.no_latency or not run.data.latency_inputs:
        gone = Unavailable(site.no_latency if site and site.no_latency else "nothing to measure with")
        for trial in run.trials:
            trial.latency = trial.speedup = trial.memory = gone
        return []
    files = {trial.key: trial for trial in reversed(running)}  # a file that has two roles is measured once
    inputs = {digest: latency_inputs(run, trial.artifact) for digest, trial in files.items()}
    for digest, trial in files.items():
        assert trial.compiled is not None
        run.event("deploy", {"text": f"{run.profile.name}: memory of {trial.artifact.name}"})
        name, profile = run.backend.resolve(trial.artifact, run.profile)
        if site.backend.memory_apart:
            trial.memory = Unavailable(site.backend.memory_apart)
            continue
        trial.memory = peak_memory(name, trial.compiled, profile, inputs[digest], site.device)
    run.event("deploy", {"text": f"{run.profile.name}: timing {len(files)} files in turn"})
    measured = _time(run, files, inputs)
    for trial in running:
        trial.memory = files[trial.key].memory
        if measured is not None and trial.key in measured.timings:
            _set_latency(run, trial, measured)
    return [] if measured is None else [f"latency: {measured.contention.describe()}"]


def latency_inputs(run: Deployment, artifact: Artifact) -> list[dict[str, Array]]:
    """The samples that its latency is measured on, in its shapes."""
    size = fixed_batch(artifact.inputs) or run.profile.runtime.batch
    return [
        fill_batch(fit_inputs(sample, artifact.inputs), size) for sample in run.data.seen_by(artifact).latency_inputs
    ]


def _time(run: Deployment, files: dict[str, Trial], inputs: dict[str, list[dict[str, Array]]]) -> Measured | None:
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
            except DeviceLost:
                raise
            except CompressError as error:
                trial.failure = str(error)
                continue
            runs[digest] = timed_run(session, samples)
        if not runs:
            return None
        reference = reference_of(run).key
        first = reference if reference in runs else next(iter(runs))
        with sdk_errors(RunError, "measure the latency"):
            kinds = [tuple(array.shape for array in sample.values()) for sample in run.data.latency_inputs]
            return measure(runs, first, len(kinds), run.settings, run.clock, kinds)


class _Elsewhere:
    """A session that times its runs beside the model, over several inputs."""

    def __init__(self, session: SelfTimed, samples: list[dict[str, Array]]) -> None:
        self._session, self._samples = session, samples

    def __call__(self, index: int) -> object:
        return self._session.run(self._samples[index])

    def times_ns(self, index: int, count: int) -> Sequence[int]:
        return self._session.times_ns(self._samples[index], count)


def timed_run(session: Session, samples: list[dict[str, Array]]) -> Callable[[int], object]:
    """What :func:`targets.measure.measure` times: sample number i through the session."""
    if isinstance(session, SelfTimed):
        return _Elsewhere(session, samples)
    call = session.run
    return lambda index: call(samples[index])


def _set_latency(run: Deployment, trial: Trial, measured: Measured) -> None:
    assert run.site is not None
    timing: Timing = measured.timings[trial.key]
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
        "fastest": timing.fastest_ms,
        "contention": measured.contention.describe(),
    }
    early = leaves_early(trial.artifact)
    latency, more = mean_latency(timing) if early else (timing.p50_ms, {})
    trial.latency = Measurement(latency, "ms", origin, device, detail | more)
    teacher = reference_of(run)
    if measured.reference != teacher.key or teacher.artifact.role != "teacher":
        trial.speedup = Unavailable("there is no teacher file that runs here")
        return
    interval = {
        "ci95_low": timing.ratio_low,
        "ci95_high": timing.ratio_high,
        "all_rounds": timing.ratio_all,
        "quiet_share": timing.quiet_share,
        "of_fastest": timing.fastest_ratio,
    }
    speedup, more = mean_speedup(timing) if early else (timing.ratio, {})
    trial.speedup = Measurement(speedup, "x", origin, device, common | interval | more)
