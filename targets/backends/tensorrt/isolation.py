"""The build worker as a child process; what all such children share is in :mod:`targets.isolation`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from targets import isolation
from targets.isolation import Limits

__all__ = ["Limits", "call_worker"]

_COMMAND = ("-m", "targets.backends.tensorrt.build_worker")


def call_worker(request: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """Send ``request`` to a fresh worker and return its reply.

    Raises :class:`CompileError` when it dies or hits a limit.
    """
    return isolation.call_worker(_COMMAND, request, limits, "the TensorRT build")
