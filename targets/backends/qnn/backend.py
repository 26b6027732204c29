"""Qualcomm Hexagon tensor processors through ONNX Runtime's QNN provider: the context binary that the device loads.

The compiler and a functional simulator of the processor run here, in the tool chain's environment; the simulator loads
the very file that was compiled, so answers and accuracy are the artifact's (``simulated``). It is not a performance
model: its cycle counts are host time, so latency is unavailable without the device.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from compressor.errors import CompileError, sdk_errors
from compressor.profile import HardwareProfile
from compressor.types import Array, Artifact, Format, Origin
from targets import toolchain
from targets.backends.qnn.options import QnnOptions, options_of
from targets.base import Compiled, Coverage, Missing, NodeFact, Ready, Session, TargetBackend, option_problems
from targets.coverage import FLOAT
from targets.isolation import Limits
from targets.static_graph import fixed_shapes, with_shapes
from targets.static_session import StaticSession
from targets.toolchain_session import exchange, open_worker

TOOLCHAIN = "qnn"
_WHAT = "Qualcomm's QNN"
_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")


class Qnn(TargetBackend):
    """Context binaries for Hexagon tensor processors, run in the x86 simulator."""

    name: ClassVar[str] = "qnn"
    accepts: ClassVar[frozenset[Format]] = frozenset({Format.ONNX})
    summary: ClassVar[str] = "Qualcomm Hexagon (HTP v68 to v81) through QNN: context binaries, simulated accuracy"
    float_error: ClassVar[float] = 1e-2  # the processor computes float files in float16

    def probe(self) -> Ready | Missing:
        if not toolchain.is_ready(TOOLCHAIN):
            return Missing(f"tool chain {TOOLCHAIN} is {toolchain.status(TOOLCHAIN).state}", toolchain.hint(TOOLCHAIN))
        pins = toolchain.find(TOOLCHAIN).pins()
        versions = {name: pins[name] for name in ("onnxruntime", "onnxruntime-qnn")}
        return Ready("QNN's x86 simulator of the Hexagon tensor processor", versions, runs=Origin.SIMULATED)

    def check(self, artifact: Artifact, profile: HardwareProfile) -> tuple[str, ...]:  # noqa: ARG002
        """Wrong options of the profile; what the compiler leaves to the CPU shows in the compiled file."""
        return option_problems(options_of, profile)

    def compile(self, artifact: Artifact, profile: HardwareProfile, out: Path) -> Compiled:
        """Write ``<name>_ctx.onnx`` and the binary beside it; float files become float16 on the processor."""
        if problems := self.check(artifact, profile):
            raise CompileError("; ".join(problems), hint="Mend the profile's [options].")
        options, started = options_of(profile), time.perf_counter()
        shapes = fixed_shapes(artifact.inputs, profile.runtime.batch, profile.runtime.sequence(options.max_sequence))
        folder = out / f"{artifact.name.replace('/', '-')}-qnn"
        folder.mkdir(parents=True, exist_ok=True)
        context = folder / "model_ctx.onnx"
        reply = _compile(artifact, shapes, context, options)
        placed, left = reply["placed"], reply["left"]
        return Compiled(
            path=context,
            artifact=artifact,
            placed=len(placed),
            fallback=tuple(f"{operator} {name}" for operator, name in left),
            coverage=_coverage(artifact.path, left),
            compile_seconds=time.perf_counter() - started,
            notes=(
                f"compiled for {options.soc}, Hexagon v{options.chip.architecture}; fixed shapes: {shapes}",
                "run in the x86 simulator, which is no performance model: no latency without the device",
            ),
            extra_files=tuple(sorted(folder.glob("*.bin"))),
        )

    @contextmanager
    def open(self, compiled: Compiled, profile: HardwareProfile) -> Iterator[Session]:
        """The compiled context in the simulator, in a process of the tool chain that stays."""
        options = options_of(profile)
        shapes = fixed_shapes(
            compiled.artifact.inputs, profile.runtime.batch, profile.runtime.sequence(options.max_sequence)
        )
        with open_worker(TOOLCHAIN, _limits(options), _WHAT) as worker, tempfile.TemporaryDirectory() as folder:
            worker.ask({"action": "open", "context": str(compiled.path.resolve())})

            def call(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
                return exchange(worker, Path(folder), inputs)

            yield StaticSession(compiled.artifact, shapes, call)


def _limits(options: QnnOptions) -> Limits:
    return Limits(options.timeout_s, options.memory_limit_mib)


def _compile(
    artifact: Artifact, shapes: Mapping[str, tuple[int, ...]], context: Path, options: QnnOptions
) -> dict[str, Any]:
    import onnx

    settings = {
        "soc_model": str(options.chip.number),
        "htp_arch": str(options.chip.architecture),
        "htp_graph_finalization_optimization_mode": str(options.optimisation),
    }
    with tempfile.TemporaryDirectory(prefix="compress-qnn-") as scratch:
        fixed = Path(scratch) / "model.onnx"
        with sdk_errors(CompileError, f"fix the shapes of `{artifact.name}`", hint="Is the file a valid ONNX model?"):
            onnx.save(with_shapes(onnx.load(str(artifact.path)), shapes), str(fixed))
        request = {"action": "compile", "model": str(fixed), "context": str(context.resolve()), "options": settings}
        reply = toolchain.call(TOOLCHAIN, request, _limits(options), f"{_WHAT} compiler")
    if not reply["placed"]:
        raise CompileError(
            f"{_WHAT} places no operation of `{artifact.name}` on the processor: {_list(reply['left'])}",
            hint="Export the model without these operators, or use another target.",
        )
    if not context.is_file():
        raise CompileError(f"{_WHAT} wrote no context for `{artifact.name}`")
    return reply


def _coverage(path: Path, left: Sequence[Sequence[str]]) -> Coverage:
    """Weighted nodes behind a DequantizeLinear that went to the processor run as integers there."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    makers = {output: node.op_type for node in graph.node for output in node.output}
    away = {name for _, name in left}
    weighted = [node for node in graph.node if node.op_type in FLOAT]
    floats = []
    for node in weighted:
        if node.name in away:
            floats.append(NodeFact(node.name, node.op_type, False, "the compiler left it to the CPU"))
        elif makers.get(node.input[0]) not in _QUANTIZERS:
            floats.append(NodeFact(node.name, node.op_type, False, "float16 on the processor: it is not quantized"))
    return Coverage(len(weighted) - len(floats), len(weighted), tuple(floats))


def _list(nodes: Sequence[Sequence[str]], most: int = 6) -> str:
    count = Counter(operator for operator, _ in nodes)
    return ", ".join(f"{operator} x{number}" for operator, number in count.most_common(most)) or "the graph is empty"
