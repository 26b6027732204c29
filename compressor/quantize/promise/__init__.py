"""Accuracy as a promise: layers back to float until it holds, and the least loss under a size budget."""

from compressor.quantize.promise.bases import Base, FloatBase, IntegerBase
from compressor.quantize.promise.noise import Prospect
from compressor.quantize.promise.restore import Restored, restore
from compressor.quantize.promise.sensitivity import Sensitivity, sensitivities
from compressor.quantize.promise.size import Sized, TooSmall, fit_size

__all__ = [
    "Base", "FloatBase", "IntegerBase", "Prospect", "Restored", "Sensitivity", "Sized", "TooSmall", "fit_size",
    "restore", "sensitivities",
]  # fmt: skip
