"""The ``[options]`` of a profile for the targets ``openvino`` and ``openvino-npu``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from compressor.config import Frozen, validate
from compressor.machine import usable_cores
from compressor.profile import HardwareProfile

# NPU_PLATFORM of the plugin (intel_npu/config in OpenVINO 2026.4): Meteor Lake, Lunar and Arrow Lake, Panther Lake.
Platform = Literal["NPU3720", "NPU4000", "NPU5010"]


class CpuOptions(Frozen):
    """Options of target ``openvino``.

    ``inference_precision`` is the arithmetic of everything that is not int8. OpenVINO's own default is bf16 wherever
    the processor has it, also for a file called fp32; here it is stated.
    """

    inference_precision: Literal["f32", "bf16", "f16"] = "f32"


class NpuOptions(Frozen):
    """Options of target ``openvino-npu``."""

    platform: Platform = "NPU4000"
    max_sequence: Annotated[int, Field(ge=1)] = 128  # NPUs take static shapes: length of a free sequence dimension
    timeout_s: Annotated[float, Field(gt=0)] = 600
    memory_limit_mib: Annotated[float, Field(gt=0)] = 8192


def cpu_options(profile: HardwareProfile) -> CpuOptions:
    """Raises :class:`ConfigError` for unknown keys and values."""
    return validate(CpuOptions, dict(profile.options), f"profile `{profile.name}`, options")


def npu_options(profile: HardwareProfile) -> NpuOptions:
    """Raises :class:`ConfigError` for unknown keys and values."""
    return validate(NpuOptions, dict(profile.options), f"profile `{profile.name}`, options")


def cpu_config(profile: HardwareProfile) -> dict[str, str | int]:
    """Properties for ``Core.compile_model``; on a stand-in never more threads than it has cores."""
    threads = profile.runtime.threads
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads if profile.here == "this-machine" else min(threads, usable_cores()),
        "INFERENCE_PRECISION_HINT": cpu_options(profile).inference_precision,
    }
