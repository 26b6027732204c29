"""``verify``: is a package what was packed, and does it answer as it did?"""

from __future__ import annotations

from pathlib import Path

from compressor.cli.output import stdout_json, table


def verify_command(package: Path, *, build: bool, as_json: bool) -> int:
    """Print every check; exit code 1 when one failed. A file that was changed is an error (exit code 2)."""
    from targets.package.builds import check_apps
    from targets.package.verify import Verdict, opened, verify

    with opened(package) as folder:
        manifest, checks = verify(folder)
        if build:
            checks += check_apps(folder, manifest)
    passed = all(check.verdict is not Verdict.FAILED for check in checks)
    if as_json:
        facts = [{"check": item.name, "verdict": item.verdict.value, "text": item.text} for item in checks]
        stdout_json({"package": str(package), "profile": manifest.profile, "passed": passed, "checks": facts})
    else:
        rows = [[item.name, item.verdict.value, item.text] for item in checks]
        table(["check", "verdict", "what was found"], rows, f"{manifest.name} for {manifest.title}: {package}")
    return 0 if passed else 1
