"""``verify``: is a package what was packed, and does it answer as it did?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compressor.cli.output import stdout_json, table
from compressor.errors import ConfigError


@dataclass(frozen=True)
class Emulation:
    """Which processor, and which further inputs to answer there and here."""

    architecture: str
    cpu: str
    inputs: tuple[Path, ...] = ()


def emulation_of(architecture: str | None, cpu: str | None, inputs: Sequence[Path]) -> Emulation | None:
    """The options together. Raises :class:`ConfigError` for those that need ``--arch``, and for absent files."""
    if architecture is None:
        if cpu is not None or inputs:
            raise ConfigError.single("--cpu, --input", "--arch", "is needed beside them", hint="--arch arm64")
        return None
    for path in inputs:
        if not path.is_file():
            raise ConfigError.single("--input", str(path), "no such file")
    return Emulation(architecture, cpu or "cortex-a76", tuple(inputs))


def verify_command(package: Path, emulation: Emulation | None, *, build: bool, as_json: bool) -> int:
    """Print every check; exit code 1 when one failed. A file that was changed is an error (exit code 2)."""
    from targets.package.builds import check_apps
    from targets.package.verify import Verdict, opened, verify

    with opened(package) as folder:
        manifest, checks = verify(folder)
        if build:
            checks += check_apps(folder, manifest)
        if emulation is not None:
            from targets.package.emulation import check_emulated

            checks += check_emulated(folder, manifest, emulation.architecture, emulation.cpu, emulation.inputs)
    passed = all(check.verdict is not Verdict.FAILED for check in checks)
    if as_json:
        facts = [{"check": item.name, "verdict": item.verdict.value, "text": item.text} for item in checks]
        stdout_json({"package": str(package), "profile": manifest.profile, "passed": passed, "checks": facts})
    else:
        rows = [[item.name, item.verdict.value, item.text] for item in checks]
        table(["check", "verdict", "what was found"], rows, f"{manifest.name} for {manifest.title}: {package}")
    return 0 if passed else 1
