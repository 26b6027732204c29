"""Float formats below float32: float16 and bfloat16 graphs, float8 pairs, and what would overflow in them."""

from compressor.quantize.floats.formats import FORMATS, HALVES, FloatFormat
from compressor.quantize.floats.make import make_float

__all__ = ["FORMATS", "HALVES", "FloatFormat", "make_float"]
