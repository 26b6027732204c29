"""A back end whose files run on an attached device: compiled here, copied there, timed there by the same loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compressor.errors import ConfigError, RunError, TargetUnavailable
from compressor.profile import HardwareProfile
from compressor.types import Array, Artifact, Origin, file_digest
from targets.backends.onnxruntime_cpu import LEVELS, session_entries
from targets.base import Compiled, Missing, Ready, Session, TargetBackend
from targets.remote.adb import AdbAddress, AdbLink, parse_adb
from targets.remote.link import Link
from targets.remote.ssh import Address, SshLink, parse_address
from targets.static_session import StaticSession

Device = Address | AdbAddress

# Targets that the runner on the device speaks, and the package that it needs there.
REMOTE = {"onnxruntime-cpu": "onnxruntime", "litert": "ai-edge-litert"}


def parse_devices(words: Sequence[str]) -> dict[str, Device]:
    """``PROFILE=ssh://user@host`` or ``PROFILE=adb://SERIAL`` by profile. Raises :class:`ConfigError`."""
    found: dict[str, Device] = {}
    for word in words:
        name, equals, address = word.partition("=")
        if not equals or not name:
            hint = "--device raspberry-pi-5=ssh://pi@raspberrypi.local"
            raise ConfigError.single(f"--device `{word}`", "device", "is not PROFILE=ADDRESS", hint=hint)
        if name in found:
            raise ConfigError.single(f"--device `{word}`", "device", f"`{name}` is attached twice")
        found[name] = parse_adb(address) if address.startswith("adb:") else parse_address(address)
    return found


def attach(backend: TargetBackend, profile: HardwareProfile, devices: Mapping[str, Device]) -> TargetBackend:
    """``backend``, or the same on the device that is attached for this profile."""
    address = devices.get(profile.name)
    if address is None:
        return backend
    if backend.name not in REMOTE:
        what = f"target {backend.name} cannot be run on an attached device; {', '.join(REMOTE)} can"
        raise ConfigError.single(f"--device {profile.name}={address}", "target", what)
    return Attached(backend, address)


class Attached(TargetBackend):
    """``inner`` compiles; the device runs."""

    def __init__(self, inner: TargetBackend, address: Device) -> None:
        self._inner, self._address = inner, address
        self.name, self.accepts, self.summary = inner.name, inner.accepts, inner.summary  # type: ignore[misc]
        self.memory_apart = "not measured on an attached device"  # type: ignore[misc]

    def probe(self) -> Ready | Missing:
        """Connect and ask the runner what device it is on."""
        here = self._inner.probe()
        if isinstance(here, Missing):
            return here
        try:
            with self._link() as link:
                facts, _ = link.ask({"action": "hello"})
        except TargetUnavailable as error:
            return Missing(str(error), error.hint)
        except RunError as error:
            return Missing(
                str(error), f"On the device: {self._address.python or 'python3'} -m pip install onnxruntime numpy"
            )
        if (package := REMOTE[self.name]) not in facts["versions"]:
            hint = f"On the device: python3 -m pip install {package} numpy"
            return Missing(f"{package} is not on {self._address}", hint)
        device = f"{facts['processor']} ({facts['machine']}, {facts['cores']} cores, {self._address.host})"
        return Ready(device, facts["versions"], runs=Origin.MEASURED, attached=True)

    def check(self, artifact: Artifact, profile: HardwareProfile) -> tuple[str, ...]:
        return self._inner.check(artifact, profile)

    def compile(self, artifact: Artifact, profile: HardwareProfile, out: Path) -> Compiled:
        return self._inner.compile(artifact, profile, out)

    @contextmanager
    def open(self, compiled: Compiled, profile: HardwareProfile) -> Iterator[Session]:
        """Copy the model to the device, unless it is there, and load it in a process of its own."""
        with self._link() as link:
            remote = _copy(link, compiled)
            settings = {
                "threads": profile.runtime.threads,
                "level": LEVELS[profile.runtime.graph_level],
                "arena": profile.runtime.arena,
                "entries": session_entries(profile) if self.name == "onnxruntime-cpu" else {},
            }
            facts, _ = link.ask({"action": "open", "path": remote, "settings": settings})
            session = RemoteSession(link)
            yield FixedSession(compiled.artifact, facts["shapes"], session) if "shapes" in facts else session

    @contextmanager
    def _link(self) -> Iterator[Link]:
        link = AdbLink(self._address) if isinstance(self._address, AdbAddress) else SshLink(self._address)
        try:
            yield link
        finally:
            link.close()


def _copy(link: Link, compiled: Compiled) -> str:
    """The model and its weight files, in a folder named after the model's digest; the model's path on the device."""
    base = compiled.path.resolve().parent
    folder = f"{link.folder}/models/{_sha256(compiled.path)[:32]}"
    files = [(compiled.path, f"{folder}/{compiled.path.name}", _sha256(compiled.path))]
    for path in compiled.extra_files:
        files.append((path, f"{folder}/{path.resolve().relative_to(base).as_posix()}", _sha256(path)))
    link.bring(files)
    return files[0][1]


def _sha256(path: Path) -> str:
    return file_digest(path).removeprefix("sha256:")


class RemoteSession:
    """Runs on the device; times are those of the device's clock."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Every output by name."""
        outputs: dict[str, Array] = self._link.ask({"action": "run"}, inputs)[1]
        return outputs

    def times_ns(self, inputs: Mapping[str, Array], count: int) -> Sequence[int]:
        """Time of each of ``count`` runs over there, in ns."""
        facts: dict[str, Any] = self._link.ask({"action": "times", "count": count}, inputs)[0]
        return [int(value) for value in facts["times"]]


class FixedSession:
    """The same for a file of fixed shapes: any batch, any length up to the file's."""

    def __init__(self, artifact: Artifact, shapes: Mapping[str, Sequence[int]], remote: RemoteSession) -> None:
        self._remote = remote
        sizes = {name: tuple(shape) for name, shape in shapes.items()}
        self._static = StaticSession(artifact, sizes, remote.run)

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Every output by name."""
        return self._static.run(inputs)

    def times_ns(self, inputs: Mapping[str, Array], count: int) -> Sequence[int]:
        """Time of each of ``count`` runs over there on one piece of the file's size, in ns."""
        return self._remote.times_ns(self._static.fitted(inputs), count)
