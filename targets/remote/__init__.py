"""Devices attached over a network: the same back end, the same timing loop, on the board itself. See docs/remote.md."""

from targets.remote.backend import attach, parse_devices

__all__ = ["attach", "parse_devices"]
