"""Weights alone in few bits: the grid and its methods, layer by layer, on models that need not fit into memory."""

from compressor.quantize.weights.grid import Bits, Codes, dequantized, packed, round_to_nearest
from compressor.quantize.weights.layers import quantize_weights
from compressor.quantize.weights.methods import METHODS, Inputs, Method

__all__ = [
    "METHODS", "Bits", "Codes", "Inputs", "Method", "dequantized", "packed", "quantize_weights", "round_to_nearest",
]  # fmt: skip
