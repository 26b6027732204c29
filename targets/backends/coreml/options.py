"""The ``[options]`` of a profile of target ``coreml``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from compressor.config import Frozen, validate
from compressor.profile import HardwareProfile

Positive = Annotated[float, Field(gt=0)]


class CoreMlOptions(Frozen):
    """How the model is converted."""

    system: Literal["iOS17", "iOS18"] = "iOS17"  # the oldest that must load it; int8 activations need iOS17
    compute_units: Literal["all", "cpu", "cpu-and-gpu", "cpu-and-neural-engine"] = "all"  # asked by the packaged script
    max_sequence: Annotated[int, Field(ge=1)] = 128
    timeout_s: Positive = 900
    memory_limit_mib: Positive = 8192


def options_of(profile: HardwareProfile) -> CoreMlOptions:
    """Raises :class:`ConfigError` for unknown keys and values."""
    return validate(CoreMlOptions, dict(profile.options), f"profile `{profile.name}`, options")
