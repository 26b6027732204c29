"""Accuracy as a promise: which layers int8 hurts, and which of them go back to float until the promise holds."""

from compressor.quantize.promise.restore import Restored, restore
from compressor.quantize.promise.sensitivity import Sensitivity, sensitivities

__all__ = ["Restored", "Sensitivity", "restore", "sensitivities"]
