"""Intel's OpenVINO: x86 and Arm processors, executed here, and Intel NPUs. See docs/targets/openvino.md."""

from targets.backends.openvino.cpu import OpenVino
from targets.backends.openvino.npu import OpenVinoNpu

__all__ = ["OpenVino", "OpenVinoNpu"]
