"""The race: every runtime that exists for a device runs every candidate, and the gate picks among all of them.

The teacher and the null twin run in ONNX Runtime, which is what went in; all student files run in every runtime of the
field, measured in one interleaved loop. A runtime that is not installed has a row that says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from compressor.config import Frozen, validate
from compressor.errors import CompileError, ConfigError, RunError, TargetUnavailable
from compressor.machine import detect
from compressor.profile import HardwareProfile
from compressor.types import Artifact, Format, Origin
from targets import registry
from targets.base import Compiled, Missing, Ready, Session, TargetBackend

BASELINE = "onnxruntime-cpu"
FIELD = (BASELINE, "openvino", "litert", "executorch")  # all run on x86-64 and on 64-bit Arm


class AutoOptions(Frozen):
    """The ``[options]`` of a profile: who races, and each runtime's own options in a table of its name."""

    runtimes: tuple[str, ...] = FIELD
    settings: dict[str, dict[str, Any]] = {}


def options_of(profile: HardwareProfile) -> AutoOptions:
    """Raises :class:`ConfigError` for unknown keys, runtimes that are not registered and a field without a baseline."""
    found = validate(AutoOptions, dict(profile.options), f"profile `{profile.name}`, options")
    known = registry.names()
    for name in (*(found.runtimes if "runtimes" in found.model_fields_set else ()), *found.settings):
        if name not in known or name == Auto.name:
            raise ConfigError.single(f"profile `{profile.name}`", "options.runtimes", f"`{name}` cannot race")
    return found


def field_of(profile: HardwareProfile) -> tuple[str, ...]:
    """Registered runtimes of the race, the baseline first."""
    wanted = [name for name in options_of(profile).runtimes if name in registry.names()]
    return tuple(dict.fromkeys((BASELINE, *wanted)))


class Auto(TargetBackend):
    """Several runtimes on one device; ``Artifact.runtime`` says which one an entrant runs in."""

    name: ClassVar[str] = "auto"
    accepts: ClassVar[frozenset[Format]] = frozenset({Format.ONNX})
    summary: ClassVar[str] = "a race of ONNX Runtime, OpenVINO, LiteRT and ExecuTorch: the fastest that keeps accuracy"

    def probe(self) -> Ready | Missing:
        """As ready as ONNX Runtime is; the versions are those of every runtime that would run."""
        states = {name: registry.probe(name) for name in FIELD if name in registry.names()}
        baseline = states[BASELINE]
        if isinstance(baseline, Missing):
            return baseline
        ready = [state for state in states.values() if isinstance(state, Ready)]
        versions = {name: version for state in ready for name, version in state.versions.items()}
        return Ready(detect().processor, versions, runs=Origin.MEASURED)

    def check(self, artifact: Artifact, profile: HardwareProfile) -> tuple[str, ...]:
        try:
            name, own = self.resolve(artifact, profile)
        except ConfigError as error:
            return tuple(str(problem) for problem in error.problems)
        return registry.get(name).check(artifact, own) if isinstance(registry.probe(name), Ready) else ()

    def entrants(self, artifact: Artifact, profile: HardwareProfile) -> tuple[Artifact, ...]:
        """A student's file once per runtime; what is compared with once, in the baseline.

        A runtime that is missing takes part with the fp32 file only, to have a row.
        """
        if artifact.role != "student":
            return (replace(artifact, runtime=BASELINE),)
        return tuple(
            replace(artifact, name=f"{artifact.name}@{name}", runtime=name)
            for name in field_of(profile)
            if artifact.precision == "fp32" or isinstance(registry.probe(name), Ready)
        )

    def resolve(self, artifact: Artifact, profile: HardwareProfile) -> tuple[str, HardwareProfile]:
        name = artifact.runtime or BASELINE
        own: Mapping[str, Any] = options_of(profile).settings.get(name, {})
        return name, profile.model_copy(update={"target": name, "options": dict(own)})

    def compile(self, artifact: Artifact, profile: HardwareProfile, out: Path) -> Compiled:
        """Compile with the entrant's runtime. Raises :class:`TargetUnavailable` where it is not installed."""
        name, own = self.resolve(artifact, profile)
        state = registry.probe(name)
        if isinstance(state, Missing):
            raise TargetUnavailable(f"{name} does not race: {state.reason}", hint=state.hint)
        if state.runs is not Origin.MEASURED:
            raise CompileError(f"{name} does not race: it cannot be measured here ({state.why_not or 'a simulator'})")
        return registry.get(name).compile(artifact, own, out)

    def open(self, compiled: Compiled, profile: HardwareProfile) -> AbstractContextManager[Session]:
        name, own = self.resolve(compiled.artifact, profile)
        if name not in registry.names():
            raise RunError(f"target `{name}` is not registered", hint="Reinstall the plug-in.")
        return registry.get(name).open(compiled, own)
