"""A phone over ADB: files by ``adb push``, the runner as an ``adb shell`` process that stays.

A phone has no Python. Unless its address names one, the aarch64 Python of the tool chain ``arm64`` goes there, with its
C library, and is started through its own loader: nothing is installed on the phone, everything lies in one folder. For
the shell of Android 7 and later. Tested on a double of ``adb`` that runs commands on this machine, never on a phone.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import re
import select
import shlex
import shutil
import struct
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import parse_qs, urlsplit

from compressor.errors import ConfigError, DeviceLost, RunError, TargetUnavailable
from targets import toolchain, toolchain_arm64
from targets.remote.link import NEEDS, RESUMES, RUNNER, Link

FOLDER = "/data/local/tmp/compress-for-device"  # the shell's user may write and execute there
TOOLCHAIN = "arm64"
_SECONDS = 60.0
_TRANSFER_SECONDS = 1800.0
_LOADER = "root/lib/ld-linux-aarch64.so.1"
_LIBRARIES = ("root/lib/aarch64-linux-gnu", "root/usr/lib/aarch64-linux-gnu")
_NOT_THERE = ("tests", "test", "__pycache__", "include", "idlelib", "ensurepip", "lib2to3")


@dataclass(frozen=True)
class AdbAddress:
    """Which phone: ``adb://SERIAL``; ``?python=`` an interpreter over there, ``?folder=`` where our files go."""

    serial: str
    python: str = ""  # empty: one that is brought along
    folder: str = FOLDER

    host = property(lambda self: self.serial)

    def __str__(self) -> str:
        return f"adb://{self.serial}"


def parse_adb(text: str) -> AdbAddress:
    """Raises :class:`ConfigError`. The serial is that of ``adb devices``; network devices (``HOST:PORT``) too."""
    subject, hint = f"device address `{text}`", "adb://SERIAL, or adb://SERIAL?python=/path/to/python"
    parts = urlsplit(text)
    if parts.scheme != "adb" or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:-]*", parts.netloc) or parts.path:
        raise ConfigError.single(subject, "address", "is not of the form adb://SERIAL", hint=hint)
    query = {key: values[0] for key, values in parse_qs(parts.query).items()}
    if unknown := sorted(set(query) - {"python", "folder"}):
        raise ConfigError.single(subject, unknown[0], "unknown; known: python, folder", hint=hint)
    folder = query.get("folder", FOLDER)
    if not PurePosixPath(folder).is_absolute() or ".." in PurePosixPath(folder).parts:
        raise ConfigError.single(subject, "folder", "is not an absolute path", hint=hint)
    return AdbAddress(parts.netloc, query.get("python", ""), folder)


class AdbLink(Link):
    """An open connection to a phone."""

    def __init__(self, address: AdbAddress, timeout_s: float = 300.0) -> None:
        """Find the phone, bring the runner (and Python) and start it. Raises :class:`TargetUnavailable`."""
        self.address, self._timeout_s, self.folder = address, timeout_s, address.folder
        self._process: subprocess.Popen[bytes] | None = None
        self._complaints: IO[bytes] | None = None
        found = shutil.which("adb")
        if found is None:
            raise TargetUnavailable("adb is not here", hint="Debian: apt install adb")
        self._adb = [found, "-s", address.serial]
        self._require_device()
        self._shell(f"mkdir -p {shlex.quote(self.folder)}")
        name = f"runner-{hashlib.sha256(RUNNER.read_bytes()).hexdigest()[:16]}.py"
        self.send([(RUNNER, f"{self.folder}/{name}")])
        self._command = f"{self._python()} {shlex.quote(f'{self.folder}/{name}')}"
        self._start()

    def __str__(self) -> str:
        return str(self.address)

    def _run(self, *words: str, seconds: float = _SECONDS) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                [*self._adb, *words],
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired as error:
            raise DeviceLost(f"{self} did not answer within {seconds:g} s", hint=RESUMES) from error

    def _state(self) -> str:
        """``device`` when it is there; otherwise adb's words."""
        done = self._run("get-state")
        return done.stdout.strip() if done.returncode == 0 else done.stderr.strip() or "not there"

    def _require_device(self) -> None:
        state = self._state()
        if state != "device":
            hint = (
                "Unlock the phone and accept this computer's key." if "unauthorized" in state else "See `adb devices`."
            )
            raise TargetUnavailable(f"{self}: {state}", hint=hint)
        if "shell_v2" not in self._run("features").stdout.split():
            raise TargetUnavailable(f"{self} has no binary-safe shell", hint="Android 7 or later is needed.")

    def _shell(self, line: str, seconds: float = _SECONDS) -> str:
        done = self._run("shell", line, seconds=seconds)
        if done.returncode:
            raise self._failure(f"`{line}` ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-300:]}")
        return done.stdout

    def _failure(self, what: str) -> Exception:
        """A lost phone, or something that the phone refuses."""
        if self._state() != "device":
            return DeviceLost(f"the connection to {self} was lost", hint=RESUMES)
        return TargetUnavailable(f"{self}: {what}", hint="Is its storage full?")

    def send(self, pairs: Sequence[tuple[Path, str]]) -> None:
        """``adb push`` beside the place, then a rename."""
        for local, remote in pairs:
            self._shell(f"mkdir -p {shlex.quote(str(PurePosixPath(remote).parent))}")
            done = self._run("push", str(local), f"{remote}.part", seconds=_TRANSFER_SECONDS)
            if done.returncode:
                raise self._failure(f"cannot write {remote}: {(done.stderr or done.stdout).strip()[-300:]}")
            self._shell(f"mv {shlex.quote(f'{remote}.part')} {shlex.quote(remote)}")

    # ------------------------------------------------------------------ Python over there

    def _python(self) -> str:
        """The command that starts Python there, quoted."""
        if self.address.python:
            return shlex.quote(self.address.python)
        if not toolchain.is_ready(TOOLCHAIN):
            hint = f"{toolchain.hint(TOOLCHAIN)}; or name an interpreter by ?python=PATH."
            raise TargetUnavailable(f"{self} has no Python, and the one to bring along is not here", hint=hint)
        if (machine := self._shell("uname -m").strip()) != "aarch64":
            raise TargetUnavailable(f"{self} is {machine}; the Python to bring along is for aarch64", hint=NEEDS)
        place = f"{self.folder}/{self._bring_python()}"
        libraries = ":".join(f"{place}/{name}" for name in _LIBRARIES)
        loader = f"{shlex.quote(f'{place}/{_LOADER}')} --library-path {shlex.quote(libraries)}"
        home = f"PYTHONHOME={shlex.quote(f'{place}/root/usr')} PYTHONPATH={shlex.quote(f'{place}/site')}"
        python = shlex.quote(f"{place}/root/usr/bin/python{toolchain_arm64.PYTHON}")
        return f"{home} PYTHONDONTWRITEBYTECODE=1 {loader} {python}"

    def _bring_python(self) -> str:
        """Unpack the archive of Python over there, unless it is there; the folder's name."""
        source = toolchain.find(TOOLCHAIN).folder
        name = f"python-{source.name}"
        place = shlex.quote(f"{self.folder}/{name}")
        if "whole" in self._shell(f"cat {place}/whole 2>/dev/null || true"):
            return name
        with tempfile.TemporaryDirectory() as scratch:
            archive = Path(scratch) / "python.tar.gz"
            digest = pack_python(source, archive)
            remote = f"{self.folder}/{name}.tar.gz"
            self.send([(archive, remote)])
            there = self._shell(f"sha256sum {shlex.quote(remote)}", _TRANSFER_SECONDS).split()
            if there[:1] != [digest]:
                raise RunError(f"{remote} arrived damaged on {self}", hint="Is its storage full?")
            unpack = f"rm -rf {place} && mkdir -p {place} && tar -xzf {shlex.quote(remote)} -C {place}"
            self._shell(f"{unpack} && rm {shlex.quote(remote)} && echo whole > {place}/whole", _TRANSFER_SECONDS)
        return name

    # ------------------------------------------------------------------ the runner

    def _start(self) -> None:
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the process
        self._process = subprocess.Popen(
            [*self._adb, "shell", "-T", f"exec env {self._command}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            bufsize=0,
        )

    def exchange(self, frame: bytes) -> bytes:
        """A frame there, a message back; each within the time limit."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            view = memoryview(frame)
            while view:
                view = view[process.stdin.write(view) :]
        except OSError:
            raise self._ended() from None
        deadline = time.monotonic() + self._timeout_s
        (size,) = struct.unpack("<Q", self._read(process.stdout, 8, deadline))
        return self._read(process.stdout, size, deadline)

    def _read(self, stream: IO[bytes], size: int, deadline: float) -> bytes:
        parts, left = [], size
        while left:
            ready, _, _ = select.select([stream], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise DeviceLost(f"{self} did not answer within {self._timeout_s:g} s", hint=RESUMES)
            part = os.read(stream.fileno(), min(left, 1 << 20))
            if not part:
                raise self._ended()
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def _ended(self) -> Exception:
        """Why there is no reply: the phone went, or the runner (its own words)."""
        if self._state() != "device":
            return DeviceLost(f"the connection to {self} was lost", hint=RESUMES)
        said = ""
        if self._process is not None and self._complaints is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
            self._complaints.seek(0)
            said = self._complaints.read().decode("utf-8", "replace").strip()
        end = said.splitlines()[-1] if said else "it said nothing"
        return TargetUnavailable(f"the runner on {self} ended: {end}", hint=NEEDS)

    def restart(self) -> None:
        self._stop()
        self._start()

    def _stop(self) -> None:
        if self._process is None:
            return
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        try:
            self._process.wait(5)  # the runner ends with its input
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._complaints is not None:
            self._complaints.close()
        self._process = None

    def close(self) -> None:
        self._stop()


def pack_python(source: Path, archive: Path) -> str:
    """The tool chain's Python, its libraries, NumPy and the runtimes as a .tar.gz without times; its SHA-256."""
    with (
        archive.open("wb") as raw,
        gzip.GzipFile("", "wb", 1, raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as tar,
    ):
        for path in _python_files(source):
            tar.add(path, path.relative_to(source).as_posix(), recursive=False, filter=_plain)
    with archive.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _python_files(source: Path) -> Iterator[Path]:
    """Links as links, where they stay inside; files; no tests and headers."""
    tops = (f"root/usr/bin/python{toolchain_arm64.PYTHON}", "root/lib", "root/usr/lib", "site")
    for top in tops:
        place = source / top
        for path in [place] if place.is_file() else sorted(place.rglob("*")):
            outside = path.is_symlink() and path.readlink().is_absolute()
            if not outside and not set(path.relative_to(source).parts) & set(_NOT_THERE) and not path.is_dir():
                yield path


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mtime = 0
    return entry
