"""ExecuTorch with XNNPACK: phones, boards, and this machine. See docs/targets/executorch.md."""

from targets.backends.executorch.backend import ExecuTorch

__all__ = ["ExecuTorch"]
