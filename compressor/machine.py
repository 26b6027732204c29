"""What this machine is: processor, instruction sets, memory, load. Linux's /proc and the standard library, no torch."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# MIDR part numbers of Arm Ltd. cores (implementer 0x41): Linux arch/arm64/include/asm/cputype.h.
ARM_PARTS = {
    "0xd03": "Cortex-A53",
    "0xd04": "Cortex-A35",
    "0xd05": "Cortex-A55",
    "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72",
    "0xd09": "Cortex-A73",
    "0xd0a": "Cortex-A75",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse-N1",
    "0xd40": "Neoverse-V1",
    "0xd49": "Neoverse-N2",
}
# Instruction sets that change which kernels an inference runtime picks; everything else in the flags is left out.
KERNEL_FEATURES = (  # noqa: SIM905 - a list of 24 quoted words is harder to read
    "sse4_1 avx avx2 fma f16c avx512f avx512bw avx512vl avx512_vnni avx_vnni avx512_bf16 avx512_fp16 amx_tile amx_int8 "
    "amx_bf16 asimd asimdhp asimddp i8mm bf16 sve sve2 neon vfpv4"
).split()
INT8_DOT_X86 = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})  # multiply-add into 32 bits, no 16-bit saturation
ARCHITECTURES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64", "armv7l": "armv7"}
CPUINFO = "cat /proc/cpuinfo"
MEMINFO = "cat /proc/meminfo"


@dataclass(frozen=True)
class Machine:
    """What :func:`detect` found. ``cores`` are those this process may use, ``cores_total`` those that are online."""

    processor: str
    architecture: str
    cores: int
    cores_total: int
    features: tuple[str, ...]
    ram_mib: float | None
    system: str
    container: str  # "docker", "lxc" ... or empty
    load: tuple[float, float, float] | None

    @property
    def reduce_range(self) -> bool:
        """x86 without an int8 dot product sums pairs of products in saturating 16 bits: weights need 7 bits there."""
        return self.architecture == "x86_64" and not INT8_DOT_X86 & set(self.features)


def detect(root: Path = Path("/")) -> Machine:
    """Look at this machine. ``root`` is where /proc, /etc and /sys are looked for (tests bring their own)."""
    cpuinfo = parse_cpuinfo(_read(root / "proc/cpuinfo"))
    return Machine(
        processor=_processor(cpuinfo, _read(root / "proc/device-tree/model")),
        architecture=ARCHITECTURES.get(platform.machine().lower(), "none"),
        cores=usable_cores(),
        cores_total=os.cpu_count() or 1,
        features=features(cpuinfo),
        ram_mib=_ram_mib(_read(root / "proc/meminfo")),
        system=_system(_read(root / "etc/os-release")),
        container=_container(root),
        load=_load(),
    )


def usable_cores() -> int:
    """Cores that the scheduler may give this process (affinity aware)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def parse_cpuinfo(text: str) -> dict[str, str]:
    """First value of every key of /proc/cpuinfo, keys in lower case.

    >>> parse_cpuinfo("model name\\t: A\\n\\nmodel name\\t: B\\n")
    {'model name': 'A'}
    """
    values: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            values.setdefault(key.strip().lower(), value.strip())
    return values


def features(cpuinfo: Mapping[str, str]) -> tuple[str, ...]:
    """The instruction sets that matter for kernels, from the x86 ``flags`` or the Arm ``Features``."""
    flags = set((cpuinfo.get("flags") or cpuinfo.get("features") or "").split())
    return tuple(name for name in KERNEL_FEATURES if name in flags)


def complete(data: dict[str, Any], machine: Machine | None = None) -> dict[str, Any]:
    """A profile's data with what this machine is filled in; whatever the file states itself is kept.

    Every figure that was filled in gets an entry in ``sources`` that names the command it comes from.
    """
    machine = machine or detect()
    result = {**data}
    compute = {
        "processor": machine.processor,
        "architecture": machine.architecture,
        "cores": machine.cores,
        "features": list(machine.features),
    }
    filled = _fill(result, "compute", compute)
    if machine.reduce_range:
        filled += _fill(result, "quantization", {"reduce_range": True})
    memory = {} if machine.ram_mib is None else {"ram_mib": machine.ram_mib}
    sources = [*data.get("sources", [])]
    if filled:
        sources.append({"figures": filled, "title": "This machine's processor, as detected", "command": CPUINFO})
    if from_memory := _fill(result, "memory", memory):
        sources.append({"figures": from_memory, "title": "This machine's memory, as detected", "command": MEMINFO})
    return {**result, "sources": sources}


def _fill(data: dict[str, Any], table: str, values: Mapping[str, Any]) -> list[str]:
    """Add missing keys to a (copied) table; returns their dotted names."""
    stated = data.get(table, {})
    missing = {key: value for key, value in values.items() if key not in stated}
    if missing:
        data[table] = {**stated, **missing}
    return [f"{table}.{key}" for key in missing]


def facts(machine: Machine | None = None) -> dict[str, str]:
    """This machine in words, for the report."""
    machine = machine or detect()
    found = {
        "processor": machine.processor,
        "architecture": machine.architecture,
        "cores": f"{machine.cores} of {machine.cores_total} usable",
        "features": " ".join(machine.features) or "unknown",
        "memory": "unknown" if machine.ram_mib is None else f"{machine.ram_mib:.0f} MiB",
        "system": machine.system,
        "python": platform.python_version(),
        "load": "unknown" if machine.load is None else " ".join(f"{value:.2f}" for value in machine.load),
    }
    return found | ({"container": machine.container} if machine.container else {})


def _processor(cpuinfo: Mapping[str, str], board: str) -> str:
    name = cpuinfo.get("model name", "")
    if cpuinfo.get("cpu implementer") == "0x41":
        name = ARM_PARTS.get(cpuinfo.get("cpu part", ""), name)
    board = board.replace("\x00", "").strip()
    name = name or cpuinfo.get("hardware", "") or platform.processor() or platform.machine()
    return f"{board} ({name})" if board else name


def _ram_mib(meminfo: str) -> float | None:
    for line in meminfo.splitlines():
        if line.startswith("MemTotal:"):
            return round(int(line.split()[1]) / 1024)
    return None


def _system(release: str) -> str:
    pretty = next(
        (line.partition("=")[2].strip('"') for line in release.splitlines() if line.startswith("PRETTY_")), ""
    )
    return f"{pretty or platform.system()}, {platform.system()} {platform.release()}"


def _container(root: Path) -> str:
    if (root / ".dockerenv").exists():
        return "docker"
    if (root / "run/.containerenv").exists():
        return "podman"
    groups = _read(root / "proc/1/cgroup")
    return next((name for name in ("kubepods", "docker", "lxc", "containerd") if name in groups), "")


def _load() -> tuple[float, float, float] | None:
    try:
        return os.getloadavg()
    except OSError:
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
