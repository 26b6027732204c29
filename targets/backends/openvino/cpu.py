"""The target ``openvino``: the CPU plugin, executed on this machine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from compressor.errors import CompileError, RunError, sdk_errors
from compressor.machine import detect
from compressor.profile import HardwareProfile
from compressor.types import Array, Artifact, Format, Origin, TensorSpec
from targets.backends.openvino import graph
from targets.backends.openvino.options import cpu_config, cpu_options
from targets.base import Compiled, Missing, Ready, Session, TargetBackend, option_problems

INSTALL = "pip install 'compress-for-device[openvino]'"


class OpenVino(TargetBackend):
    """OpenVINO on a CPU; int8 comes from the QDQ pairs of the file (NNCF's or ONNX Runtime's)."""

    name: ClassVar[str] = "openvino"
    accepts: ClassVar[frozenset[Format]] = frozenset({Format.ONNX})
    summary: ClassVar[str] = "OpenVINO on a CPU (x86-64, Arm): IR files, int8 through NNCF or QDQ"

    def probe(self) -> Ready | Missing:
        try:
            import openvino
        except ImportError as error:
            return Missing(reason=f"{error.name or 'openvino'} is not installed", hint=INSTALL)
        if "CPU" not in openvino.Core().available_devices:
            return Missing(reason="this OpenVINO has no CPU plugin", hint=INSTALL)
        return Ready(detect().processor, {"openvino": version()}, runs=Origin.MEASURED)

    def check(self, artifact: Artifact, profile: HardwareProfile) -> tuple[str, ...]:  # noqa: ARG002
        """Wrong options of the profile; what OpenVINO cannot read shows when compiling."""
        return option_problems(cpu_options, profile)

    def compile(self, artifact: Artifact, profile: HardwareProfile, out: Path) -> Compiled:
        """Convert to IR (``.xml`` and ``.bin``) in ``out``; coverage is read from the plugin's execution graph."""
        import openvino

        if problems := self.check(artifact, profile):
            raise CompileError("; ".join(problems), hint="Mend the profile's [options].")
        started = time.perf_counter()
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{artifact.name.replace('/', '-')}.xml"
        with sdk_errors(
            CompileError, f"convert `{artifact.name}` with OpenVINO", hint="Is the file a valid ONNX model?"
        ):
            core = openvino.Core()
            openvino.save_model(core.read_model(str(artifact.path)), str(path), compress_to_fp16=False)
            compiled = _compiled(core, path, profile, artifact.inputs)
            nodes = list(graph.execution_nodes(compiled))
        precision = cpu_options(profile).inference_precision
        return Compiled(
            path=path,
            artifact=artifact,
            placed=graph.node_count(nodes),
            coverage=graph.coverage(nodes, quantized_file=artifact.precision.startswith("int8")),
            compile_seconds=time.perf_counter() - started,
            notes=(f"arithmetic outside int8: {precision} (stated; OpenVINO's own choice would be the fastest)",),
            extra_files=(path.with_suffix(".bin"),),
        )

    @contextmanager
    def open(self, compiled: Compiled, profile: HardwareProfile) -> Iterator[Session]:
        """Load the IR. The shape of latency is compiled static, any other shape runs in a dynamic copy of the model."""
        import openvino

        with sdk_errors(RunError, f"load `{compiled.path.name}` in OpenVINO"):
            session = OpenVinoSession(openvino.Core(), compiled, profile)
        yield session


class OpenVinoSession:
    """One loaded model, compiled for the profile's batch, and on demand once more for all shapes."""

    def __init__(self, core: Any, compiled: Compiled, profile: HardwareProfile) -> None:
        self._core, self._path, self._profile = core, compiled.path, profile
        self._specs = compiled.artifact.inputs
        self._static = static_shapes(self._specs, profile.runtime.batch)
        self._request = _compiled(core, self._path, profile, self._specs).create_infer_request()
        self._dynamic: Any = None
        wanted = [spec.name for spec in compiled.artifact.outputs]
        self._outputs = _output_names(self._request, wanted)

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Every output by name, copied out of the runtime's memory."""
        try:
            found = self._pick(inputs).infer(inputs, share_inputs=True, share_outputs=False)
            return {name: found[position] for position, name in self._outputs}
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            raise RunError(f"could not run the model: {type(error).__name__}: {error}") from error

    def _pick(self, inputs: Mapping[str, Array]) -> Any:
        if not self._static or all(inputs[name].shape == shape for name, shape in self._static.items()):
            return self._request
        if self._dynamic is None:
            model = self._core.read_model(str(self._path))
            self._dynamic = self._core.compile_model(model, "CPU", cpu_config(self._profile)).create_infer_request()
        return self._dynamic


def static_shapes(specs: tuple[TensorSpec, ...], batch: int) -> dict[str, tuple[int, ...]]:
    """Shapes for the profile's batch when only the first dimension is free; empty for anything more dynamic.

    >>> static_shapes((TensorSpec("image", "float32", ("batch", 1, 8, 8)),), 2)
    {'image': (2, 1, 8, 8)}
    >>> static_shapes((TensorSpec("ids", "int64", ("batch", "sequence")),), 1)
    {}
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in specs:
        rest = [size for size in spec.shape[1:] if isinstance(size, int)]
        if not spec.shape or not isinstance(spec.shape[0], str) or len(rest) != len(spec.shape) - 1:
            return {}
        shapes[spec.name] = (batch, *rest)
    return shapes


def _compiled(core: Any, path: Path, profile: HardwareProfile, specs: tuple[TensorSpec, ...]) -> Any:
    model = core.read_model(str(path))
    if shapes := static_shapes(specs, profile.runtime.batch):
        model.reshape({name: list(shape) for name, shape in shapes.items()})
    return core.compile_model(model, "CPU", cpu_config(profile))


def _output_names(request: Any, wanted: list[str]) -> list[tuple[int, str]]:
    """Position and ONNX name of every output: one tensor may carry several names after conversion."""
    names = []
    for position, output in enumerate(request.model_outputs):
        known = output.get_names()
        names.append((position, next((name for name in wanted if name in known), min(known, default=str(position)))))
    return names


def version() -> str:
    """``2026.4.1-22982``: release and build, without the branch."""
    import openvino

    return "-".join(openvino.__version__.split("-")[:2])
