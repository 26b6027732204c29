"""The ``[options]`` of a profile of target ``tflite-micro``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from compressor.config import Frozen, validate
from compressor.profile import HardwareProfile

Positive = Annotated[float, Field(gt=0)]


class TfliteMicroOptions(Frozen):
    """Memory of the board that the model may use: what does not fit is rejected."""

    ram_kib: Positive | None = None  # for the arena: RAM of the board less what the rest of the program takes
    flash_kib: Positive | None = None  # for the model: flash of the board less the program's code
    arena_margin: Annotated[float, Field(ge=1)] = 1.1  # the arena in the sample program, over what was recorded
    max_sequence: Annotated[int, Field(ge=1)] = 128
    timeout_s: Positive = 600
    memory_limit_mib: Positive = 4096


def options_of(profile: HardwareProfile) -> TfliteMicroOptions:
    """Raises :class:`ConfigError` for unknown keys and values."""
    return validate(TfliteMicroOptions, dict(profile.options), f"profile `{profile.name}`, options")
