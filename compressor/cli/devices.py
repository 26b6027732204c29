"""``--device PROFILE=ssh://user@host`` or ``adb://SERIAL``, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

from compressor.errors import ConfigError
from compressor.profile import HardwareProfile


def check_devices(words: Sequence[str], profiles: Sequence[HardwareProfile]) -> None:
    """Addresses that can be read, of profiles that are asked for and whose target runs over a network."""
    if not words:
        return
    from targets.registry import get
    from targets.remote import attach, parse_devices

    devices, names = parse_devices(words), [profile.name for profile in profiles]
    for name in devices:
        if name not in names:
            what = f"is not one of the profiles of this run ({', '.join(names)})"
            raise ConfigError.single("--device", name, what, hint="Give its profile by --profile too.")
    for profile in profiles:
        attach(get(profile.target), profile, devices)
