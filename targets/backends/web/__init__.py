"""Target ``web``. See docs/targets/web.md."""

from targets.backends.web.backend import Web

__all__ = ["Web"]
