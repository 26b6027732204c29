"""The back end ``executorch``: ``.pte`` programs for the XNNPACK delegate, lowered and run by the tool chain.

The runtime and its exporter live in a process of their own; its worker times each run beside the model, so that neither
the pipe nor the files in between are in the figures.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from compressor.config import Frozen, validate
from compressor.errors import CompileError, RunError
from compressor.machine import detect, usable_cores
from compressor.profile import HardwareProfile
from compressor.types import Array, Artifact, Format, Origin
from targets import toolchain
from targets.base import Compiled, Coverage, Missing, NodeFact, Ready, Session, TargetBackend, option_problems
from targets.graph_file import save_graph
from targets.isolation import Limits
from targets.static_graph import fixed_shapes, read_static
from targets.static_session import StaticSession
from targets.toolchain_session import Worker, exchange, open_worker

TOOLCHAIN = "executorch"
_WHAT = "ExecuTorch"


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
        if not toolchain.is_ready(TOOLCHAIN):
            return Missing(f"tool chain {TOOLCHAIN} is {toolchain.status(TOOLCHAIN).state}", toolchain.hint(TOOLCHAIN))
        pins = toolchain.find(TOOLCHAIN).pins()
        versions = {name: pins[name] for name in ("executorch", "torch")}
        return Ready(detect().processor, versions, runs=Origin.MEASURED)

    def check(self, artifact: Artifact, profile: HardwareProfile) -> tuple[str, ...]:  # noqa: ARG002
        """Wrong options of the profile; an operator without a form in torch shows when compiling."""
        return option_problems(options_of, profile)

    def compile(self, artifact: Artifact, profile: HardwareProfile, out: Path) -> Compiled:
        """Write ``.pte`` with the profile's batch and ``options.max_sequence`` as fixed shapes."""
        if problems := self.check(artifact, profile):
            raise CompileError("; ".join(problems), hint="Mend the profile's [options].")
        started, options = time.perf_counter(), options_of(profile)
        shapes = fixed_shapes(artifact.inputs, profile.runtime.batch, profile.runtime.sequence(options.max_sequence))
        graph = read_static(artifact.path, shapes)
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{artifact.name.replace('/', '-')}.pte"
        with tempfile.TemporaryDirectory(prefix="compress-executorch-") as scratch:
            file = Path(scratch) / "graph.npz"
            save_graph(graph, file)
            request = {"action": "compile", "graph": str(file), "pte": str(path.resolve())}
            reply = toolchain.call(TOOLCHAIN, request, _limits(options), f"{_WHAT} on `{artifact.name}`")
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
        """Load the program in ExecuTorch's runtime, in a process of the tool chain that stays."""
        if not compiled.path.is_file():
            raise RunError(f"`{compiled.path}` does not exist")
        options, artifact = options_of(profile), compiled.artifact
        shapes = fixed_shapes(artifact.inputs, profile.runtime.batch, profile.runtime.sequence(options.max_sequence))
        request = {
            "action": "open",
            "pte": str(compiled.path.resolve()),
            "inputs": shapes,
            "outputs": [spec.name for spec in artifact.outputs],
            "threads": profile.runtime.threads
            if profile.here == "this-machine"
            else min(profile.runtime.threads, usable_cores()),
        }
        with open_worker(TOOLCHAIN, _limits(options), _WHAT) as worker, tempfile.TemporaryDirectory() as folder:
            worker.ask(request)
            yield ExecuTorchSession(artifact, shapes, worker, Path(folder))


class ExecuTorchSession(StaticSession):
    """Runs go to the worker; their times and its memory come from there."""

    def __init__(self, artifact: Artifact, shapes: Mapping[str, tuple[int, ...]], worker: Worker, folder: Path) -> None:
        super().__init__(artifact, shapes, lambda inputs: exchange(worker, folder, inputs), stacked=True)
        self._worker, self._file = worker, folder / "timed.npz"
        self._written: Mapping[str, Array] | None = None  # the inputs that lie in the file

    def times_ns(self, inputs: Mapping[str, Array], count: int) -> Sequence[int]:
        """Time of each of ``count`` runs in the worker, in ns, arrays in and arrays out."""
        if inputs is not self._written:
            arrays: dict[str, Any] = dict(self.fitted(inputs))
            np.savez(self._file, **arrays)
            self._written = inputs
        reply = self._worker.ask({"action": "times", "inputs": str(self._file), "count": count})
        return [int(value) for value in reply["times"]]

    def resident_mib(self) -> tuple[float, float]:
        """Of the worker: before it loaded the program, and at most."""
        reply = self._worker.ask({"action": "memory"})
        return float(reply["baseline_mib"]), float(reply["peak_mib"])


def _limits(options: ExecuTorchOptions) -> Limits:
    return Limits(options.timeout_s, options.memory_limit_mib)


def _coverage(reply: Mapping[str, Any]) -> Coverage:
    left = tuple(NodeFact(item["name"], item["operator"], False, item["reason"]) for item in reply["left_float"])
    return Coverage(int(reply["quantized"]), int(reply["quantized"]) + len(left), left)


def _delegation(reply: Mapping[str, Any]) -> str:
    outside = reply["outside"]
    told = ", ".join(f"{count} {name}" for name, count in sorted(outside.items())) or "nothing"
    return f"{reply['delegated']} operations in {reply['delegates']} XNNPACK delegates; in portable kernels: {told}"
