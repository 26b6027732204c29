"""Post-training quantization of ONNX files: choose variants, calibrate, quantize, prove. Needs no torch."""

from compressor.quantize.ptq import quantize
from compressor.quantize.variants import Variant, variants

__all__ = ["Variant", "quantize", "variants"]
