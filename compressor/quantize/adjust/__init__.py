"""Changes to the float graph, exact or measured, that make its int8 form more accurate. numpy only, no torch."""

from compressor.quantize.adjust.search import Adjusted, quantize_best

__all__ = ["Adjusted", "quantize_best"]
