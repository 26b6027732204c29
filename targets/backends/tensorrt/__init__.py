"""NVIDIA GPUs: TensorRT-RTX engines built anywhere, enterprise TensorRT on the device. See README.md in this folder."""

from targets.backends.tensorrt.backend import TensorRt

__all__ = ["TensorRt"]
