"""The tool chain ``arm64``: an aarch64 Python with ONNX Runtime and LiteRT, and qemu-user to emulate its processor.

Python and the C library are Debian's packages for arm64, fetched by ``apt-get`` into a state of its own (nothing is
installed on this system) and verified by apt; the wheels are pinned with hashes. Each emulated processor has a root of
its own, because the runtimes read ``/proc/cpuinfo`` to choose kernels, and this machine's would crash them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from compressor.errors import ConfigError, TargetUnavailable
from compressor.types import write_atomic

Run = Callable[[list[str], str], None]
PYTHON = "3.11"  # of Debian 12, and of the wheels in the lock file
DEBS = (f"python{PYTHON}", "libstdc++6", "libgomp1")
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
_RECORD = "files.json"
_BASE = "fp asimd evtstrm aes pmull sha1 sha2 crc32"
# Features and part numbers: Linux' arm64 hwcaps; Arm Technical Reference Manuals, MIDR_EL1.
CPUS: Mapping[str, tuple[str, str]] = {
    "cortex-a72": ("0xd08", f"{_BASE} cpuid"),
    "cortex-a76": ("0xd0b", f"{_BASE} atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"),
}


def install(lock: Path, folder: Path, run: Run) -> None:
    """Fill ``folder``: ``root`` (Debian's arm64 files), ``site`` (wheels), a root per processor.

    Raises :class:`TargetUnavailable`.
    """
    for name in ("apt-get", "dpkg"):
        if shutil.which(name) is None:
            raise TargetUnavailable(f"{name} is not here", hint="The emulated Arm needs Debian or a system like it.")
    folder.mkdir(parents=True)
    if emulator(folder) is None:
        _unpack_emulator(folder, run)
    _unpack_debian(folder, run)
    _unpack_wheels(lock, folder, run)
    for cpu in CPUS:
        _make_root(folder, cpu)
    write_atomic(folder / _RECORD, json.dumps(dict(_digests(folder)), indent=0))


def emulator(folder: Path) -> Path | None:
    """qemu-user for aarch64: this system's, or the one in the tool chain."""
    found = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    own = folder / "qemu" / "usr" / "bin" / "qemu-aarch64-static"
    return Path(found) if found else own if own.is_file() else None


def _unpack_emulator(folder: Path, run: Run) -> None:
    place = folder / "emulator"
    place.mkdir()
    run(["env", "-C", str(place), "apt-get", "download", "qemu-user-static"], "fetch qemu-user-static")
    for package in place.glob("*.deb"):
        run(["dpkg", "-x", str(package), str(folder / "qemu")], "unpack qemu-user-static")
    shutil.rmtree(place)
    for path in (folder / "qemu" / "usr" / "bin").iterdir():
        if path.name != "qemu-aarch64-static":
            path.unlink()


def _unpack_debian(folder: Path, run: Run) -> None:
    """Debian's arm64 packages by an apt whose lists and cache lie in ``folder``; this system's are not touched."""
    apt = folder / "apt"
    for part in ("state/lists/partial", "cache/archives/partial"):
        (apt / part).mkdir(parents=True)
    (apt / "state" / "status").touch()
    lines = ['APT::Architecture "arm64";', 'APT::Architectures { "arm64"; };', 'APT::Sandbox::User "root";']
    lines += [f'Dir::State "{apt}/state";', f'Dir::State::status "{apt}/state/status";', f'Dir::Cache "{apt}/cache";']
    (apt / "apt.conf").write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = ["env", f"APT_CONFIG={apt}/apt.conf", "apt-get"]
    run([*command, "update"], "read Debian's list of arm64 packages")
    run([*command, "install", "-y", "-d", "--no-install-recommends", *DEBS], "fetch Debian's arm64 packages")
    for package in sorted((apt / "cache" / "archives").glob("*.deb")):
        run(["dpkg", "-x", str(package), str(folder / "root")], f"unpack {package.name}")
    shutil.rmtree(apt)


def _unpack_wheels(lock: Path, folder: Path, run: Run) -> None:
    place = folder / "wheels"
    tags = [word for name in PLATFORMS for word in ("--platform", name)]
    options = ["--require-hashes", "--no-deps", "--only-binary", ":all:", "--python-version", PYTHON, *tags]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "-d", str(place)]
    run([*command, *options, "-r", str(lock)], "fetch the aarch64 wheels")
    for wheel in sorted(place.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:  # its digest is the lock file's
            archive.extractall(folder / "site")
    shutil.rmtree(place)


def _make_root(folder: Path, cpu: str) -> None:
    """``root`` by links, with the ``/proc/cpuinfo`` of this processor."""
    root = folder / "roots" / cpu
    (root / "proc").mkdir(parents=True)
    for path in sorted((folder / "root").iterdir()):
        if path.name != "proc":
            (root / path.name).symlink_to(Path("../../root") / path.name)
    part, features = CPUS[cpu]
    facts = {
        "processor": "0",
        "Features": features,
        "CPU implementer": "0x41",
        "CPU architecture": "8",
        "CPU variant": "0x0",
        "CPU part": part,
        "CPU revision": "3",
    }
    text = "".join(f"{name}\t: {value}\n" for name, value in facts.items())
    (root / "proc" / "cpuinfo").write_text(text + "\n", encoding="utf-8")


def command(folder: Path, cpu: str, *words: str) -> tuple[list[str], dict[str, str]]:
    """Command and environment of the emulated Python. Raises :class:`ConfigError` for an unknown processor."""
    if cpu not in CPUS:
        hint = f"Known: {', '.join(CPUS)}."
        raise ConfigError.single("--cpu", "processor", f"`{cpu}` is not emulated here", hint=hint)
    qemu, root = emulator(folder), folder / "roots" / cpu
    if qemu is None:
        raise TargetUnavailable("qemu-aarch64 is not here", hint="Debian: apt install qemu-user-static")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "LD_", "QEMU"))}
    environment |= {"PYTHONPATH": str(folder / "site"), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    python = str(root / "usr" / "bin" / f"python{PYTHON}")
    return [str(qemu), "-cpu", cpu, "-L", str(root), python, *words], environment


def problems(lock: Path, folder: Path) -> Iterator[str]:  # noqa: ARG001  the wheels were checked when they came
    """Files against what was installed, and the emulator's presence."""
    if emulator(folder) is None:
        yield "qemu-aarch64 is not here (Debian: apt install qemu-user-static)"
    recorded: dict[str, str] = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    found = dict(_digests(folder))
    for name, digest in recorded.items():
        if found.get(name) != digest:
            yield f"{name} {'was changed after it was installed' if name in found else 'is missing'}"


def _digests(folder: Path) -> Iterator[tuple[str, str]]:
    for top in ("root", "site", "roots", "qemu"):
        for path in sorted((folder / top).rglob("*")):
            if path.is_file() and not path.is_symlink():
                yield path.relative_to(folder).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()
