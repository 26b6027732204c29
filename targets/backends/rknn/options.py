"""The ``[options]`` of a profile of target ``rknn``, and the chips that are known.

Source of the names: RKNN-Toolkit2 2.5.0, ``RKNN.config``, ``target_platform``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from compressor.config import Frozen, suggestion, validate
from compressor.profile import HardwareProfile

Positive = Annotated[float, Field(gt=0)]
CHIPS = (
    *("rk2118", "rk3562", "rk3566", "rk3568", "rk3576", "rk3588"),
    *("rv1103", "rv1103b", "rv1106", "rv1106b", "rv1126b"),
)
Cores = Literal["auto", "0", "1", "2", "0_1", "0_1_2", "all"]


class RknnOptions(Frozen):
    """Which chip, and how its compiler is set up."""

    chip: str
    npu_clock_mhz: Positive | None = None  # turns the compiler's cycles into a time; None: cycles only
    quantizer: Literal["normal", "mmse", "kl_divergence"] = (
        "normal"  # of the toolkit, for files that it quantizes itself
    )
    # None: 3, and 2 for a quantized file where 3 changes what it computes
    optimisation: Annotated[int, Field(ge=0, le=3)] | None = None
    cores: Cores = "auto"  # asked of the board's runtime by the packaged runner; only chips with several take others
    max_sequence: Annotated[int, Field(ge=1)] = 128
    timeout_s: Positive = 900
    memory_limit_mib: Positive = 8192

    @field_validator("chip")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in CHIPS:
            raise ValueError(f"unknown chip `{value}`{suggestion(value, CHIPS)}; known: {', '.join(CHIPS)}")
        return value


def options_of(profile: HardwareProfile) -> RknnOptions:
    """Raises :class:`ConfigError` for unknown keys and values."""
    return validate(RknnOptions, dict(profile.options), f"profile `{profile.name}`, options")
