"""Delta packages: a fine-tuned update of a model as a small file beside the model that a device has already (Q4)."""

from compressor.quantize.delta.changes import tensors_file
from compressor.quantize.delta.make import Target, apply_delta, make_delta
from compressor.quantize.delta.report import Report, form

__all__ = ["Report", "Target", "apply_delta", "form", "make_delta", "tensors_file"]
