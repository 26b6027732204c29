"""Target ``ethos-u``. See docs/targets/ethos-u.md."""

from targets.backends.ethos_u.backend import EthosU

__all__ = ["EthosU"]
