"""Vendor tool chains, each in an environment of its own, made from a pinned lock file with hashes.

The environment lies in the user's cache folder and is called through :mod:`targets.isolation`: one JSON request, one
JSON reply, a time limit, a memory limit, and an end that becomes a typed error. The child is started without our search
paths and variables and sees nothing of the environment that trains and measures. Docs: docs/targets/toolchains.md.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

from compressor.config import suggestion
from compressor.errors import CompileError, ConfigError, TargetUnavailable
from compressor.types import write_atomic
from targets import toolchain_arm64, toolchain_node
from targets.isolation import Limits, call_worker

LOCKS = Path(__file__).parent / "toolchains"
RUNNER = LOCKS / "runner.py"
_BACKENDS = Path(__file__).parent / "backends"
_MARK = "toolchain.json"
_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
_PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==(\S+)", re.MULTILINE)
_SMOKE = Limits(seconds=120, memory_mib=4096)


@dataclass(frozen=True)
class Toolchain:
    """One vendor's tools: what they are for, where the worker script lies that speaks for them.

    No worker: npm packages, or an emulated Python.
    """

    name: str
    title: str
    licence: str
    worker: Path | None
    pythons: tuple[str, ...] = ("3.11", "3.12", "3.13")  # that the lock file has wheels for
    emulated: bool = False  # an aarch64 Python under qemu-user: targets/toolchain_arm64.py

    @property
    def lock(self) -> Path:
        return LOCKS / f"{self.name}.{'package-lock.json' if self.npm else 'lock'}"

    @property
    def npm(self) -> bool:
        """Is it made of npm packages?"""
        return self.worker is None and not self.emulated

    def pins(self) -> dict[str, str]:
        """Version by normalised package name, from the lock file."""
        if self.npm:
            return toolchain_node.pins(self.lock)
        return {_normal(name): version for name, version in _PIN.findall(self.lock.read_text(encoding="utf-8"))}

    @property
    def folder(self) -> Path:
        """The environment of this very lock file; another lock makes another folder."""
        digest = hashlib.sha256(self.lock.read_bytes() + _PYTHON.encode()).hexdigest()[:12]
        return cache_folder() / f"{self.name}-{digest}"

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def complete(self) -> bool:
        """Was an installation from this very lock file finished?"""
        return (self.folder / _MARK).is_file() and (self.worker is None or self.python.exists())


CATALOGUE: Mapping[str, Toolchain] = {
    item.name: item
    for item in (
        Toolchain(
            "ethos-u", "Arm Vela, the compiler for Ethos-U NPUs", "Apache-2.0", _BACKENDS / "ethos_u" / "worker.py"
        ),
        Toolchain(
            "arm64",
            "aarch64 Python, ONNX Runtime and LiteRT on an emulated processor (Debian packages, qemu-user)",
            "MIT, Apache-2.0, PSF-2.0; qemu: GPL-2.0",
            None,
            emulated=True,
        ),
        Toolchain(
            "coreml",
            "Core ML Tools, Apple's converter (models are written and checked here, they run on Apple's systems only)",
            "BSD-3-Clause",
            _BACKENDS / "coreml" / "worker.py",
        ),
        Toolchain(
            "executorch",
            "ExecuTorch: exporter and runtime with XNNPACK",
            "BSD-3-Clause",
            _BACKENDS / "executorch" / "worker.py",
            pythons=("3.11",),
        ),
        Toolchain(
            "qnn",
            "Qualcomm's QNN compiler and simulator for Hexagon, through ONNX Runtime",
            "MIT; the QNN libraries: Qualcomm AI Stack License (proprietary)",
            _BACKENDS / "qnn" / "worker.py",
        ),
        Toolchain(
            "rknn",
            "Rockchip's RKNN-Toolkit2: compiler and simulator for the NPUs of RK35xx",
            "not stated by the package: Rockchip's own terms (proprietary)",
            _BACKENDS / "rknn" / "worker.py",
            pythons=("3.11",),
        ),
        Toolchain(
            "tflite-micro",
            "TensorFlow Lite for Microcontrollers, its interpreter on this machine",
            "Apache-2.0",
            _BACKENDS / "tflite_micro" / "worker.py",
        ),
        Toolchain("samples", "ONNX Runtime's C++ headers and ktlint, to check sample programs (npm)", "MIT", None),
        Toolchain("web", "ONNX Runtime Web, WebAssembly for browsers (npm)", "MIT", None),
    )
}


class State(StrEnum):
    """What :func:`status` finds without starting anything."""

    ABSENT = "not installed"
    READY = "installed"
    OLD = "installed from another lock file; install again"
    BROKEN = "half installed, an installation was interrupted; install again"


@dataclass(frozen=True)
class Status:
    """A tool chain on this machine."""

    toolchain: Toolchain
    state: State
    folder: Path
    versions: Mapping[str, str]  # wanted ones, by package
    size_mib: float = 0.0


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/compress-for-device/toolchains``, or the same under ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "compress-for-device" / "toolchains"


def find(name: str) -> Toolchain:
    """Raises :class:`ConfigError` for a name that is not in the catalogue."""
    if name not in CATALOGUE:
        known = ", ".join(sorted(CATALOGUE))
        what = "unknown tool chain" + suggestion(name, tuple(sorted(CATALOGUE)))
        raise ConfigError.single(f"tool chain `{name}`", "name", what, hint=f"Known: {known}.")
    return CATALOGUE[name]


def status(name: str) -> Status:
    """What is there, from files alone: no network, no process."""
    item = find(name)
    state = State.ABSENT
    if item.complete:
        state = State.READY
    elif item.folder.exists():
        state = State.BROKEN
    elif any(_folders_of(item)):
        state = State.OLD
    return Status(item, state, item.folder, item.pins(), _size_mib(item.folder))


def is_ready(name: str) -> bool:
    """Is the tool chain installed from the present lock file? Cheap."""
    return find(name).complete


def install(name: str, *, wheels: Path | None = None, on_line: Callable[[str], None] | None = None) -> Status:
    """Make the environment and check it; what is installed already is kept.

    With ``wheels`` (a folder of wheel files) no network is used. Raises :class:`TargetUnavailable`.
    """
    from filelock import FileLock

    item, say = find(name), on_line or (lambda _line: None)
    if _PYTHON not in item.pythons:
        offered = " or ".join(item.pythons)
        hint = f"Run compress-for-device with Python {offered}."
        raise TargetUnavailable(f"tool chain `{name}` is pinned for Python {offered}, this is {_PYTHON}", hint=hint)
    item.folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(item.folder.with_suffix(".lock")):
        if not is_ready(name):
            shutil.rmtree(item.folder, ignore_errors=True)
            say(f"making {item.folder}")
            say(f"installing {', '.join(f'{package} {version}' for package, version in item.pins().items())}")
            _fill(item, wheels)
            facts = {"name": name, "lock": item.lock.read_text(encoding="utf-8"), "made": time.time()}
            write_atomic(item.folder / _MARK, json.dumps(facts, indent=1) + "\n")
    problems = verify(name)
    if problems:
        raise TargetUnavailable(f"tool chain `{name}` does not work: {'; '.join(problems)}", hint=_again(name))
    return status(name)


def _fill(item: Toolchain, wheels: Path | None) -> None:
    if item.worker is None:
        (toolchain_arm64 if item.emulated else toolchain_node).install(item.lock, item.folder, _run)
        return
    _run([sys.executable, "-m", "venv", str(item.folder)], f"make the environment of `{item.name}`")
    _run(_pip(item, wheels), f"install the tool chain `{item.name}`")


def _pip(item: Toolchain, wheels: Path | None) -> list[str]:
    source = ["--no-index", "--find-links", str(wheels.resolve())] if wheels is not None else []
    options = [
        "--require-hashes",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--no-input",
        "--disable-pip-version-check",
        "--no-compile",
    ]
    return [str(item.python), "-I", "-m", "pip", "install", "--quiet", *options, *source, "-r", str(item.lock)]


def _run(command: list[str], doing: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        tail = (done.stderr or done.stdout).strip()
        raise TargetUnavailable(f"could not {doing}: {tail[-800:]}", hint=_hint_of(tail))


def _hint_of(output: str) -> str:
    """What to do about a pip or venv that failed, from the words it used."""
    rules = (
        ("DO NOT MATCH THE HASHES", "A package is not the file that was pinned; nothing was installed. Do not go on."),
        ("ensurepip", "Install your system's venv package (Debian: apt install python3-venv)."),
        ("No space left", "Free disk space, or point XDG_CACHE_HOME to another disk."),
        (
            r"torch==\S+\+cpu",
            "The pinned torch is PyTorch's CPU build, which lies in PyTorch's own index: name that to pip as an extra "
            "index, or download all wheels and use `toolchain install NAME --wheels WHEELS`.",
        ),
        (
            r"No matching distribution|Could not find a version|ConnectionError|NewConnectionError|Name or service|"
            r"Temporary failure|timed out",
            "No network, or the index lacks the pinned files for this Python and system. Where there is a network: "
            "pip download --no-deps -r LOCK -d WHEELS; here: `toolchain install NAME --wheels WHEELS`.",
        ),
    )
    return next((hint for pattern, hint in rules if re.search(pattern, output)), "")


def verify(name: str) -> tuple[str, ...]:
    """Every problem found: versions against the lock, files against their recorded digests, and a call that answers."""
    item = find(name)
    if not is_ready(name):
        return (f"it is {status(name).state}",)
    if item.worker is None:
        return tuple((toolchain_arm64 if item.emulated else toolchain_node).problems(item.lock, item.folder))
    found = {_normal(package.metadata["Name"]): package for package in distributions(path=[str(_site_packages(item))])}
    problems = [*_wrong_versions(item, found), *(text for pin in item.pins() for text in _changed(found.get(pin)))]
    if not problems:
        try:
            call(name, {"action": "smoke"}, _SMOKE, f"the smoke call of `{name}`")
        except (CompileError, TargetUnavailable) as error:
            problems.append(str(error))
    return tuple(problems)


def _wrong_versions(item: Toolchain, found: Mapping[str, Distribution]) -> Iterator[str]:
    for package, version in item.pins().items():
        if package not in found:
            yield f"{package} {version} is missing"
        elif found[package].version != version:
            yield f"{package} is {found[package].version}, the lock file says {version}"


def _changed(package: Distribution | None) -> Iterator[str]:
    """Files that are not what the wheel's RECORD says."""
    for file in (package.files or []) if package is not None else []:
        if file.hash is None or file.hash.mode != "sha256":
            continue
        path = Path(str(file.locate()))
        if not path.is_file():
            yield f"{file} is missing"
            continue
        digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()
        if digest != file.hash.value:
            yield f"{file} was changed after it was installed"


def remove(name: str) -> tuple[Path, ...]:
    """Delete every environment of this tool chain; the folders that went."""
    item = find(name)
    gone = tuple(_folders_of(item))
    for folder in gone:
        shutil.rmtree(folder)
        folder.with_suffix(".lock").unlink(missing_ok=True)
    return gone


def call(name: str, request: Mapping[str, Any], limits: Limits, what: str) -> dict[str, Any]:
    """Send ``request`` to the tool chain's worker and return its reply.

    Raises :class:`TargetUnavailable` when it is not installed, :class:`CompileError` when it dies, hits a limit, or
    answers with an error of its own.
    """
    reply = call_worker(command(name), request, limits, what, python=str(interpreter(name)), environment=environment())
    if not reply.get("ok"):
        raise CompileError(f"{what} failed: {reply.get('error', 'no reason given')}")
    return reply


def interpreter(name: str) -> Path:
    """The environment's Python. Raises :class:`TargetUnavailable`."""
    if not is_ready(name):
        raise TargetUnavailable(f"tool chain `{name}` is {status(name).state}", hint=hint(name))
    return find(name).python


def command(name: str) -> tuple[str, ...]:
    """Arguments for :func:`interpreter`: the runner and the tool chain's worker, cut off from all other paths."""
    return ("-P", "-s", str(RUNNER), str(find(name).worker))


def environment() -> dict[str, str]:
    """Ours without what would lead the child to other libraries; hashing is fixed: the same request, the same file."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "LD_"))}
    return {**kept, "PYTHONHASHSEED": "0"}


def hint(name: str) -> str:
    """How to get it."""
    return f"compress-for-device toolchain install {name}"


def _again(name: str) -> str:
    return f"compress-for-device toolchain remove {name} && {hint(name)}"


def _folders_of(item: Toolchain) -> Iterator[Path]:
    pattern = re.compile(re.escape(item.name) + r"-[0-9a-f]{12}")
    parent = cache_folder()
    if parent.is_dir():
        yield from sorted(path for path in parent.iterdir() if path.is_dir() and pattern.fullmatch(path.name))


def _site_packages(item: Toolchain) -> Path:
    return item.folder / "lib" / f"python{_PYTHON}" / "site-packages"


def _size_mib(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink()) / 2**20


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
