"""The ``[options]`` of a profile of target ``web``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from compressor.config import Frozen, validate
from compressor.profile import HardwareProfile


class WebOptions(Frozen):
    """How long the browser may take. Threads are the profile's ``runtime.threads``."""

    timeout_s: Annotated[float, Field(gt=0)] = 300  # for one batch, and for the page to load


def options_of(profile: HardwareProfile) -> WebOptions:
    """Raises :class:`ConfigError` for unknown keys and values."""
    return validate(WebOptions, dict(profile.options), f"profile `{profile.name}`, options")
