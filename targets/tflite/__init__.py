"""ONNX to TFLite, written directly: no TensorFlow, no torch, half a second. See docs/targets/litert.md."""

from targets.tflite.convert import Converted, convert

__all__ = ["Converted", "convert"]
