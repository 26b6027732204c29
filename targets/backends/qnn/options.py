"""The ``[options]`` of a profile of target ``qnn``, and the systems on chip that are known.

Source of ids and architectures: ExecuTorch, backends/qualcomm/serialization/qc_schema.py (after Qualcomm's table
"Supported Snapdragon Devices"). The library itself takes any number in silence, so names are checked here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator

from compressor.config import Frozen, suggestion, validate
from compressor.profile import HardwareProfile

Positive = Annotated[float, Field(gt=0)]
Mode = Literal["default", "burst", "balanced", "high_performance", "sustained_high_performance", "power_saver"]


@dataclass(frozen=True)
class Soc:
    """A system on chip: Qualcomm's number for it and the version of its Hexagon tensor processor."""

    number: int
    architecture: int


SOCS = {
    "SM8350": Soc(30, 68),
    "SM8450": Soc(36, 69),
    "SM8475": Soc(42, 69),
    "SM8550": Soc(43, 73),
    "SM8650": Soc(57, 75),
    "SM8750": Soc(69, 79),
    "SM8850": Soc(87, 81),
    "QCM6490": Soc(93, 68),
    "QCS9100": Soc(77, 73),
    "SA8255": Soc(52, 73),
    "SA8295": Soc(39, 68),
    "SXR2330P": Soc(75, 79),
}


class QnnOptions(Frozen):
    """Which chip, and how the compiler and the device are set up."""

    soc: str
    optimisation: Annotated[int, Field(ge=1, le=3)] = 3  # htp_graph_finalization_optimization_mode
    performance_mode: Mode = "burst"  # asked of the device by the package; the simulator has no clock
    max_sequence: Annotated[int, Field(ge=1)] = 128
    timeout_s: Positive = 900
    memory_limit_mib: Positive = 8192

    @field_validator("soc")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in SOCS:
            raise ValueError(
                f"unknown system on chip `{value}`{suggestion(value, tuple(SOCS))}; known: {', '.join(SOCS)}"
            )
        return value

    @property
    def chip(self) -> Soc:
        return SOCS[self.soc]


MODES = get_args(Mode)


def options_of(profile: HardwareProfile) -> QnnOptions:
    """Raises :class:`ConfigError` for unknown keys and values."""
    return validate(QnnOptions, dict(profile.options), f"profile `{profile.name}`, options")
