"""Target ``tflite-micro``. See docs/targets/tflite-micro.md."""

from targets.backends.tflite_micro.backend import TfliteMicro

__all__ = ["TfliteMicro"]
