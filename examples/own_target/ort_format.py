"""ONNX Runtime's own file format (``.ort``) as a target: what a back end outside of compress-for-device looks like."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import onnxruntime

from compressor.errors import CompileError, RunError, sdk_errors
from compressor.machine import detect
from compressor.profile import HardwareProfile
from compressor.types import Array, Artifact, Format, Origin
from targets.base import Compiled, Missing, Ready, Session, TargetBackend


class OrtFormat(TargetBackend):
    """The graph is optimised once, when it is compiled; the device loads it as it is."""

    name: ClassVar[str] = "ort-format"
    accepts: ClassVar[frozenset[Format]] = frozenset({Format.ONNX})
    summary: ClassVar[str] = "ONNX Runtime's own file format, optimised for this machine ahead of time"

    def probe(self) -> Ready | Missing:
        return Ready(detect().processor, {"onnxruntime": onnxruntime.__version__}, runs=Origin.MEASURED)

    def compile(self, artifact: Artifact, profile: HardwareProfile, out: Path) -> Compiled:
        out.mkdir(parents=True, exist_ok=True)
        path, started = out / f"{artifact.name.replace('/', '-')}.ort", time.perf_counter()
        options = _options(profile)
        options.optimized_model_filepath = str(path)
        options.add_session_config_entry("session.save_model_format", "ORT")
        with sdk_errors(CompileError, f"write `{artifact.name}` as .ort"):
            onnxruntime.InferenceSession(str(artifact.path), options, providers=["CPUExecutionProvider"])
        return Compiled(path, artifact, placed=0, compile_seconds=time.perf_counter() - started)

    @contextmanager
    def open(self, compiled: Compiled, profile: HardwareProfile) -> Iterator[Session]:
        with sdk_errors(RunError, f"load `{compiled.path.name}`"):
            session = onnxruntime.InferenceSession(str(compiled.path), _options(profile))
        yield OrtSession(session)


class OrtSession:
    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self._names = [output.name for output in session.get_outputs()]

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        with sdk_errors(RunError, "run the model"):
            return dict(zip(self._names, self._session.run(None, dict(inputs)), strict=True))


def _options(profile: HardwareProfile) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = profile.runtime.threads
    options.log_severity_level = 3  # "optimised for this hardware" would be written to the terminal
    return options
