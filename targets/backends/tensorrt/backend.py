"""The back end ``tensorrt``. What the flavours are and what happens where: README.md in this folder."""

from __future__ import annotations

import functools
import importlib.util
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from compressor.errors import CompileError, RunError, TargetUnavailable
from compressor.profile import HardwareProfile
from compressor.types import Artifact, Format, Origin
from targets.backends.tensorrt import build_kit, layers, lint, options
from targets.backends.tensorrt.builder import MODULES, load_module
from targets.backends.tensorrt.cuda import Gpu, NoGpu, probe_cuda
from targets.backends.tensorrt.engine_file import engine_facts, read_header, write_manifest
from targets.backends.tensorrt.isolation import Limits, call_worker
from targets.base import Compiled, Missing, Ready, Session, TargetBackend

RTX_VERSION = "1.7.1.116"
RTX_INSTALL = (
    f"pip install --only-binary :all: tensorrt-rtx-cu13-libs=={RTX_VERSION} tensorrt-rtx-cu13-bindings=={RTX_VERSION}"
)
ENTERPRISE_INSTALL = "pip install --extra-index-url https://pypi.nvidia.com tensorrt-cu13"
_PROBE_LIMITS = Limits(seconds=60, memory_mib=4096)


@functools.cache
def sdk_version(flavour: options.Flavour) -> str:
    """Version of the installed bindings, asked in a child process. Raises :class:`TargetUnavailable`."""
    hint = RTX_INSTALL if flavour == "rtx" else ENTERPRISE_INSTALL
    if not any(importlib.util.find_spec(name) for name in MODULES[flavour]):
        raise TargetUnavailable(f"{_title(flavour)} is not installed", hint=hint)
    try:
        reply = call_worker({"do": "version", "flavour": flavour}, _PROBE_LIMITS)
    except CompileError as error:
        raise TargetUnavailable(f"{_title(flavour)} does not load: {error}", hint=hint) from error
    if not reply["ok"]:
        raise TargetUnavailable(f"{_title(flavour)} does not load: {reply['error']}", hint=hint)
    return str(reply["version"])


def _title(flavour: str) -> str:
    return "TensorRT-RTX" if flavour == "rtx" else "TensorRT"


@dataclass(frozen=True)
class _Job:
    """One compilation, with everything looked up once."""

    artifact: Artifact
    profile: HardwareProfile
    settings: options.TensorRtOptions
    graph: lint.Graph
    out: Path

    @property
    def shapes(self) -> options.Shapes:
        return options.input_shapes(self.artifact.inputs, options.dimension_ranges(self.settings, self.profile))

    @property
    def sparse(self) -> bool:
        """May the builder take kernels that skip two of four weights, where the weights have that pattern?"""
        return "2:4" in self.profile.sparsity.faster

    @property
    def stem(self) -> str:
        return self.artifact.name.replace("/", "-")

    def request(self, flavour: options.Flavour, capability: str, engine: str) -> dict[str, Any]:
        return {
            "do": "build",
            "flavour": flavour,
            "onnx": str(self.artifact.path.resolve()),
            "engine": engine,
            "workspace_mib": self.settings.workspace_mib,
            "sparse_weights": self.sparse,
            "shapes": self.shapes,
            "compute_capabilities": [capability] if flavour == "rtx" else [],
        }

    def build(self, flavour: options.Flavour, capability: str, engine: str) -> dict[str, Any]:
        """Run the worker; its refusal is a :class:`CompileError` that names the artifact and the stage."""
        limits = Limits(self.settings.timeout_s, self.settings.memory_limit_mib)
        reply = call_worker(self.request(flavour, capability, engine), limits)
        if not reply["ok"]:
            raise CompileError(
                f"{_title(flavour)} refused `{self.artifact.name}` ({reply['stage']}): {reply['error']}",
                hint=_hint(reply["error"]),
            )
        return reply


def _hint(error: str) -> str:
    if "workspace limit" in error:
        return "Raise `options.workspace_mib` of the profile."
    if "no runners" in error:
        return "TensorRT-RTX has no kernel for an operator of this model; enterprise TensorRT may have one."
    return "docs/targets/tensorrt.md lists what TensorRT refuses and how to export around it."


class TensorRt(TargetBackend):
    """TensorRT engines for NVIDIA GPUs (flavours ``rtx`` and ``enterprise``)."""

    name: ClassVar[str] = "tensorrt"
    accepts: ClassVar[frozenset[Format]] = frozenset({Format.ONNX})
    summary: ClassVar[str] = (
        "NVIDIA GPUs: TensorRT-RTX engines built here without a GPU; build kits for enterprise TensorRT"
    )

    def probe(self) -> Ready | Missing:
        gpu = probe_cuda()
        found, reasons = {}, []
        flavours: tuple[options.Flavour, ...] = ("rtx", "enterprise") if isinstance(gpu, Gpu) else ("rtx",)
        for flavour in flavours:
            try:
                found[_title(flavour)] = sdk_version(flavour)
            except TargetUnavailable as error:
                reasons.append(str(error))
        if not found:
            reason = "; ".join(reasons) + (f"; {gpu.reason}" if isinstance(gpu, NoGpu) else "")
            return Missing(reason, f"Run: {RTX_INSTALL}")
        title, version = next(iter(found.items()))
        if isinstance(gpu, NoGpu):
            return Ready(f"{title} builder {version}, no GPU here", found, runs=None, why_not=gpu.reason)
        return Ready(f"{gpu.name} (SM{gpu.capability}), {title} {version}", found, runs=Origin.MEASURED)

    def check(self, artifact: Artifact, profile: HardwareProfile) -> tuple[str, ...]:
        """Refusals known without the vendor's library.

        Raises :class:`ConfigError` for bad ``options`` of the profile.
        """
        settings = options.read_options(profile)
        try:
            return self._problems(artifact, profile, settings, lint.load_graph(artifact.path))
        except CompileError as error:
            return (str(error),)

    def _problems(
        self, artifact: Artifact, profile: HardwareProfile, settings: options.TensorRtOptions, graph: lint.Graph
    ) -> tuple[str, ...]:
        capability = options.capability_number(profile)
        if settings.flavour == "rtx":
            options.rtx_capability(profile)
        declared = {spec.name for spec in artifact.inputs}
        fed = {value.name for value in graph.model.graph.input} - {
            tensor.name for tensor in graph.model.graph.initializer
        }
        unknown = tuple(
            f"input `{name}` of the model is not described by the artifact" for name in sorted(fed - declared)
        )
        dimensions = options.unnamed_dimensions(artifact.inputs, options.dimension_ranges(settings, profile))
        return (*unknown, *dimensions, *lint.problems(graph, capability=capability, flavour=settings.flavour))

    def compile(self, artifact: Artifact, profile: HardwareProfile, out: Path) -> Compiled:
        """Build an engine, or for ``enterprise`` without its GPU a build kit.

        Raises CompileError and TargetUnavailable.
        """
        started = time.perf_counter()
        settings = options.read_options(profile)
        job = _Job(artifact, profile, settings, lint.load_graph(artifact.path), out)
        problems = self._problems(artifact, profile, settings, job.graph)
        if problems:
            listed = "\n".join(f"  {problem}" for problem in problems)
            raise CompileError(f"TensorRT would refuse `{artifact.name}`:\n{listed}", hint=_hint(""))
        if settings.flavour == "rtx":
            sdk_version("rtx")
        out.mkdir(parents=True, exist_ok=True)
        if settings.flavour == "rtx":
            compiled = _compile_engine(job, "rtx", options.rtx_capability(profile))
        else:
            compiled = _compile_enterprise(job)
        return replace(compiled, compile_seconds=time.perf_counter() - started)

    def open(self, compiled: Compiled, profile: HardwareProfile) -> AbstractContextManager[Session]:
        """A session on the GPU of this machine. Raises :class:`RunError` with the reason where there is none."""
        if compiled.path.name == build_kit.MANIFEST:
            raise RunError(
                f"`{compiled.path.parent.name}` is a build kit, its engine is not built",
                hint="Copy the folder to the device and run build.sh there.",
            )
        gpu = probe_cuda()
        if isinstance(gpu, NoGpu):
            raise RunError(
                f"the engine cannot be run here: {gpu.reason}", hint=f"Run it on the GPU of profile `{profile.name}`."
            )
        flavour = read_header(compiled.path).flavour
        from targets.backends.tensorrt.session import open_engine

        try:
            trt = load_module(flavour)
        except ImportError as error:
            raise RunError(f"{_title(flavour)} is not installed: {error}", hint=RTX_INSTALL) from error
        return open_engine(trt, compiled.path, gpu, flavour)


def _compile_engine(job: _Job, flavour: options.Flavour, capability: str) -> Compiled:
    engine = job.out / f"{job.stem}.{capability.lower()}.{'rtx' if flavour == 'rtx' else 'trt'}.engine"
    reply = job.build(flavour, capability, str(engine.resolve()))
    facts = engine_facts(engine)
    table = layers.parse_layers(reply["layers"])
    counts = layers.precision_counts(table)
    builder = f"{_title(flavour)} builder {facts['version']} for {capability}"
    content = {
        "kind": "tensorrt-engine",
        "engine": engine.name,
        "header": facts,
        "targets": [capability],
        "artifact": job.artifact.name,
        "onnx_digest": job.artifact.digest,
        "workspace_mib": job.settings.workspace_mib,
        "shapes": job.shapes,
        "precision_counts": counts,
        "compute_layers": [
            layer.as_json() for layer in table if layer.kind in {*layers.COMPUTE_TYPES, "runtime_fusion"}
        ],
        "validity": _validity(flavour, str(facts["version"])),
    }
    manifest = write_manifest(engine.with_suffix(".json"), content)
    return Compiled(
        path=engine,
        artifact=job.artifact,
        placed=len(job.graph.nodes),  # TensorRT takes the whole graph or refuses it
        estimates=layers.memory_estimates(reply["memory"], builder),
        coverage=layers.coverage(table, job.graph.weighted) if table else None,
        notes=(_validity(flavour, str(facts["version"])), _proof(counts), *_precision_note(job.settings)),
        extra_files=(manifest,),
    )


def _validity(flavour: str, version: str) -> str:
    if flavour == "rtx":
        return f"valid only with TensorRT-RTX {version}"
    return f"valid only with TensorRT {version} on the kind of GPU it was built on"


def _proof(counts: dict[str, int]) -> str:
    if not counts:
        return "the builder wrote no layer table that can be read: precision of the kernels is not proven"
    return "layers by precision, from the builder's table: " + ", ".join(
        f"{count} {kind}" for kind, count in counts.items()
    )


def _precision_note(settings: options.TensorRtOptions) -> tuple[str, ...]:
    if settings.precision in {"fp16", "bf16"}:
        return (f"`options.precision = {settings.precision}` changes nothing: precision stands in the ONNX graph",)
    return ()


def _compile_enterprise(job: _Job) -> Compiled:
    """Build on the spot if this machine has the profile's GPU and the library; a build kit otherwise."""
    gpu = probe_cuda()
    wanted = options.capability_number(job.profile)
    if isinstance(gpu, NoGpu):
        reason = gpu.reason
    elif gpu.capability != wanted:
        reason = f"the GPU here is SM{gpu.capability}, the profile wants SM{wanted}"
    else:
        try:
            sdk_version("enterprise")
        except TargetUnavailable as error:
            reason = str(error)
        else:
            return _compile_engine(job, "enterprise", f"SM{wanted}")
    return _write_kit(job, reason)


def _write_kit(job: _Job, reason: str) -> Compiled:
    findings = _validate_with_rtx(job)
    content = {"artifact": job.artifact.name, "capability": job.profile.compute.capability, "validation": findings}
    folder = job.out / f"{job.stem}.trtkit"
    files = build_kit.write_kit(
        folder, job.artifact.path, job.shapes, job.settings.workspace_mib, content, sparse=job.sparse
    )
    return Compiled(
        path=files[0],
        artifact=job.artifact,
        placed=len(job.graph.nodes),
        notes=(f"build kit: engine not built, because {reason}", *findings, *_precision_note(job.settings)),
        extra_files=files[1:],
    )


def _validate_with_rtx(job: _Job) -> list[str]:
    """Ask the sibling: its parser's refusal is final, its builder's is only worth a note (it has fewer kernels)."""
    try:
        version = sdk_version("rtx")
    except TargetUnavailable as error:
        return [f"not validated: {error}"]
    job.build("rtx", "", "")
    capability = options.nearest_rtx_capability(job.profile)
    findings = [f"validated: the ONNX parser of TensorRT-RTX {version} accepts the model"]
    trial = job.out / f".{job.stem}.validation.engine"
    try:
        reply = job.build("rtx", capability, str(trial.resolve()))
    except CompileError as error:
        return [
            *findings,
            f"the TensorRT-RTX builder for {capability} did not build it (enterprise TensorRT may): {error}",
        ]
    finally:
        trial.unlink(missing_ok=True)
    counts = layers.precision_counts(layers.parse_layers(reply["layers"]))
    return [*findings, f"TensorRT-RTX built it for {capability} as a trial; {_proof(counts)}"]
