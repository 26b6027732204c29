"""Core ML: an ``.mlpackage`` for iPhone, iPad and Mac, converted and checked on Linux, run by Apple's systems only.

MIL, Core ML's program form, is built from the static ONNX graph node by node; int8 comes from the file's own QDQ
pairs. The written package is read again from the disk: its ends, its operations, and that every operand and every
stored weight is there. What runs on the Neural Engine is decided on the device, when it loads the model.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from compressor.errors import CompileError, RunError
from compressor.profile import HardwareProfile
from compressor.types import Artifact, Format
from targets import toolchain
from targets.backends.coreml.options import CoreMlOptions, options_of
from targets.base import Compiled, Coverage, Missing, NodeFact, Ready, Session, TargetBackend, option_problems
from targets.graph_file import save_graph
from targets.isolation import Limits
from targets.static_graph import fixed_shapes, read_static

TOOLCHAIN = "coreml"
ON_MAC = Path(__file__).parent / "on_mac.py"
WHY_NOT = "Core ML runs on Apple's systems only: the package is converted and checked here, not run"
_WHAT = "Core ML Tools"
_OLDEST = (1980, 1, 1, 0, 0, 0)


class CoreMl(TargetBackend):
    """ML programs for Apple's devices, float16 or int8 by the file's QDQ pairs."""

    name: ClassVar[str] = "coreml"
    accepts: ClassVar[frozenset[Format]] = frozenset({Format.ONNX})
    summary: ClassVar[str] = "Core ML for iPhone, iPad and Mac: .mlpackage, converted and checked here, not run"

    def probe(self) -> Ready | Missing:
        if not toolchain.is_ready(TOOLCHAIN):
            return Missing(f"tool chain {TOOLCHAIN} is {toolchain.status(TOOLCHAIN).state}", toolchain.hint(TOOLCHAIN))
        version = toolchain.find(TOOLCHAIN).pins()["coremltools"]
        return Ready(f"Core ML Tools {version}, no Apple system here", {"coremltools": version}, None, why_not=WHY_NOT)

    def check(self, artifact: Artifact, profile: HardwareProfile) -> tuple[str, ...]:  # noqa: ARG002
        """Wrong options of the profile; an operator without a form in MIL shows when converting, which is as cheap."""
        return option_problems(options_of, profile)

    def compile(self, artifact: Artifact, profile: HardwareProfile, out: Path) -> Compiled:
        """Write ``model.mlpackage.zip`` with the profile's batch and ``options.max_sequence`` as fixed shapes.

        A package is a folder; the zip holds it uncompressed, so that its size is the package's.
        """
        if problems := self.check(artifact, profile):
            raise CompileError("; ".join(problems), hint="Mend the profile's [options].")
        started, options = time.perf_counter(), options_of(profile)
        shapes = fixed_shapes(artifact.inputs, profile.runtime.batch, profile.runtime.sequence(options.max_sequence))
        graph = read_static(artifact.path, shapes)
        folder = out / f"{artifact.name.replace('/', '-')}-coreml"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="compress-coreml-") as scratch:
            file, package = Path(scratch) / "graph.npz", Path(scratch) / "model.mlpackage"
            save_graph(graph, file)
            about = {"description": f"{artifact.name} ({artifact.precision})", "licence": "see the package's NOTICE"}
            request = {"graph": str(file), "package": str(package), "system": options.system, "about": about}
            limits = Limits(options.timeout_s, options.memory_limit_mib)
            reply = toolchain.call(TOOLCHAIN, {"action": "compile", **request}, limits, f"{_WHAT} on `{artifact.name}`")
            path = _zipped(package, folder / "model.mlpackage.zip")
        return Compiled(
            path=path,
            artifact=artifact,
            placed=sum(reply["operations"].values()),
            coverage=_coverage(reply),
            compile_seconds=time.perf_counter() - started,
            notes=_notes(reply, options, shapes),
            source_files=_mac_files(folder, artifact, shapes, options),
        )

    @contextmanager
    def open(self, compiled: Compiled, profile: HardwareProfile) -> Iterator[Session]:  # noqa: ARG002
        """There is no Core ML outside of Apple's systems: always :class:`RunError`."""
        raise RunError(WHY_NOT, hint=f"On a Mac: python on_mac.py --self-check ({compiled.path.name}).")
        yield  # pragma: no cover  a generator, as the interface wants it


def _zipped(package: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(item for item in package.rglob("*") if item.is_file()):
            entry = zipfile.ZipInfo(f"{package.name}/{file.relative_to(package).as_posix()}", _OLDEST)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, file.read_bytes())
    return path


def _coverage(reply: Mapping[str, Any]) -> Coverage:
    left = tuple(NodeFact(item["name"], item["operator"], False, item["reason"]) for item in reply["left_float"])
    return Coverage(int(reply["quantized"]), int(reply["quantized"]) + len(left), left)


def _notes(reply: Mapping[str, Any], options: CoreMlOptions, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    told = ", ".join(
        f"{count} {name}" for name, count in sorted(reply["operations"].items(), key=lambda item: -item[1])
    )
    return (
        WHY_NOT,
        f"ML program for {options.system} (specification {reply['specification']}); fixed shapes: {dict(shapes)}",
        f"read again from the disk: {told}; {reply['weight_bytes'] / 1024:.1f} KiB of weights",
    )


def _mac_files(
    folder: Path, artifact: Artifact, shapes: Mapping[str, tuple[int, ...]], options: CoreMlOptions
) -> tuple[Path, ...]:
    """The script for a Mac and what it must know of the model."""
    facts = {
        "compute_units": options.compute_units,
        "inputs": [
            {"name": spec.name, "dtype": spec.dtype, "shape": list(shapes[spec.name])} for spec in artifact.inputs
        ],
        "outputs": [spec.name for spec in artifact.outputs],
    }
    (folder / "mac.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return folder / "mac.json", Path(shutil.copyfile(ON_MAC, folder / "on_mac.py"))
