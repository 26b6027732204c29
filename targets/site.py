"""Where a profile's files can be run from here: on the device itself, on a stand-in, or nowhere."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

from compressor.machine import usable_cores
from compressor.profile import HardwareProfile, Runtime
from compressor.types import Artifact, Origin, stand_in_path
from targets import registry
from targets.base import Compiled, Ready, Session, TargetBackend
from targets.outcome import State

STAND_IN = "onnxruntime-cpu"


@dataclass(frozen=True)
class Site:
    """A back end that runs files, and what figures taken there are worth."""

    backend: TargetBackend
    profile: HardwareProfile
    device: str
    origin: Origin
    state: State
    stand_in: bool  # does another runtime run the portable file instead of the compiled one?
    no_latency: str  # why latency cannot be measured; empty: it can
    key: str  # versions and device: part of the key of stored predictions

    def open(self, compiled: Compiled) -> AbstractContextManager[Session]:
        """A session for what was compiled (on a stand-in runtime: for the artifact it was compiled from)."""
        artifact = compiled.artifact
        return self.backend.open(portable(artifact) if self.stand_in else compiled, self.profile)


def portable(artifact: Artifact) -> Compiled:
    """The artifact's own file as something to open, or the emulation that stands beside it."""
    emulation = stand_in_path(artifact.path)
    return Compiled(path=emulation if emulation.is_file() else artifact.path, artifact=artifact, placed=0)


def find_site(profile: HardwareProfile, backend: TargetBackend, ready: Ready) -> Site | None:
    """The best place to run this profile's files; None when there is not even a stand-in.

    - The back end runs here and the profile is this machine (or names the device that the back end found): figures are
      what the back end says they are.
    - The back end runs here, the device is elsewhere: a stand-in for accuracy, not for latency. A simulator of the
      device stays what it is.
    - The back end cannot run here: ONNX Runtime on the CPU runs the same ONNX file, as a stand-in for accuracy.
    """
    if ready.runs is None:
        return stand_in(ready.why_not)
    key = _key(backend, ready)
    if profile.here == "this-machine" or ready.attached or ready.device == profile.compute.processor:
        simulator = f"{backend.name} is a simulator: its speed says nothing about a device"
        why = "" if ready.runs is Origin.MEASURED else simulator
        state = State.PROXY if why else State.EXECUTED
        return Site(backend, profile, ready.device, ready.runs, state, False, why, key)
    if ready.runs is Origin.SIMULATED:
        why = f"no {profile.name} attached: {backend.name} runs here in a simulator, which has no device's speed"
        return Site(backend, profile, ready.device, ready.runs, State.PROXY, False, why, key)
    why = f"no {profile.name} attached; attach it (--device), or measure there with the profile `this-machine`"
    return Site(backend, profile, ready.device, Origin.PROXY, State.PROXY, False, why, key)


def stand_in(why: str = "") -> Site | None:
    """ONNX Runtime on this machine's CPU, for the portable file. ``why``: the device's own runtime cannot be used."""
    if STAND_IN not in registry.names() or not isinstance(other := registry.probe(STAND_IN), Ready):
        return None
    backend = registry.get(STAND_IN)
    base = {"name": "stand-in", "title": "stand-in", "target": STAND_IN, "here": "this-machine"}
    profile = HardwareProfile.model_validate(
        {
            **base,
            "compute": {"processor": other.device, "architecture": "none"},
            "runtime": Runtime(threads=usable_cores()),
        }
    )
    device = f"ONNX Runtime on {other.device}"
    return Site(
        backend, profile, device, Origin.PROXY, State.COMPILED, True, why or "compiled here, cannot run here",
        _key(backend, other),
    )  # fmt: skip


def _key(backend: TargetBackend, ready: Ready) -> str:
    versions = ",".join(f"{name}={version}" for name, version in sorted(ready.versions.items()))
    return f"{backend.name}|{versions}|{ready.device}"
