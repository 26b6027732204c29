"""ONNX Runtime's CPU provider: threads, graph level, arena from the profile; the portable ``.onnx`` is what ships."""

from __future__ import annotations

import json
import re
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from compressor.errors import CompileError, RunError, sdk_errors
from compressor.machine import detect, usable_cores
from compressor.profile import HardwareProfile
from compressor.types import Array, Artifact, Format, Origin
from targets.base import Compiled, Missing, Ready, Session, TargetBackend

PROVIDER = "CPUExecutionProvider"
LEVELS = {
    "disabled": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
OPTIONS = frozenset({"denormal_as_zero"})  # keys of a profile's [options]; the runtime itself swallows unknown ones
ERRORS_ONLY = 3  # log severity: warnings about hardware-specific graphs would end up on the user's terminal
PROFILED_RUNS = (3, 30)  # at least and at most; no more than a second of them
_KERNEL = "_kernel_time"
_FUSED_NAME = re.compile(r"(_token_\d+|_nchwc)$")  # what ONNX Runtime adds to the names of nodes it fuses


class OnnxRuntimeCpu(TargetBackend):
    """Runs on this machine; for a device that is elsewhere the same runtime here is a stand-in for accuracy."""

    name: ClassVar[str] = "onnxruntime-cpu"
    accepts: ClassVar[frozenset[Format]] = frozenset({Format.ONNX})
    summary: ClassVar[str] = "ONNX Runtime on a CPU (x86-64, Arm): portable .onnx, int8 through QDQ"

    def probe(self) -> Ready | Missing:
        """Importing is all it takes; the provider list says whether the CPU provider is in this build."""
        try:
            import onnx
            import onnxruntime
        except ImportError as error:
            return Missing(
                reason=f"{error.name or 'onnxruntime'} is not installed", hint="pip install onnxruntime onnx"
            )
        if PROVIDER not in onnxruntime.get_available_providers():
            return Missing(reason=f"this ONNX Runtime has no {PROVIDER}", hint="Install the plain onnxruntime wheel.")
        versions = {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}
        return Ready(device=detect().processor, versions=versions, runs=Origin.MEASURED)

    def check(self, artifact: Artifact, profile: HardwareProfile) -> tuple[str, ...]:  # noqa: ARG002
        """Wrong options of the profile; what the runtime cannot load shows when compiling, which is as cheap."""
        unknown = sorted(set(profile.options) - OPTIONS)
        return tuple(
            f"options.{key}: unknown option of {self.name}; known: {', '.join(sorted(OPTIONS))}" for key in unknown
        )

    def deciding_options(self, compiled: Compiled, profile: HardwareProfile) -> Mapping[str, Any]:  # noqa: ARG002
        """Shapes are free: no length is padded to."""
        return dict(profile.options)

    def compile(self, artifact: Artifact, profile: HardwareProfile, out: Path) -> Compiled:
        """Load the file with graph optimisation; kernel coverage is read from the graph saved in ``out``."""
        import onnx

        from targets.coverage import kernel_coverage, node_count

        if problems := self.check(artifact, profile):
            raise CompileError("; ".join(problems), hint="Mend the profile's [options].")
        started = time.perf_counter()
        out.mkdir(parents=True, exist_ok=True)
        optimised = out / f"{artifact.name.replace('/', '-')}.optimised.onnx"
        with sdk_errors(
            CompileError, f"load `{artifact.name}` in ONNX Runtime", hint="Is the file a valid ONNX model?"
        ):
            external = _external_files(artifact.path)
            open_session(artifact.path, profile, save_to=optimised)
            model = onnx.load(str(optimised), load_external_data=False)
        return Compiled(
            path=artifact.path,
            artifact=artifact,
            placed=node_count(model),
            coverage=kernel_coverage(model),
            compile_seconds=time.perf_counter() - started,
            notes=_notes(profile),
            extra_files=external,
        )

    @contextmanager
    def open(self, compiled: Compiled, profile: HardwareProfile) -> Iterator[Session]:
        """Load the portable file; the provider that was asked for must be the one that is used."""
        with sdk_errors(RunError, f"load `{compiled.path.name}` in ONNX Runtime"):
            session = open_session(compiled.path, profile)
        yield OrtSession(session)

    def node_times(
        self, compiled: Compiled, profile: HardwareProfile, inputs: Mapping[str, Array]
    ) -> Mapping[str, tuple[str, float]]:
        """See :class:`targets.dearest.TimesNodes`: ONNX Runtime's profiler."""
        with tempfile.TemporaryDirectory() as folder, sdk_errors(RunError, f"profile `{compiled.path.name}`"):
            session = open_session(compiled.path, profile, profile_to=Path(folder) / "profile")
            started, runs = time.perf_counter(), 0
            while runs < PROFILED_RUNS[0] or (runs < PROFILED_RUNS[1] and time.perf_counter() - started < 1):
                session.run(None, dict(inputs))
                runs += 1
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        taken: dict[str, list[float]] = {}
        operators: dict[str, str] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
                name = _FUSED_NAME.sub("", event["name"].removesuffix(_KERNEL))
                taken.setdefault(name, []).append(event["dur"] / 1000)
                operators[name] = event["args"]["op_name"]
        return {name: (operators[name], statistics.median(times)) for name, times in taken.items()}


class OrtSession:
    """One loaded model."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._names = [output.name for output in session.get_outputs()]
        self._errors = _error_types()

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Every output by name. The ``try`` costs nothing while nothing fails: this call is what gets timed."""
        try:
            return dict(zip(self._names, self._session.run(None, inputs), strict=True))
        except self._errors as error:
            raise RunError(f"could not run the model: {type(error).__name__}: {error}") from error


def _error_types() -> tuple[type[Exception], ...]:
    """ONNX Runtime's exceptions share no base class of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    found = (value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception))
    return (*found, ValueError, RuntimeError, TypeError)


def open_session(
    path: Path, profile: HardwareProfile, save_to: Path | None = None, profile_to: Path | None = None
) -> Any:
    """A bare ``InferenceSession`` set up as the profile says; saves the graph it runs to ``save_to``, and times of its
    nodes to files that start with ``profile_to``."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.intra_op_num_threads = _threads(profile)
    options.inter_op_num_threads = 1
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, LEVELS[profile.runtime.graph_level])
    options.enable_cpu_mem_arena = profile.runtime.arena
    for key, value in session_entries(profile).items():
        options.add_session_config_entry(key, value)
    if profile_to is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile_to)
    if save_to is not None:
        options.optimized_model_filepath = str(save_to)
    session = onnxruntime.InferenceSession(str(path), options, providers=[PROVIDER])
    if session.get_providers() != [PROVIDER]:  # unknown providers only warn and fall back
        raise RunError(f"ONNX Runtime chose {session.get_providers()} instead of {PROVIDER}")
    return session


def session_entries(profile: HardwareProfile) -> dict[str, str]:
    """Session configuration entries, here and on an attached device."""
    return {
        "session.intra_op.allow_spinning": "1",
        # Threads stop spinning when a run ends: an idle session must not slow the next of an interleaved measurement.
        "session.force_spinning_stop": "1",
        "session.set_denormal_as_zero": str(int(profile.options.get("denormal_as_zero", 0))),
    }


def _threads(profile: HardwareProfile) -> int:
    """The profile's threads; on a stand-in never more than it has cores, threads do not change results there."""
    wanted = profile.runtime.threads
    return wanted if profile.here == "this-machine" else min(wanted, usable_cores())


def _notes(profile: HardwareProfile) -> tuple[str, ...]:
    if profile.here == "this-machine" and profile.runtime.threads > usable_cores():
        return (f"{profile.runtime.threads} threads on {usable_cores()} usable cores: expect contention",)
    return ()


def _external_files(path: Path) -> tuple[Path, ...]:
    """Weight files beside the model. A location that leaves the model's folder is refused."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    model = onnx.load(str(path), load_external_data=False)
    names = {ExternalDataInfo(t).location for t in model.graph.initializer if uses_external_data(t)}
    folder = path.parent.resolve()
    files = tuple(sorted(folder / name for name in names))
    for file in files:
        if not file.resolve().is_relative_to(folder):
            raise CompileError(f"`{path.name}` keeps weights outside its folder: {file}", hint="Save it in one folder.")
    return files
