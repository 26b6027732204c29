"""Packages: a folder and a .zip per profile that run with onnxruntime and numpy alone, and say what they promise."""

from __future__ import annotations

from targets.package.archive import unpack
from targets.package.bundle import write_package
from targets.package.info import PackageInfo, load_info, save_info
from targets.package.manifest import MANIFEST_VERSION, Manifest

__all__ = ["MANIFEST_VERSION", "Manifest", "PackageInfo", "load_info", "save_info", "unpack", "write_package"]
