"""Target ``qnn``. See docs/targets/qnn.md."""

from targets.backends.qnn.backend import Qnn

__all__ = ["Qnn"]
