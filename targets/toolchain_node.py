"""Tool chains that are npm packages: installed by ``npm ci`` from a lock file with integrity hashes, no scripts run."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from compressor.errors import TargetUnavailable
from compressor.types import write_atomic

_RECORD = "files.json"  # digests of what was installed
Run = Callable[[list[str], str], None]


def pins(lock: Path) -> dict[str, str]:
    """Version by name of what the lock file asks for itself (not of what that needs)."""
    packages = _packages(lock)
    return {name: packages[f"node_modules/{name}"]["version"] for name in packages[""]["dependencies"]}


def _packages(lock: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(lock.read_text(encoding="utf-8"))["packages"]
    return found


def install(lock: Path, folder: Path, run: Run) -> None:
    """Fill ``folder`` with ``node_modules``; ``run(command, doing)`` raises when npm fails."""
    npm = shutil.which("npm")
    if npm is None:
        raise TargetUnavailable("npm is not installed", hint="Install Node.js 18 or newer with npm.")
    folder.mkdir(parents=True)
    root = _packages(lock)[""]
    write_atomic(folder / "package.json", json.dumps({"private": True, **root}))
    shutil.copyfile(lock, folder / "package-lock.json")
    flags = ["--ignore-scripts", "--no-audit", "--no-fund", "--omit=dev"]
    run([npm, "ci", *flags, "--prefix", str(folder)], "install the npm packages")
    write_atomic(folder / _RECORD, json.dumps(dict(_digests(folder)), indent=0))


def problems(lock: Path, folder: Path) -> Iterator[str]:
    """Versions against the lock file, files against what was installed."""
    for place, wanted in _packages(lock).items():
        if not place:
            continue
        file = folder / place / "package.json"
        version = json.loads(file.read_text(encoding="utf-8"))["version"] if file.is_file() else None
        if version != wanted["version"]:
            yield f"{place} is {version or 'missing'}, the lock file says {wanted['version']}"
    recorded: dict[str, str] = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    found = dict(_digests(folder))
    for name, digest in recorded.items():
        if found.get(name) != digest:
            yield f"{name} {'was changed after it was installed' if name in found else 'is missing'}"


def _digests(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted((folder / "node_modules").rglob("*")):
        if path.is_file() and not path.is_symlink():
            yield path.relative_to(folder).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()
