"""The ``[options]`` of a profile of target ``ethos-u``, and the system configuration that Vela reads."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from compressor.config import Frozen, validate
from compressor.profile import HardwareProfile

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Accelerator = Literal[
    "ethos-u55-32",
    "ethos-u55-64",
    "ethos-u55-128",
    "ethos-u55-256",
    "ethos-u65-256",
    "ethos-u65-512",
    "ethos-u85-128",
    "ethos-u85-256",
    "ethos-u85-512",
    "ethos-u85-1024",
    "ethos-u85-2048",
]
_AREAS = {  # where constants, tensors and the cache of tensors lie, by memory mode (vela.ini of Arm)
    "Sram_Only": ("Axi0", "Axi0", "Axi0"),
    "Shared_Sram": ("Axi1", "Axi0", "Axi0"),
    "Dedicated_Sram": ("Axi1", "Axi1", "Axi0"),
}


class Port(Frozen):
    """One memory as Vela models it: latencies and bursts in cycles of the NPU and bytes."""

    clock_scale: Positive  # bandwidth as a share of the NPU's own port
    burst_length: Annotated[int, Field(ge=1)]
    read_latency: Count
    write_latency: Count
    max_reads: Count | None = None
    max_writes: Count | None = None
    ports_used: Annotated[int, Field(ge=1)] | None = None


class EthosUOptions(Frozen):
    """An NPU and the memories around it. ``*_kib`` are limits of the board: what does not fit is rejected."""

    accelerator: Accelerator
    core_clock_mhz: Positive
    memory_mode: Literal["Sram_Only", "Shared_Sram", "Dedicated_Sram"] = "Shared_Sram"
    second_memory: Literal["OffChipFlash", "OnChipFlash", "Dram"] = "OffChipFlash"
    sram: Port
    second: Port
    arena_cache_kib: Positive | None = None
    sram_kib: Positive | None = None
    flash_kib: Positive | None = None
    optimise: Literal["Performance", "Size"] = "Performance"
    max_sequence: Annotated[int, Field(ge=1)] = 128
    timeout_s: Positive = 600
    memory_limit_mib: Positive = 8192


def options_of(profile: HardwareProfile) -> EthosUOptions:
    """Raises :class:`ConfigError` for unknown keys and values."""
    return validate(EthosUOptions, dict(profile.options), f"profile `{profile.name}`, options")


def section(profile: HardwareProfile) -> str:
    """The configuration's name in the file; Vela takes letters, digits and underscores."""
    return "".join(letter if letter.isalnum() else "_" for letter in profile.name)


def configuration(profile: HardwareProfile) -> str:
    """The ``.ini`` for Vela: one system configuration and one memory mode, both named after the profile."""
    options, name = options_of(profile), section(profile)
    lines = [f"[System_Config.{name}]", f"core_clock={options.core_clock_mhz * 1e6:.0f}"]
    lines += ["axi0_port=Sram", f"axi1_port={options.second_memory}"]
    for memory, port in (("Sram", options.sram), (options.second_memory, options.second)):
        lines += [f"{memory}_{key}={value}" for key, value in port.model_dump(exclude_none=True).items()]
    constants, arena, cache = _AREAS[options.memory_mode]
    lines += ["", f"[Memory_Mode.{name}]", f"const_mem_area={constants}", f"arena_mem_area={arena}"]
    lines.append(f"cache_mem_area={cache}")
    if options.arena_cache_kib is not None:
        lines.append(f"arena_cache_size={options.arena_cache_kib * 1024:.0f}")
    return "\n".join(lines) + "\n"
