"""One call of Vela and what it says: the compiled file, its estimates, what stayed on the CPU."""

from __future__ import annotations

import csv
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from compressor.errors import CompileError
from compressor.profile import HardwareProfile
from compressor.types import Measurement, Origin
from targets import toolchain
from targets.backends.ethos_u.options import EthosUOptions, configuration, options_of, section
from targets.base import OverLimit
from targets.isolation import Limits, call_worker
from targets.tflite.interface import operators

TOOLCHAIN = "ethos-u"
NPU_OPERATOR = "ethos-u"
_MEMORIES = (
    ("sram_memory_used", "SRAM"),
    ("dram_memory_used", "DRAM"),
    ("on_chip_flash_memory_used", "on-chip flash"),
    ("off_chip_flash_memory_used", "off-chip flash"),
)


@dataclass(frozen=True)
class Vela:
    """What Vela made. ``fallback``: ``OPERATOR tensor`` of every operation that the host processor runs."""

    path: Path
    configuration: Path
    summary: dict[str, str]
    fallback: tuple[str, ...]
    version: str


def vela_version() -> str | None:
    """Of the tool chain, else of this environment (``pip install ethos-u-vela``); None: neither has it."""
    if toolchain.is_ready(TOOLCHAIN):
        return toolchain.find(TOOLCHAIN).pins()["ethos-u-vela"]
    try:
        return version_of("ethos-u-vela")
    except PackageNotFoundError:
        return None


def run_vela(tflite: Path, profile: HardwareProfile) -> Vela:
    """Compile ``tflite``; files go beside it. Raises :class:`CompileError`, :class:`TargetUnavailable`."""
    options, out = options_of(profile), tflite.parent
    settings = out / f"{profile.name}.ini"
    settings.write_text(configuration(profile), encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="compress-vela-") as folder:
        arguments = _arguments(tflite, profile, options, settings, Path(folder))
        limits = Limits(options.timeout_s, options.memory_limit_mib)
        reply = _call({"action": "compile", "arguments": arguments}, limits)
        made = Path(folder) / f"{tflite.stem}_vela.tflite"
        if not made.is_file():
            raise CompileError(f"vela wrote no file: {reply['text'].strip()[-400:]}")
        path = out / made.name
        shutil.copyfile(made, path)
        summary = read_summary(next(Path(folder).glob("*_summary_*.csv"), None))
        for table in Path(folder).glob("*_per-layer.csv"):
            shutil.copyfile(table, out / table.name)
    left = tuple(f"{name} {tensor}" for name, tensor in operators(path) if name != NPU_OPERATOR)
    return Vela(path, settings, summary, left, reply["version"])


def _call(request: dict[str, Any], limits: Limits) -> dict[str, Any]:
    if toolchain.is_ready(TOOLCHAIN):
        return toolchain.call(TOOLCHAIN, request, limits, "vela")
    reply = call_worker(toolchain.command(TOOLCHAIN), request, limits, "vela", environment=toolchain.environment())
    if not reply.get("ok"):
        raise CompileError(f"vela failed: {reply.get('error', 'no reason given')}")
    return reply


def _arguments(
    tflite: Path, profile: HardwareProfile, options: EthosUOptions, settings: Path, folder: Path
) -> list[str]:
    name = section(profile)
    chosen = {
        "--accelerator-config": options.accelerator,
        "--config": str(settings.resolve()),
        "--system-config": name,
        "--memory-mode": name,
        "--optimise": options.optimise,
        "--output-dir": str(folder),
    }
    pairs = (word for pair in chosen.items() for word in pair)
    return [str(tflite.resolve()), *pairs, "--verbose-performance", "--show-cpu-operations"]


def read_summary(path: Path | None) -> dict[str, str]:
    """The one row of Vela's summary. Raises :class:`CompileError` when it is not there."""
    if path is None:
        raise CompileError("vela wrote no summary of its estimates")
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    if len(rows) != 1 or "inference_time" not in rows[0]:
        raise CompileError(f"vela's summary `{path.name}` has no estimate")
    return rows[0]


def estimates(made: Vela, profile: HardwareProfile, placed: int) -> tuple[Measurement, ...]:
    """Latency, cycles and memory as Vela's model of the NPU has them. CPU operations are not in the time.

    The figure in ms comes first: the gate compares candidates by it.
    """
    options = options_of(profile)
    device = f"{options.accelerator} at {options.core_clock_mhz:g} MHz, {options.memory_mode}, Vela {made.version}"
    share = f"{placed} operations on the NPU, {len(made.fallback)} on the CPU and not counted"

    def figure(value: float, unit: str, name: str) -> Measurement:
        return Measurement(value, unit, Origin.ESTIMATED, device, {"name": name, "counted": share})

    time_ms = float(made.summary["inference_time"]) * 1e3
    found = [figure(time_ms, "ms", "NPU time"), figure(float(made.summary["cycles_total"]), "cycles", "all cycles")]
    found.append(figure(float(made.summary["cycles_npu"]), "cycles", "NPU's own cycles"))
    for key, name in _MEMORIES:
        if used := float(made.summary[key]):
            found.append(figure(used, "KiB", name))
    return tuple(found)


def over_limits(made: Vela, options: EthosUOptions) -> tuple[OverLimit, ...]:
    """What the board has too little of. The flash must hold the whole file."""
    sram = float(made.summary["sram_memory_used"])
    flash = made.path.stat().st_size / 1024
    pairs = (("SRAM", sram, options.sram_kib), ("flash", flash, options.flash_kib))
    return tuple(
        OverLimit(f"it needs {used:.1f} KiB of {name}, the board has {limit:g}", used / limit - 1)
        for name, used, limit in pairs
        if limit is not None and used > limit
    )
