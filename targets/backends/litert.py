"""LiteRT (formerly TensorFlow Lite) with XNNPACK: phones, boards, and this machine.

The ``.tflite`` file is written from ONNX by :mod:`targets.tflite`, int8 from the file's own QDQ pairs, so what was
calibrated and scored is what runs.
"""

from __future__ import annotations

import time
from collections import Counter
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
from targets.base import Compiled, Missing, Ready, Session, TargetBackend, option_problems
from targets.static_session import StaticSession

INSTALL = "pip install 'compress-for-device[litert]'"


class LiteRtOptions(Frozen):
    """The ``[options]`` of a profile."""

    max_sequence: Annotated[int, Field(ge=1)] = 128  # the file has fixed shapes: length of a free sequence dimension


def options_of(profile: HardwareProfile) -> LiteRtOptions:
    """Raises :class:`ConfigError` for unknown keys and values."""
    return validate(LiteRtOptions, dict(profile.options), f"profile `{profile.name}`, options")


class LiteRt(TargetBackend):
    """TFLite files, executed on this machine; for a phone the same runtime here is a stand-in for accuracy."""

    name: ClassVar[str] = "litert"
    accepts: ClassVar[frozenset[Format]] = frozenset({Format.ONNX})
    summary: ClassVar[str] = "LiteRT with XNNPACK on a CPU (Android, Arm, x86-64): .tflite files, int8 from QDQ"

    def probe(self) -> Ready | Missing:
        try:
            from ai_edge_litert import interpreter, schema_py_generated

            versions = {"ai-edge-litert": version_of("ai-edge-litert")}
        except (ImportError, PackageNotFoundError) as error:
            return Missing(reason=f"{error.name or 'ai-edge-litert'} is not installed", hint=INSTALL)
        if not hasattr(interpreter, "Interpreter") or not hasattr(schema_py_generated, "ModelT"):
            return Missing(reason="this ai-edge-litert has no interpreter or no schema", hint=INSTALL)
        return Ready(detect().processor, versions, runs=Origin.MEASURED)

    def check(self, artifact: Artifact, profile: HardwareProfile) -> tuple[str, ...]:  # noqa: ARG002
        """Wrong options of the profile; an operator without a TFLite form shows when compiling, which is as cheap."""
        return option_problems(options_of, profile)

    def compile(self, artifact: Artifact, profile: HardwareProfile, out: Path) -> Compiled:
        """Write ``.tflite`` with the profile's batch and ``options.max_sequence`` as fixed shapes."""
        from targets.static_graph import fixed_shapes, read_static
        from targets.tflite import convert

        if problems := self.check(artifact, profile):
            raise CompileError("; ".join(problems), hint="Mend the profile's [options].")
        started = time.perf_counter()
        shapes = fixed_shapes(
            artifact.inputs, profile.runtime.batch, profile.runtime.sequence(options_of(profile).max_sequence)
        )
        graph = read_static(artifact.path, shapes)
        with sdk_errors(CompileError, f"write `{artifact.name}` as TFLite"):
            converted = convert(graph, f"`{artifact.name}`")
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{artifact.name.replace('/', '-')}.tflite"
        path.write_bytes(converted.content)
        with sdk_errors(CompileError, f"load `{path.name}` in LiteRT", hint="The export wrote a file LiteRT refuses."):
            open_interpreter(path, 1)
        count = Counter(operation.operator for operation in converted.operations)
        moved = sum(count[name] for name in ("TRANSPOSE", "QUANTIZE", "DEQUANTIZE"))
        return Compiled(
            path=path,
            artifact=artifact,
            placed=len(converted.operations),
            coverage=converted.coverage,
            compile_seconds=time.perf_counter() - started,
            notes=(
                f"fixed shapes: {shapes}",
                f"{moved} of {len(converted.operations)} operations change layout or type",
            ),
        )

    @contextmanager
    def open(self, compiled: Compiled, profile: HardwareProfile) -> Iterator[Session]:
        """Load the file with XNNPACK, LiteRT's default kernels."""
        threads = (
            profile.runtime.threads if profile.here == "this-machine" else min(profile.runtime.threads, usable_cores())
        )
        with sdk_errors(RunError, f"load `{compiled.path.name}` in LiteRT"):
            call = LiteRtCall(open_interpreter(compiled.path, threads))
            session = StaticSession(compiled.artifact, call.shapes, call)
        yield session


def open_interpreter(path: Path, threads: int) -> Any:
    """A LiteRT interpreter with its tensors allocated."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=threads)
    interpreter.allocate_tensors()
    return interpreter


class LiteRtCall:
    """One run over inputs of exactly the file's shapes."""

    def __init__(self, interpreter: Any) -> None:
        self._interpreter = interpreter
        details = interpreter.get_input_details()
        self.shapes = {item["name"]: tuple(int(size) for size in item["shape"]) for item in details}
        self._inputs = [(item["name"], item["index"], item["dtype"]) for item in details]
        runner = interpreter.get_signature_runner("serving_default")
        places = runner.get_output_details()
        self._outputs = [(name, item["index"]) for name, item in places.items()]

    def __call__(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        try:
            for name, index, kind in self._inputs:
                array = inputs[name]
                self._interpreter.set_tensor(index, array if array.dtype == kind else array.astype(kind))
            self._interpreter.invoke()
            return {name: self._interpreter.get_tensor(index) for name, index in self._outputs}
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            raise RunError(f"could not run the model: {type(error).__name__}: {error}") from error
