"""Rockchip NPUs (RK35xx, RV11xx) through RKNN-Toolkit2: the ``.rknn`` file that the board loads.

The toolkit's simulator runs the graph that was built, not the file; so the graph is built again when it is opened, and
the plan of the file (operations, types, places, cycles, memory) must be the compiled one's. The bytes are not: the
toolkit leaves uninitialised memory in its files. The simulator is no performance model, but the compiler prints cycles
for most operations: a lower bound, ``estimated``.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from compressor.errors import CompileError, RunError, sdk_errors
from compressor.profile import HardwareProfile
from compressor.types import Array, Artifact, Format, Measurement, Origin
from targets import toolchain
from targets.backends.rknn.log import Build, read_build
from targets.backends.rknn.model import source_opset, write_onnx
from targets.backends.rknn.options import RknnOptions, options_of
from targets.base import Compiled, Coverage, Missing, NodeFact, Ready, Session, TargetBackend, option_problems
from targets.isolation import Limits
from targets.static_graph import fixed_shapes, read_static
from targets.static_session import StaticSession
from targets.toolchain_session import exchange, open_worker

TOOLCHAIN = "rknn"
BOARD = Path(__file__).parent / "board.py"
_WHAT = "RKNN-Toolkit2"
_WEIGHTED = ("Conv", "MatMul", "Gemm", "Attention", "LSTM", "GRU")


class Rknn(TargetBackend):
    """Files for Rockchip's NPUs, their graph run in the toolkit's simulator."""

    name: ClassVar[str] = "rknn"
    accepts: ClassVar[frozenset[Format]] = frozenset({Format.ONNX})
    summary: ClassVar[str] = "Rockchip RK35xx and RV11xx through RKNN-Toolkit2: .rknn files, simulated accuracy"
    float_error: ClassVar[float] = 1e-2  # the NPU computes float files in float16

    def probe(self) -> Ready | Missing:
        if not toolchain.is_ready(TOOLCHAIN):
            return Missing(f"tool chain {TOOLCHAIN} is {toolchain.status(TOOLCHAIN).state}", toolchain.hint(TOOLCHAIN))
        versions = {"rknn-toolkit2": toolchain.find(TOOLCHAIN).pins()["rknn-toolkit2"]}
        return Ready("RKNN-Toolkit2's simulator", versions, runs=Origin.SIMULATED)

    def check(self, artifact: Artifact, profile: HardwareProfile) -> tuple[str, ...]:  # noqa: ARG002
        """Wrong options of the profile; what the compiler refuses or leaves to the CPU shows when compiling."""
        return option_problems(options_of, profile)

    def compile(self, artifact: Artifact, profile: HardwareProfile, out: Path) -> Compiled:
        """Write ``model.rknn``. Float files become float16; QDQ files stay as they were quantized; a float file with
        calibration samples beside it (``scheme["engine"] = "target"``) is quantized by the toolkit."""
        if problems := self.check(artifact, profile):
            raise CompileError("; ".join(problems), hint="Mend the profile's [options].")
        options, started = options_of(profile), time.perf_counter()
        shapes = fixed_shapes(artifact.inputs, profile.runtime.batch, profile.runtime.sequence(options.max_sequence))
        folder = out / f"{artifact.name.replace('/', '-')}-rknn"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        kept = _request(artifact, shapes, folder, options)
        request = {"action": "compile", **_placed_in(folder, kept)}
        reply = toolchain.call(TOOLCHAIN, request, _limits(options), f"{_WHAT} compiler")
        settled = {**kept, "off": reply["off"], "optimisation": reply["level"]}
        (folder / "request.json").write_text(json.dumps(settled, indent=1), encoding="utf-8")
        build = read_build(reply["log"])
        (folder / "build.log").write_text(reply["log"], encoding="utf-8")
        _refuse_custom(artifact, reply["custom"])
        if not build.placed:
            raise CompileError(
                f"{_WHAT} places no operation of `{artifact.name}` on the NPU: {', '.join(build.left[:6]) or 'none'}",
                hint="Export the model without these operators, or use another target.",
            )
        return Compiled(
            path=folder / "model.rknn",
            artifact=artifact,
            placed=len(build.placed),
            fallback=build.left,
            estimates=_estimates(build, options, reply["versions"]["rknn-toolkit2"]),
            coverage=_coverage(build),
            compile_seconds=time.perf_counter() - started,
            notes=_notes(build, options, shapes, reply),
            source_files=_board_files(folder, artifact, shapes, options),
        )

    @contextmanager
    def open(self, compiled: Compiled, profile: HardwareProfile) -> Iterator[Session]:
        """The graph of the compiled file in the simulator, in a process of the tool chain that stays."""
        options = options_of(profile)
        shapes = fixed_shapes(
            compiled.artifact.inputs, profile.runtime.batch, profile.runtime.sequence(options.max_sequence)
        )
        folder = compiled.path.parent
        if not compiled.path.is_file() or not (folder / "request.json").is_file():
            raise RunError(f"`{compiled.path}` does not exist or was not compiled here")
        kept = json.loads((folder / "request.json").read_text(encoding="utf-8"))
        with open_worker(TOOLCHAIN, _limits(options), _WHAT) as worker, tempfile.TemporaryDirectory() as scratch:
            again = {"action": "open", **_placed_in(folder, kept), "rknn": str(Path(scratch) / "again.rknn")}
            built = read_build(worker.ask(again)["log"])
            if built != read_build((folder / "build.log").read_text(encoding="utf-8")):
                raise RunError(
                    f"building `{compiled.artifact.name}` again gave another plan than that of `{compiled.path.name}`",
                    hint="What the simulator would run is not what was compiled; compile again.",
                )

            def call(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
                return exchange(worker, Path(scratch), inputs)

            yield StaticSession(compiled.artifact, shapes, call, stacked=True)


def _limits(options: RknnOptions) -> Limits:
    return Limits(options.timeout_s, options.memory_limit_mib)


def _request(
    artifact: Artifact, shapes: Mapping[str, tuple[int, ...]], folder: Path, options: RknnOptions
) -> dict[str, Any]:
    """What compiles the file; it is kept in ``folder`` with all that it needs, so that it can be built again."""
    opset = source_opset(artifact.path)
    graph = read_static(artifact.path, shapes)
    with sdk_errors(CompileError, f"write `{artifact.name}` for {_WHAT}"):
        write_onnx(graph, folder / "source.onnx", opset)
    kept: dict[str, Any] = {
        "chip": options.chip,
        "quantizer": options.quantizer,
        "optimisation": options.optimisation,
        "seconds": options.timeout_s,
        "inputs": {name: list(shapes[name]) for name in graph.inputs},
        "outputs": list(graph.outputs),
    }
    if artifact.scheme.get("engine") == "target":
        kept["dataset"] = _calibration(artifact, shapes, folder / "calibration.npz")
    return kept


def _placed_in(folder: Path, kept: Mapping[str, Any]) -> dict[str, Any]:
    base = folder.resolve()
    files = {"model": str(base / "source.onnx"), "rknn": str(base / "model.rknn")}
    more = {"dataset": str(base / kept["dataset"])} if "dataset" in kept else {}
    return {**kept, **files, **more}


def _calibration(artifact: Artifact, shapes: Mapping[str, tuple[int, ...]], path: Path) -> str:
    """The artifact's calibration samples in the fixed shapes (tokens padded with zeros, as when running)."""
    source = artifact.path.with_name(artifact.scheme["calibration file"])
    with np.load(source) as file:
        given = {name: file[name] for name in shapes}
    fitted: dict[str, Any] = {}
    for name, array in given.items():
        cut = array[:, *(slice(size) for size in shapes[name][1:])]
        edges = [(0, 0), *((0, most - size) for size, most in zip(cut.shape[1:], shapes[name][1:], strict=True))]
        fitted[name] = np.pad(cut, edges)
    np.savez(path, **fitted)
    return path.name


def _refuse_custom(artifact: Artifact, custom: list[list[str]]) -> None:
    if custom:
        named = ", ".join(f"{operator} (`{name}`)" for name, operator in custom[:6])
        raise CompileError(
            f"{_WHAT} has no kernel for {named} of `{artifact.name}`: the board would need a custom operator",
            hint="Export the model without it, or use another target.",
        )


def _coverage(build: Build) -> Coverage:
    weighted = [item for item in build.operations if any(word in item.operator for word in _WEIGHTED)]
    floats = tuple(
        NodeFact(item.name, item.operator, False, f"{item.type.lower()} on the {item.target}: it is not quantized")
        for item in weighted
        if not (item.integer and item.target == "NPU")
    )
    return Coverage(len(weighted) - len(floats), len(weighted), floats)


def _estimates(build: Build, options: RknnOptions, version: str) -> tuple[Measurement, ...]:
    """The compiler's cycles of one NPU core, and what they take at the profile's clock: a lower bound.

    The figure in ms comes first: the gate compares candidates by it.
    """
    cycles = sum(item.cycles for item in build.counted)
    device = f"{options.chip}, one core, {_WHAT} {version}"
    share = (
        f"lower bound: {len(build.counted)} of {len(build.operations)} operations counted, no driver, "
        f"{len(build.left)} on the CPU and not counted"
    )
    found: list[Measurement] = []
    if cycles:
        found.append(Measurement(float(cycles), "cycles", Origin.ESTIMATED, device, {"name": "NPU", "counted": share}))
    if cycles and options.npu_clock_mhz is not None:
        at = f"{device}, at {options.npu_clock_mhz:g} MHz"
        time_ms = cycles / options.npu_clock_mhz / 1e3
        figure = Measurement(time_ms, "ms", Origin.ESTIMATED, at, {"name": "NPU time", "counted": share})
        found.insert(0, figure)
    for kind, name in (("weight", "weights in memory"), ("internal", "activations in memory")):
        if kind in build.memory_kib:
            size = build.memory_kib[kind]
            found.append(Measurement(size, "KiB", Origin.ESTIMATED, device, {"name": name, "counted": "all"}))
    return tuple(found)


def _notes(
    build: Build, options: RknnOptions, shapes: Mapping[str, tuple[int, ...]], reply: Mapping[str, Any]
) -> tuple[str, ...]:
    uncounted = Counter(item.operator for item in build.placed if not item.cycles)
    notes = [
        f"compiled for {options.chip}; fixed shapes: {dict(shapes)}",
        "run in the toolkit's simulator, which is no performance model: no latency without the board",
    ]
    if uncounted:
        told = ", ".join(f"{name} x{count}" for name, count in uncounted.most_common(6))
        notes.append(f"the compiler gives no cycles for {told}")
    if reply["changed"]:
        told = ", ".join(f"{rule} of {nodes}" for rule, nodes in reply["changed"])
        notes.append(f"level of optimisation {reply['level']}: the next one changes what the file computes ({told})")
    if reply["off"]:
        told = ", ".join(reply["off"])
        notes.append(f"rules of the toolkit that break on this model or undo each other and were switched off: {told}")
    return tuple(notes)


def _board_files(
    folder: Path, artifact: Artifact, shapes: Mapping[str, tuple[int, ...]], options: RknnOptions
) -> tuple[Path, ...]:
    """The runner for the board and what it must know of the model."""
    facts = {
        "chip": options.chip,
        "cores": options.cores,
        "inputs": [
            {"name": spec.name, "dtype": spec.dtype, "shape": list(shapes[spec.name])} for spec in artifact.inputs
        ],
        "outputs": [spec.name for spec in artifact.outputs],
    }
    (folder / "board.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return folder / "board.json", Path(shutil.copyfile(BOARD, folder / "run_on_board.py"))
