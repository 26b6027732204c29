"""Microcontrollers: the student's int8 file in the interpreter of TensorFlow Lite for Microcontrollers.

The interpreter and its reference kernels run here, in the tool chain's environment: answers and the arena are those of
the interpreter (``simulated``), there is no latency. The package gets the model as a C array and a small program.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any, ClassVar

from compressor.errors import CompileError, RunError, sdk_errors
from compressor.profile import HardwareProfile
from compressor.types import Array, Artifact, Format, Measurement, Origin
from targets import toolchain
from targets.backends.tflite_micro.options import TfliteMicroOptions, options_of
from targets.backends.tflite_micro.sources import unresolved, write_sources
from targets.base import Compiled, Coverage, Missing, OverLimit, Ready, Session, TargetBackend, option_problems
from targets.isolation import Limits
from targets.static_session import StaticSession
from targets.tflite.export import export_int8, float_operations
from targets.tflite.interface import Interface, encode_all, read_interface
from targets.tflite.unary import REPLACED
from targets.toolchain_session import Worker, exchange, open_worker

TOOLCHAIN = "tflite-micro"
PACKAGE = "tflite-micro"
_LARGEST_ARENA = 256 * 2**20
_WHAT = "TensorFlow Lite for Microcontrollers"
_BUILT = "the arena is recorded on a 64-bit machine; the C sources were not built for the board."
_TOO_LARGE = "it does not fit the board: no C sources are written."
_FAST = " Its answers are those of LiteRT's optimised float kernels."


class TfliteMicro(TargetBackend):
    """The TFLM interpreter: arena, operators, answers; sources for the board."""

    name: ClassVar[str] = "tflite-micro"
    accepts: ClassVar[frozenset[Format]] = frozenset({Format.ONNX})
    summary: ClassVar[str] = "microcontrollers through TensorFlow Lite for Microcontrollers: arena, answers, C sources"

    def probe(self) -> Ready | Missing:
        try:
            writer = version_of("ai-edge-litert")
        except PackageNotFoundError:
            return Missing("ai-edge-litert is not installed", "pip install 'compress-for-device[litert]'")
        if not toolchain.is_ready(TOOLCHAIN):
            return Missing(f"tool chain {TOOLCHAIN} is {toolchain.status(TOOLCHAIN).state}", toolchain.hint(TOOLCHAIN))
        versions = {PACKAGE: toolchain.find(TOOLCHAIN).pins()[PACKAGE], "ai-edge-litert": writer}
        return Ready("TFLM interpreter, reference kernels", versions, runs=Origin.SIMULATED)

    def check(self, artifact: Artifact, profile: HardwareProfile) -> tuple[str, ...]:  # noqa: ARG002
        if problems := option_problems(options_of, profile):
            return problems
        if profile.runtime.batch != 1:
            return (f"runtime.batch is {profile.runtime.batch}: a microcontroller runs one sample at a time",)
        return ()

    def compile(self, artifact: Artifact, profile: HardwareProfile, out: Path) -> Compiled:
        """Write ``.tflite`` and the C sources; the interpreter says how much of the arena it takes."""
        if problems := self.check(artifact, profile):
            raise CompileError("; ".join(problems), hint="Mend the profile.")
        options, started = options_of(profile), time.perf_counter()
        lacking = frozenset(unresolved(REPLACED))
        path, converted = export_int8(
            artifact, out, batch=1, sequence=profile.runtime.sequence(options.max_sequence), absent=lacking
        )
        count = Counter(operation.operator for operation in converted.operations)
        if absent := unresolved(tuple(count)):
            raise CompileError(f"{_WHAT} has no {', '.join(absent)}", hint="Export the model without it.")
        arena = _arena(path, options)
        over = _over_limits(arena["total"], path.stat().st_size, options)
        room = -(-int(arena["total"] * options.arena_margin) // 16) * 16
        sources: tuple[Path, ...] = ()
        if not over:  # the array of a large model would be a text of hundreds of megabytes
            folder = out / f"{path.stem}-sources"
            sources = write_sources(folder, converted.content, tuple(count), read_interface(path), room)
        floats = float_operations(converted)
        return Compiled(
            path=path,
            artifact=artifact,
            placed=len(converted.operations),
            estimates=_figures(arena, path.stat().st_size),
            coverage=converted.coverage,
            compile_seconds=time.perf_counter() - started,
            notes=(
                "operators: " + ", ".join(f"{name} x{number}" for name, number in sorted(count.items())) + ".",
                f"{len(floats)} operations touch float tensors." if floats else "no float tensor in the file.",
                _BUILT if sources else _TOO_LARGE + (_FAST if _only_float(converted.coverage) else ""),
            ),
            source_files=sources,
            over=over,
        )

    @contextmanager
    def open(self, compiled: Compiled, profile: HardwareProfile) -> Iterator[Session]:
        """The file in the interpreter, in a process of the tool chain that stays while the session is open.

        A float file that no board of the profile holds is the baseline, and no more: LiteRT's fast kernels answer it.
        """
        if compiled.over and _only_float(compiled.coverage):
            from targets.tflite.reference import ReferenceCall

            with sdk_errors(RunError, f"load `{compiled.path.name}` in LiteRT"):
                call = ReferenceCall(compiled.path, exact=False)
            yield StaticSession(compiled.artifact, call.shapes, call)
            return
        options, interface = options_of(profile), read_interface(compiled.path)
        with open_worker(TOOLCHAIN, _limits(options), _WHAT) as worker, tempfile.TemporaryDirectory() as folder:
            worker.ask(_opening(compiled.path))
            yield MicroSession(worker, interface, compiled.artifact, Path(folder))


def _only_float(coverage: Coverage | None) -> bool:
    return coverage is not None and coverage.quantized == 0


class MicroSession:
    """Whole batches go to the interpreter at once; there they run one row after another."""

    def __init__(self, worker: Worker, interface: Interface, artifact: Artifact, folder: Path) -> None:
        self._worker, self._interface, self._artifact, self._folder = worker, interface, artifact, folder

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Every output by name."""
        rows = len(next(iter(inputs.values())))
        shapes = {port.name: (rows, *port.onnx_shape[1:]) for port in self._interface.inputs}
        return StaticSession(self._artifact, shapes, self._call).run(inputs)

    def _call(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        # each row keeps the batch dimension of 1 that the file has
        arrays = {str(place): array[:, None] for place, array in enumerate(encode_all(self._interface, inputs))}
        found = exchange(self._worker, self._folder, arrays)
        return {
            port.name: port.decode(_joined(found[str(place)])) for place, port in enumerate(self._interface.outputs)
        }


def _joined(array: Array) -> Array:
    """(rows, 1, ...) as (rows, ...); an output without a batch dimension stays as it is."""
    return array.reshape(-1, *array.shape[2:]) if array.ndim > 1 else array


def _limits(options: TfliteMicroOptions) -> Limits:
    return Limits(options.timeout_s, options.memory_limit_mib)


def _opening(path: Path) -> dict[str, Any]:
    """A large arena: what is used of it is recorded, and the board's limit is checked against that."""
    return {"action": "open", "model": str(path.resolve()), "arena_bytes": _LARGEST_ARENA}


def _arena(path: Path, options: TfliteMicroOptions) -> dict[str, int]:
    try:
        with open_worker(TOOLCHAIN, _limits(options), _WHAT) as worker:
            reply = worker.ask(_opening(path))
    except RunError as error:
        raise CompileError(f"{_WHAT} refused `{path.name}`: {error}") from error
    if "total" not in reply["arena"]:
        raise CompileError(f"{_WHAT} did not say how large its arena is")
    found: dict[str, int] = reply["arena"]
    return found


def _figures(arena: Mapping[str, int], model_bytes: int) -> tuple[Measurement, ...]:
    device = "TFLM interpreter on a 64-bit machine"
    figures = [("arena (RAM)", arena["total"]), ("of it tensors", arena.get("head", 0)), ("model (flash)", model_bytes)]
    return tuple(
        Measurement(value / 1024, "KiB", Origin.SIMULATED, device, {"name": name}) for name, value in figures if value
    )


def _over_limits(arena: int, model_bytes: int, options: TfliteMicroOptions) -> tuple[OverLimit, ...]:
    pairs = (("RAM", arena / 1024, options.ram_kib), ("flash", model_bytes / 1024, options.flash_kib))
    return tuple(
        OverLimit(f"it needs {used:.1f} KiB of {name}, the board has {limit:g}", used / limit - 1)
        for name, used, limit in pairs
        if limit is not None and used > limit
    )
