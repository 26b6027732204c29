"""The target ``openvino-npu``: NPUs of Intel Core Ultra processors.

The NPU plugin is in every OpenVINO wheel, its compiler is not: the Linux wheels on PyPI leave out the two libraries
in :data:`COMPILER`, the Windows wheel has them. With them a blob is compiled ahead of time, without an NPU; with an NPU
and its driver it runs too. Without them the target is missing, and the reason names the files. Compilation was not run
by this project beyond that refusal.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from compressor.errors import CompileError, RunError, sdk_errors
from compressor.profile import HardwareProfile
from compressor.types import Array, Artifact, Format, Origin
from targets.backends.openvino.cpu import INSTALL, version
from targets.backends.openvino.options import npu_options
from targets.base import Compiled, Missing, Ready, Session, TargetBackend, option_problems
from targets.isolation import Limits, call_worker

COMPILER = ("openvino_intel_npu_compiler", "openvino_intel_npu_compiler_loader")
ARCHIVE = "https://storage.openvinotoolkit.org/repositories/openvino/packages/"
_COMMAND = ("-m", "targets.backends.openvino.npu_worker")


def missing_compiler(libraries: Path) -> tuple[str, ...]:
    """File names of the NPU compiler that are not in OpenVINO's folder of libraries."""
    windows = sys.platform == "win32"
    files = (f"{stem}.dll" if windows else f"lib{stem}.so" for stem in COMPILER)
    return tuple(file for file in files if not (libraries / file).is_file())


class OpenVinoNpu(TargetBackend):
    """Compiles blobs for Intel NPUs where the compiler is installed."""

    name: ClassVar[str] = "openvino-npu"
    accepts: ClassVar[frozenset[Format]] = frozenset({Format.ONNX})
    summary: ClassVar[str] = (
        "Intel NPU (Core Ultra) through OpenVINO: ahead-of-time blobs where its compiler is installed"
    )

    def probe(self) -> Ready | Missing:
        try:
            import openvino
        except ImportError as error:
            return Missing(reason=f"{error.name or 'openvino'} is not installed", hint=INSTALL)
        core = openvino.Core()
        if "NPU" in core.available_devices:
            device = str(core.get_property("NPU", "FULL_DEVICE_NAME"))
            return Ready(device, {"openvino": version()}, runs=Origin.MEASURED)
        libraries = Path(openvino.__file__).parent / "libs"
        if absent := missing_compiler(libraries):
            return Missing(
                reason=f"no Intel NPU here, and OpenVINO {version()} lacks its compiler: {', '.join(absent)} not found",
                hint=f"Copy {' and '.join(absent)} from OpenVINO's toolkit archive of the same release for this system "
                f"({ARCHIVE}, runtime/lib/intel64) into its folder `openvino/libs`; the Windows wheel has them.",
            )
        why = "no Intel NPU in this machine: the blob is compiled, not run"
        return Ready("Intel NPU compiler of OpenVINO", {"openvino": version()}, runs=None, why_not=why)

    def check(self, artifact: Artifact, profile: HardwareProfile) -> tuple[str, ...]:  # noqa: ARG002
        return option_problems(npu_options, profile)

    def compile(self, artifact: Artifact, profile: HardwareProfile, out: Path) -> Compiled:
        """Compile a ``.blob`` in a child process, with static shapes: the profile's batch, ``options.max_sequence``."""
        options = npu_options(profile)
        started = time.perf_counter()
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{artifact.name.replace('/', '-')}.{options.platform.lower()}.blob"
        request = {
            "onnx": str(artifact.path.resolve()),
            "blob": str(path.resolve()),
            "platform": options.platform,
            "shapes": static_shapes(artifact, profile.runtime.batch, profile.runtime.sequence(options.max_sequence)),
        }
        limits = Limits(options.timeout_s, options.memory_limit_mib)
        reply = call_worker(_COMMAND, request, limits, "the NPU compilation")
        if not reply["ok"]:
            raise CompileError(f"OpenVINO's NPU compiler refused `{artifact.name}`: {reply['error']}")
        return Compiled(
            path=path,
            artifact=artifact,
            placed=int(reply["operations"]),  # the NPU plugin takes the whole graph or refuses it
            compile_seconds=time.perf_counter() - started,
            notes=(
                f"compiled for {options.platform} by OpenVINO {version()}; valid with drivers that accept its version",
            ),
        )

    @contextmanager
    def open(self, compiled: Compiled, profile: HardwareProfile) -> Iterator[Session]:
        """Load the blob on the NPU of this machine."""
        import openvino

        core = openvino.Core()
        if "NPU" not in core.available_devices:
            raise RunError("the blob cannot be run here: no Intel NPU", hint=f"Run it on `{profile.name}`.")
        with sdk_errors(RunError, f"load `{compiled.path.name}` on the NPU"):
            request = core.import_model(compiled.path.read_bytes(), "NPU").create_infer_request()
        yield NpuSession(request, [spec.name for spec in compiled.artifact.outputs])


class NpuSession:
    """One blob, loaded."""

    def __init__(self, request: Any, outputs: list[str]) -> None:
        self._request, self._outputs = request, outputs

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        try:
            found = self._request.infer(inputs, share_inputs=True, share_outputs=False)
            return {name: found[position] for position, name in enumerate(self._outputs)}
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            raise RunError(f"could not run the model on the NPU: {type(error).__name__}: {error}") from error


def static_shapes(artifact: Artifact, batch: int, sequence: int) -> dict[str, list[int]]:
    """Every input's shape with its first free dimension set to ``batch`` and any other to ``sequence``."""
    return {
        spec.name: [
            size if isinstance(size, int) else (batch if axis == 0 else sequence)
            for axis, size in enumerate(spec.shape)
        ]
        for spec in artifact.inputs
    }
