"""Arm Ethos-U55, U65 and U85: the student's int8 file as TFLite, compiled by Vela; accuracy by the reference kernels.

No NPU is needed and none is simulated: Vela's command stream is not executed here. Arm holds Vela to bit-equality with
TFLite's reference kernels, so these run the very file that Vela read; figures from them are ``simulated``. Latency is
Vela's cycle model and only that: ``estimated``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any, ClassVar

from compressor.errors import CompileError, RunError, sdk_errors
from compressor.profile import HardwareProfile
from compressor.types import Artifact, Format, Origin
from targets import toolchain
from targets.backends.ethos_u.compiler import TOOLCHAIN, estimates, over_limits, run_vela, vela_version
from targets.backends.ethos_u.options import options_of
from targets.base import Compiled, Missing, OverLimit, Ready, Session, TargetBackend, option_problems
from targets.static_session import StaticSession
from targets.tflite.convert import Converted
from targets.tflite.export import export_int8, float_operations
from targets.tflite.unary import FLOAT_HARD_SWISH

_SUFFIX = "_vela.tflite"
FLOAT = OverLimit("none of it runs on the NPU, which takes int8 only", 1.0)


class EthosU(TargetBackend):
    """Vela for the file, LiteRT's reference kernels for its answers."""

    name: ClassVar[str] = "ethos-u"
    accepts: ClassVar[frozenset[Format]] = frozenset({Format.ONNX})
    summary: ClassVar[str] = "Arm Ethos-U55, U65, U85 through Vela: compiled, estimated; accuracy by reference kernels"

    def probe(self) -> Ready | Missing:
        try:
            reference = version_of("ai-edge-litert")
        except PackageNotFoundError:
            return Missing("ai-edge-litert is not installed", "pip install 'compress-for-device[litert]'")
        vela = vela_version()
        if vela is None:
            return Missing("Vela is not installed", toolchain.hint(TOOLCHAIN))
        versions = {"ethos-u-vela": vela, "ai-edge-litert": reference}
        return Ready("TFLite reference kernels", versions, runs=Origin.SIMULATED)

    def check(self, artifact: Artifact, profile: HardwareProfile) -> tuple[str, ...]:  # noqa: ARG002
        """Wrong options of the profile; what Vela cannot place shows in the compiled file."""
        return option_problems(options_of, profile)

    def compile(self, artifact: Artifact, profile: HardwareProfile, out: Path) -> Compiled:
        """Write ``.tflite`` and compile it to ``_vela.tflite``.

        A float file is written, and scored as the baseline, but not given to Vela, which would leave all of it to the
        CPU and call the time 0.
        """
        if problems := self.check(artifact, profile):
            raise CompileError("; ".join(problems), hint="Mend the profile's [options].")
        options, started = options_of(profile), time.perf_counter()
        size: dict[str, int] = {
            "batch": profile.runtime.batch,
            "sequence": profile.runtime.sequence(options.max_sequence),
        }
        path, converted = export_int8(artifact, out, **size, absent=frozenset({FLOAT_HARD_SWISH}))
        if not any("int8" in {tensor.type for tensor in operation.inputs} for operation in converted.operations):
            return self._unplaced(artifact, path, converted, time.perf_counter() - started)
        made = run_vela(path, profile)
        placed = len(converted.operations) - len(made.fallback)
        over = over_limits(made, options)
        if placed <= 0:
            return self._unplaced(artifact, path, converted, time.perf_counter() - started)
        return Compiled(
            path=made.path,
            artifact=artifact,
            placed=placed,
            fallback=made.fallback,
            estimates=estimates(made, profile, placed),
            coverage=converted.coverage,
            compile_seconds=time.perf_counter() - started,
            notes=_notes(converted),
            source_files=(made.configuration,),
            over=over,
        )

    def _unplaced(self, artifact: Artifact, path: Path, converted: Converted, seconds: float) -> Compiled:
        return Compiled(
            path=path,
            artifact=artifact,
            placed=0,
            fallback=tuple(f"{item.operator} {item.outputs[0].name}" for item in converted.operations),
            coverage=converted.coverage,
            compile_seconds=seconds,
            over=(replace(FLOAT),),
        )

    def deciding_options(self, compiled: Compiled, profile: HardwareProfile) -> Mapping[str, Any]:
        """Neither the accelerator nor its memories change an answer of the kernels that stand in for it."""
        sequence = profile.runtime.sequence(options_of(profile).max_sequence)
        return {"max_sequence": sequence, "exact": source_of(compiled.path) != compiled.path}

    @contextmanager
    def open(self, compiled: Compiled, profile: HardwareProfile) -> Iterator[Session]:  # noqa: ARG002
        """The int8 file that Vela read, in LiteRT's reference kernels; a float file in its optimised ones."""
        from targets.tflite.reference import ReferenceCall

        with sdk_errors(RunError, f"load `{compiled.path.name}` in LiteRT's reference kernels"):
            source = source_of(compiled.path)
            call = ReferenceCall(source, exact=source != compiled.path)
            session = StaticSession(compiled.artifact, call.shapes, call)
        yield session


def source_of(path: Path) -> Path:
    """The un-optimised file beside a compiled one."""
    return path.with_name(path.name.removesuffix(_SUFFIX) + ".tflite") if path.name.endswith(_SUFFIX) else path


def _notes(converted: Converted) -> tuple[str, ...]:
    left = float_operations(converted)
    told = (
        f"{len(left)} operations touch float tensors: {', '.join(left[:8])}" if left else "no float tensor in the file"
    )
    return (told + ".", "Vela's command stream was not executed: accuracy is that of the file it read.")
