"""``run``: plan, build, deploy to every profile, report, package."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout

from compressor.cli.along import train_along
from compressor.cli.integrity import findings
from compressor.cli.latency import layer_cost
from compressor.cli.output import Progress, stdout_json
from compressor.cli.predictions import PredictionStore
from compressor.cli.seeds import compare_pairs, train_pairs
from compressor.cli.session import Request, Session, open_session
from compressor.cli.summary import show
from compressor.data.types import DataBundle
from compressor.distil import trackers
from compressor.distil.processes import is_main
from compressor.errors import ConfigError, TargetUnavailable
from compressor.exits import early_exits
from compressor.ledger import Event, EventLog, Ledger, code_digest, digest_of
from compressor.pipeline import Built, Pair, Pipeline
from compressor.profile import HardwareProfile, load_profile, profile_names
from compressor.rules import trained_rules
from compressor.stages.training import release
from compressor.types import Array, write_atomic

if TYPE_CHECKING:
    from targets.outcome import PairedSeeds, ProfileOutcome, RunSummary
    from targets.trial import EvaluationData

MISSED_LIMITS = 3


def run_command(request: Request, *, remeasure: bool, as_json: bool, tracker: str | None = None) -> int:
    """Carry out a whole run; the exit code of design: 0 done, 3 a promise was missed, 4 a wanted target is missing."""
    if tracker is not None:
        trackers.check(tracker)
    progress = Progress(quiet=not is_main())
    ledger = Ledger(request.out, progress)
    session = open_session(request)
    if not is_main():
        return train_along(session, ledger)
    summary, folder = execute(session, ledger, progress, remeasure=remeasure, tracker=tracker)
    paths = publish(session, summary, folder)
    if as_json:
        from targets.report import to_json

        stdout_json({"run": str(folder), **paths, "report": json.loads(to_json(summary, folder))})
    else:
        show(summary, paths)
    return exit_code(summary)


def exit_code(summary: RunSummary) -> int:
    if any(outcome.missing for outcome in summary.outcomes):
        return TargetUnavailable.exit_code
    return 0 if all(outcome.kept for outcome in summary.outcomes) else MISSED_LIMITS


def run_digest(session: Session) -> str:
    """Identifies a run: recipe, profiles, model and data."""
    return digest_of(
        {
            "recipe": session.recipe.model_dump(mode="json"),
            "profiles": [profile.model_dump(mode="json") for profile in session.profiles],
            "model": session.model.provenance.digest,
            "data": dict(session.data.digests),
            **({"panel": session.panel.facts()} if session.panel is not None else {}),
            **({"seeds": session.request.seeds} if session.request.seeds > 1 else {}),
        }
    )


def execute(
    session: Session, ledger: Ledger, progress: Event, *, remeasure: bool, tracker: str | None = None
) -> tuple[RunSummary, Path]:
    """Build the artifacts and deploy them; everything is written to the run folder, which is locked meanwhile."""
    digest = run_digest(session)
    folder = ledger.run_folder(digest)
    with _run_lock(folder, progress):
        log = EventLog(folder / "log.jsonl", progress)
        ledger.on_event = log
        log("run-start", {"digest": digest})
        write_recipe(session, folder)
        with trackers.tracking(tracker, folder / "trackers", session.recipe.name, log) as told:
            ledger.on_event = told
            pipeline = Pipeline(
                session.recipe,
                session.model,
                session.data,
                ledger,
                round_to=session.plan.channel_multiple,
                on_event=told,
                panel=session.panel,
                original=session.original,
                cost=layer_cost(session.recipe, session.profiles[0]),
                rules=trained_rules(session.recipe, session.profiles),
            )
            built = pipeline.build()
        ledger.on_event = log
        seeds, pairs = session.request.seeds, list[Pair]()
        if seeds > 1:
            pairs = train_pairs(pipeline, built, session.recipe, ledger, log, seeds)
        release()
        outcomes, rejected = _deploy_all(session, pipeline, built, ledger, folder, log, remeasure=remeasure)
        proof = _compare(session, pairs, built, ledger, folder, log) if pairs else None
        summary = summarise(session, digest, built, ledger, outcomes, rejected, proof, pairs)
        _stage_links(ledger, folder)
        log("run-done", {"outcomes": {outcome.profile: outcome.verdict for outcome in outcomes}})
    return summary, folder


def _compare(
    session: Session, pairs: Sequence[Pair], built: Built, ledger: Ledger, folder: Path, log: Event
) -> PairedSeeds:
    """The verdict of the seeds, through the runtime of the first profile."""
    profile, cache = session.profiles[0], PredictionStore(ledger.cache / "predictions")
    out = folder / "seeds"
    out.mkdir(parents=True, exist_ok=True)
    return compare_pairs(pairs, built, profile, evaluation_data(session), out, cache, log)


def _run_lock(folder: Path, progress: Event) -> FileLock:
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
        lock.release()
    except Timeout:
        progress("stage-wait", {"stage": "run", "reason": "another process is doing this very run"})
    return lock


def write_recipe(session: Session, folder: Path) -> Path:
    """The recipe as it was used, and the plan, beside the results."""
    import tomli_w

    data = session.recipe.model_dump(mode="json", exclude_none=True, exclude_defaults=False)
    path = folder / "recipe.toml"
    write_atomic(path, tomli_w.dumps(data))
    plan = {
        "steps": session.plan.steps,
        "profiles": [vars(item) for item in session.plan.per_profile],
        "model": session.plan.model,
        "data": session.plan.data,
        "channel_multiple": session.plan.channel_multiple,
        "warnings": session.plan.warnings,
    }
    write_atomic(folder / "plan.json", json.dumps(plan, indent=1, default=str))
    return path


def _stage_links(ledger: Ledger, folder: Path) -> None:
    """``NN-<stage>/stage.json``: which stored result each stage of this run is."""
    for number, result in enumerate(ledger.results):
        record = {
            "stage": result.stage, "key": result.key, "folder": str(result.folder), "seconds": result.seconds,
            "reused": result.reused, "metrics": dict(result.metrics),
        }  # fmt: skip
        write_atomic(folder / f"{number:02d}-{result.stage}" / "stage.json", json.dumps(record, indent=1))


# -------------------------------------------------------------------- deployment


def _deploy_all(
    session: Session, pipeline: Pipeline, built: Built, ledger: Ledger, folder: Path, log: Event, *, remeasure: bool
) -> tuple[tuple[ProfileOutcome, ...], dict[str, str]]:
    data = evaluation_data(session)
    predictions = PredictionStore(ledger.cache / "predictions")
    outcomes: list[ProfileOutcome] = []
    rejected: dict[str, str] = {}
    for profile in session.profiles:
        variants, not_made = pipeline.variants(built.student, profile)
        rejected.update({f"{profile.name}: {name}": why for name, why in not_made.items()})
        log("deploy", {"text": f"{profile.name}: compiling, measuring and scoring {len(variants) + 1} candidates"})
        outcomes.append(_deploy(session, built, variants, profile, data, predictions, folder, log, remeasure=remeasure))
    return tuple(outcomes), rejected


def evaluation_data(session: Session) -> EvaluationData:
    """Validation for choosing, test for the report, and real samples of batch 1 for latency."""
    teacher = _evaluation_data(session, session.original[1]) if session.original else None
    return replace(_evaluation_data(session, session.data), teacher=teacher)


def _evaluation_data(session: Session, data: DataBundle) -> EvaluationData:
    from compressor.evaluate import SplitEvalSet
    from targets.trial import EvaluationData

    validation = data.splits["validation"]
    count = 16 if early_exits(session.recipe) is None else 64  # which exit a sample takes decides what it costs
    step = max(1, len(validation) // count)
    samples = tuple(validation.batch(np.array([index])) for index in range(0, len(validation), step))[:count]
    return EvaluationData(
        task=session.model.task,
        validation=SplitEvalSet(validation),
        test=SplitEvalSet(data.splits["test"]),
        labels=data.labels,
        latency_inputs=samples,
        simulated=session.recipe.data.simulated,
        simulated_test=session.recipe.data.simulated_test,
    )


def _deploy(
    session: Session,
    built: Built,
    variants: Sequence[Any],
    profile: HardwareProfile,
    data: EvaluationData,
    predictions: MutableMapping[str, Array],
    folder: Path,
    log: Event,
    *,
    remeasure: bool,
) -> ProfileOutcome:
    """One profile; an outcome of the same artifacts, profile, machine and versions is read back, not made again."""
    from compressor.machine import facts
    from targets.deploy import Candidates, deploy
    from targets.outcome import Promise
    from targets.registry import get
    from targets.remote import attach, parse_devices
    from targets.report.serialise import read_outcome, write_outcome

    promise = Promise(**session.recipe.accept.model_dump())
    candidates = Candidates(built.teacher, built.null_twin, built.student, tuple(variants))
    files = [item.digest for item in (built.teacher, built.null_twin, built.student, *variants) if item is not None]
    key = digest_of(
        {
            "files": files,
            "profile": profile.model_dump(mode="json"),
            "promise": vars(promise),
            "data": {name: session.data.digests[name] for name in ("validation", "test")},
            "simulated": [session.recipe.data.simulated, session.recipe.data.simulated_test],
            "device": session.request.device_of(profile.name),
            "machine": {name: value for name, value in facts().items() if name not in VOLATILE},
            "code": code_digest("evaluate", "types"),
            "targets": _targets_digest(),
        }
    )
    out = folder / "targets" / profile.name
    stored = out / "outcome.json"
    if not remeasure and (found := read_outcome(stored, key)) is not None:
        log("stage-done", {"stage": f"deploy {profile.name}", "key": key[:16], "reused": True, "seconds": 0.0})
        return found
    out.mkdir(parents=True, exist_ok=True)
    backend = attach(get(profile.target), profile, parse_devices(session.request.devices))
    outcome = deploy(profile, backend, candidates, data, promise, out, cache=predictions, on_event=log)
    write_outcome(stored, outcome, key)
    return outcome


VOLATILE = frozenset({"load", "load_average", "load average", "free_memory"})


def _targets_digest() -> str:
    """Digest of the measuring and back-end code: a changed back end measures again."""
    import hashlib

    root = Path(__file__).parents[2] / "targets"
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        if path.parent.name not in {"report", "package"}:
            digest.update(path.read_bytes())
    return digest.hexdigest()


# -------------------------------------------------------------------- report and packages


def summarise(
    session: Session,
    digest: str,
    built: Built,
    ledger: Ledger,
    outcomes: tuple[ProfileOutcome, ...],
    rejected: Mapping[str, str],
    proof: PairedSeeds | None = None,
    pairs: Sequence[Pair] = (),
) -> RunSummary:
    """All that the report shows, as one frozen value."""
    from compressor.evaluate import metric_name
    from compressor.machine import facts
    from targets.outcome import DataFacts, ParityRow, RunSummary

    model, data = session.model, session.data
    teacher = {
        "source": model.provenance.source,
        "digest": model.provenance.digest,
        "licence": model.provenance.licence or "unknown",
        "revision": model.provenance.revision or "none",
    }
    sizes = {name: len(split) for name, split in data.splits.items()}
    return RunSummary(
        name=session.recipe.name,
        digest=digest,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=" ".join(["compress-for-device", *sys.argv[1:]]),
        task=model.task,
        metric=metric_name(model.task, data.labels),
        recipe=session.recipe.model_dump(mode="json"),
        seed=session.recipe.seed,
        machine=facts(),
        versions=versions(),
        teacher=teacher,
        data=DataFacts(data.source, sizes, dict(data.digests), data.duplicates_dropped, data.notes),
        stages=tuple(ledger.results),
        parity=tuple(ParityRow(**vars(row)) for row in built.parity),
        outcomes=outcomes,
        rejected=dict(rejected),
        warnings=session.plan.warnings,
        integrity=findings(session, outcomes, ledger.results, [pair.stages for pair in pairs[1:]]),
        teachers=tuple(item.facts() for item in session.panel.teachers) if session.panel is not None else (),
        paired_seeds=proof,
    )


def versions() -> dict[str, str]:
    """Versions of everything that shapes a result."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for package in ("compress-for-device", "torch", "transformers", "optimum", "onnx", "onnxruntime", "nncf", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def publish(session: Session, summary: RunSummary, folder: Path) -> dict[str, Any]:
    """Write report and packages; the paths by name."""
    from targets.report import write_report

    files = write_report(summary, folder)
    packages = write_packages(summary, folder, package_info(session), known=session.profiles)
    return {
        "report_html": str(files["html"]),
        "report_md": str(files["md"]),
        "report_json": str(files["json"]),
        "packages": packages,
    }


def package_info(session: Session) -> Any:
    """What a package needs besides the outcome: pre-processing as data, files, labels, samples for its self-check."""
    from targets.package import PackageInfo

    validation, examples = session.data.splits["validation"], session.data.examples
    index = np.arange(min(len(examples) or 4, len(validation)))
    return PackageInfo(
        preprocess=session.model.preprocess.model_dump(mode="json"),
        files=session.model.files,
        labels=session.data.labels,
        samples=[validation.batch(index[position : position + 1]) for position in index],
        raw=examples,
    )


def write_packages(
    summary: RunSummary,
    folder: Path,
    info: Any,
    profiles: Sequence[str] = (),
    platforms: Sequence[str] = (),
    known: Sequence[HardwareProfile] = (),
) -> dict[str, str]:
    """One package per profile that ships something, with the sample programs of ``platforms``, or of the profile."""
    from targets.package import write_package

    made: dict[str, str] = {}
    for outcome in summary.outcomes:
        if outcome.shipped is not None and (not profiles or outcome.profile in profiles):
            profile = next((item for item in known if item.name == outcome.profile), None)
            if profile is None and outcome.profile in profile_names():
                profile = load_profile(outcome.profile)
            runtime = profile.runtime.model_dump() if profile is not None else None
            wanted = platforms or (profile.package.platforms if profile is not None else ())
            path = write_package(outcome, summary, info, folder / "packages", runtime=runtime, platforms=wanted)
            made[outcome.profile] = str(path)
    return made


def require_run(folder: Path) -> Path:
    """A run folder's report.json, or a clear error."""
    path = folder / "report.json" if folder.is_dir() else folder
    if not path.is_file():
        raise ConfigError.single(
            f"`{folder}`", "RUN", "is not a run folder (no report.json)", hint="Runs lie in build/runs/."
        )
    return path
