"""Load a teacher and name its signals.

The names are looked up on first use, so that importing the package (for an ONNX-only job, or ``--help``) does not
import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressor.models.inspection import Inspection, inspect_model
    from compressor.models.load import load_model
    from compressor.models.signals import SignalTap, available
    from compressor.models.types import ImageInput, LoadedModel, Provenance, RawInput, TextInput

_HOMES = {
    "Inspection": "inspection",
    "inspect_model": "inspection",
    "load_model": "load",
    "SignalTap": "signals",
    "available": "signals",
    "ImageInput": "types",
    "LoadedModel": "types",
    "Provenance": "types",
    "RawInput": "types",
    "TextInput": "types",
}

__all__ = [
    "ImageInput",
    "Inspection",
    "LoadedModel",
    "Provenance",
    "RawInput",
    "SignalTap",
    "TextInput",
    "available",
    "inspect_model",
    "load_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
