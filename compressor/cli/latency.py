"""``profile``: latency, memory and kernel coverage of an ONNX file on device profiles. No data, no training."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compressor.budgets import budgets_of, measured_here
from compressor.cli.devices import check_devices
from compressor.cli.output import stdout_json, table
from compressor.errors import CompressError, TargetUnavailable
from compressor.profile import HardwareProfile, load_profile
from compressor.recipe import PruneStage, Recipe
from compressor.types import Artifact, Figure, Format, Measurement, Origin, Unavailable, file_digest


def profile_command(model: Path, names: Sequence[str], devices: Sequence[str], *, as_json: bool) -> int:
    """Measure on every profile; exit code 4 when a target is missing here."""
    artifact = artifact_of(model)
    profiles = [load_profile(name) for name in names]
    check_devices(devices, profiles)
    found = [measure_profile(artifact, profile, devices) for profile in profiles]
    code = TargetUnavailable.exit_code if any(item.get("missing") for item in found) else 0
    if as_json:
        stdout_json([{**item, "latency": _plain(item["latency"]), "memory": _plain(item["memory"])} for item in found])
        return code
    rows = [
        [
            item["profile"],
            _text(item["latency"]),
            _detail(item["latency"]),
            _text(item["memory"]),
            item["coverage"],
            item["note"],
        ]
        for item in found
    ]
    table(
        ["profile", "p50", "p90 / p95 / p99", "peak memory", "int8 kernels", "note"],
        rows,
        f"{model} ({model.stat().st_size / 2**20:.2f} MiB)",
    )
    return code


def artifact_of(path: Path) -> Artifact:
    """An ONNX file as an artifact; a broken or hostile file is a clear error."""
    from compressor.models import load_model
    from compressor.recipe import TeacherConfig

    loaded = load_model(TeacherConfig(model=str(path), task="generic"))
    return Artifact(
        path.stem,
        "student",
        path,
        Format.ONNX,
        "as given",
        loaded.inputs,
        loaded.outputs,
        file_digest(path),
        parameters=0,
    )


def measure_profile(artifact: Artifact, profile: HardwareProfile, devices: Sequence[str] = ()) -> dict[str, Any]:
    """One profile's figures; what cannot be had says why."""
    from targets.base import Missing
    from targets.registry import get
    from targets.remote import attach, parse_devices

    backend = attach(get(profile.target), profile, parse_devices(devices))
    result: dict[str, Any] = {
        "profile": profile.name,
        "target": profile.target,
        "coverage": "-",
        "note": "",
        "missing": "",
    }
    state = backend.probe()
    if isinstance(state, Missing):
        gone = Unavailable(state.reason, state.hint)
        return {**result, "latency": gone, "memory": gone, "missing": state.reason, "note": state.hint}
    with tempfile.TemporaryDirectory() as folder:
        try:
            compiled = backend.compile(artifact, profile, Path(folder))
            if compiled.coverage is not None:
                result["coverage"] = f"{compiled.coverage.quantized} of {compiled.coverage.total}"
            result["note"] = "; ".join([*compiled.notes, f"compiled in {compiled.compile_seconds:.1f} s"])
            latency, memory = _figures(backend, compiled, profile, state)
        except CompressError as error:
            latency = memory = Unavailable(str(error), error.hint)
    return {**result, "latency": latency, "memory": memory}


def _figures(backend: Any, compiled: Any, profile: HardwareProfile, state: Any) -> tuple[Figure, Figure]:
    if state.runs is None:
        gone = Unavailable(state.why_not or "compiled, cannot run here")
        return gone, gone
    if state.runs is not Origin.MEASURED:
        gone = Unavailable(f"{backend.name} gives {state.runs.value} results: it is not timed")
        return gone, gone
    if profile.here != "this-machine" and not state.attached:
        gone = Unavailable(
            f"no {profile.name} is attached to this machine",
            "Attach it: --device PROFILE=ssh://user@host, or use `--profile this-machine` there.",
        )
        return gone, gone
    from targets.measure import measure
    from targets.memory import peak_memory
    from targets.plausible import random_inputs
    from targets.trial import timed_run

    batches = [random_inputs(compiled.artifact.inputs, profile, seed) for seed in range(4)]
    with backend.open(compiled, profile) as session:
        measured = measure({"model": timed_run(session, batches)}, "model", inputs=len(batches))
    timing = measured.timings["model"]
    detail: dict[str, float | int | str] = {
        "p90": timing.p90_ms, "p95": timing.p95_ms, "p99": timing.p99_ms, "mean": timing.mean_ms,
        "ci95_low": timing.ci95_low_ms, "ci95_high": timing.ci95_high_ms, "rounds": timing.rounds,
        "samples": timing.samples,
        "threads": profile.runtime.threads, "batch": profile.runtime.batch,
        "contention": measured.contention.describe(),
    }  # fmt: skip
    latency = Measurement(timing.p50_ms, "ms", state.runs, state.device, detail)
    if backend.memory_apart:
        return latency, Unavailable(backend.memory_apart)
    return latency, peak_memory(backend.name, compiled, profile, batches[:1])


def _text(figure: Figure) -> str:
    if isinstance(figure, Unavailable):
        return f"unavailable: {figure.reason}"
    return f"{figure.value:.3g} {figure.unit} ({figure.origin.value}, {figure.device})"


def _detail(figure: Figure) -> str:
    if isinstance(figure, Unavailable):
        return "-"
    return " / ".join(f"{float(figure.detail[name]):.3g}" for name in ("p90", "p95", "p99"))


def _plain(figure: Figure) -> dict[str, Any]:
    if isinstance(figure, Unavailable):
        return {"unavailable": figure.reason, "hint": figure.hint}
    return {
        "value": figure.value,
        "unit": figure.unit,
        "origin": figure.origin.value,
        "device": figure.device,
        **figure.detail,
    }


def layer_cost(recipe: Recipe, profile: HardwareProfile) -> tuple[str, Callable[[Any], float]] | None:
    """Measured latency of layers where a profile is this machine's CPU, for cuts and searches by latency; else None."""
    from targets.layer_cost import LayerCost

    wanted = any(
        isinstance(stage, PruneStage) and stage.target_speedup is not None and stage.cost == "auto"
        for stage in recipe.stage
    )
    wanted = wanted or any(budget.latency_ms is not None for _, budget in budgets_of(recipe))
    if not wanted or not measured_here(profile):
        return None
    threads = profile.runtime.threads
    return f"ONNX Runtime, {profile.name}, {threads} threads", LayerCost(threads)
