"""The back end ``executorch``: ``.pte`` programs for the XNNPACK delegate, lowered in a child process, run here."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from compressor.config import Frozen, validate
from compressor.errors import CompileError, RunError, sdk_errors
from compressor.machine import detect, usable_cores
from compressor.profile import HardwareProfile
from compressor.types import Array, Artifact, Format, Origin
from targets.base import Compiled, Coverage, Missing, NodeFact, Ready, Session, TargetBackend, option_problems
from targets.isolation import Limits, call_worker
from targets.static_graph import fixed_shapes
from targets.static_session import StaticSession

INSTALL = "pip install 'compress-for-device[executorch]'"
_COMMAND = ("-m", "targets.backends.executorch.worker")


class ExecuTorchOptions(Frozen):
    """The ``[options]`` of a profile."""

    max_sequence: Annotated[int, Field(ge=1)] = 128  # the program has fixed shapes: length of a free sequence dimension
    timeout_s: Annotated[float, Field(gt=0)] = (
        900  # importing the exporter alone takes up to a minute on a busy machine
    )
    memory_limit_mib: Annotated[float, Field(gt=0)] = 8192


def options_of(profile: HardwareProfile) -> ExecuTorchOptions:
    """Raises :class:`ConfigError` for unknown keys and values."""
    return validate(ExecuTorchOptions, dict(profile.options), f"profile `{profile.name}`, options")


class ExecuTorch(TargetBackend):
    """ExecuTorch programs, executed on this machine; for a phone the same runtime here stands in for accuracy."""

    name: ClassVar[str] = "executorch"
    accepts: ClassVar[frozenset[Format]] = frozenset({Format.ONNX})
    summary: ClassVar[str] = "ExecuTorch with XNNPACK on a CPU (Android, iOS, Arm, x86-64): .pte files, int8 from QDQ"

    def probe(self) -> Ready | Missing:
        """By name only: importing ExecuTorch takes many seconds, and that is paid when a program is made or run."""
        for package in ("executorch", "torch", "torchao"):
            if importlib.util.find_spec(package) is None:
                return Missing(reason=f"{package} is not installed", hint=INSTALL)
        try:
            versions = {name: version_of(name) for name in ("executorch", "torch")}
        except PackageNotFoundError as error:
            return Missing(reason=f"{error.name} is not installed as a package", hint=INSTALL)
        return Ready(detect().processor, versions, runs=Origin.MEASURED)

    def check(self, artifact: Artifact, profile: HardwareProfile) -> tuple[str, ...]:  # noqa: ARG002
        """Wrong options of the profile; an operator without a form in torch shows when compiling."""
        return option_problems(options_of, profile)

    def compile(self, artifact: Artifact, profile: HardwareProfile, out: Path) -> Compiled:
        """Write ``.pte`` with the profile's batch and ``options.max_sequence`` as fixed shapes."""
        if problems := self.check(artifact, profile):
            raise CompileError("; ".join(problems), hint="Mend the profile's [options].")
        started = time.perf_counter()
        options = options_of(profile)
        shapes = fixed_shapes(artifact.inputs, profile.runtime.batch, options.max_sequence)
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{artifact.name.replace('/', '-')}.pte"
        request = {"onnx": str(artifact.path.resolve()), "pte": str(path.resolve()), "shapes": shapes}
        limits = Limits(options.timeout_s, options.memory_limit_mib)
        reply = call_worker(_COMMAND, request, limits, "the ExecuTorch lowering")
        if not reply["ok"]:
            raise CompileError(
                f"ExecuTorch refused `{artifact.name}`: {reply['error']}",
                hint=reply.get("hint") or "docs/targets/executorch.md lists the operators that have a form in torch.",
            )
        return Compiled(
            path=path,
            artifact=artifact,
            placed=int(reply["delegated"]),
            coverage=_coverage(reply),
            compile_seconds=time.perf_counter() - started,
            notes=(f"fixed shapes: {shapes}", _delegation(reply)),
        )

    @contextmanager
    def open(self, compiled: Compiled, profile: HardwareProfile) -> Iterator[Session]:
        """Load the program in ExecuTorch's runtime."""
        threads = (
            profile.runtime.threads if profile.here == "this-machine" else min(profile.runtime.threads, usable_cores())
        )
        options = options_of(profile)
        shapes = fixed_shapes(compiled.artifact.inputs, profile.runtime.batch, options.max_sequence)
        with sdk_errors(RunError, f"load `{compiled.path.name}` in ExecuTorch"):
            call = ExecuTorchCall(compiled, threads)
            session = StaticSession(compiled.artifact, shapes, call)
        yield session


def _coverage(reply: Mapping[str, Any]) -> Coverage:
    left = tuple(NodeFact(item["name"], item["operator"], False, item["reason"]) for item in reply["left_float"])
    return Coverage(int(reply["quantized"]), int(reply["quantized"]) + len(left), left)


def _delegation(reply: Mapping[str, Any]) -> str:
    outside = reply["outside"]
    told = ", ".join(f"{count} {name}" for name, count in sorted(outside.items())) or "nothing"
    return f"{reply['delegated']} operations in {reply['delegates']} XNNPACK delegates; in portable kernels: {told}"


class ExecuTorchCall:
    """One run of the method ``forward`` over inputs of exactly the program's shapes."""

    def __init__(self, compiled: Compiled, threads: int) -> None:
        if not compiled.path.is_file():
            raise RunError(f"`{compiled.path}` does not exist")
        import torch
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime

        self._torch = torch
        portable_lib._unsafe_reset_threadpool(threads)  # the only way to set its size; there is one for the process
        self._program = Runtime.get().load_program(str(compiled.path))
        self._method = self._program.load_method("forward")
        self._inputs = [spec.name for spec in compiled.artifact.inputs]
        self._outputs = [spec.name for spec in compiled.artifact.outputs]

    def __call__(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        try:
            values = self._method.execute([self._torch.from_numpy(inputs[name]) for name in self._inputs])
            return {name: value.numpy().copy() for name, value in zip(self._outputs, values, strict=True)}
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            raise RunError(f"could not run the model: {type(error).__name__}: {error}") from error
