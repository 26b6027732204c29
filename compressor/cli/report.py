"""``report`` and ``package``: made again from a run folder, without computing anything."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from compressor.cli.output import stdout_json
from compressor.cli.run import exit_code, require_run, write_packages
from compressor.cli.summary import show
from compressor.errors import ConfigError


def report_command(run: Path, *, as_json: bool) -> int:
    """Print the table of a run and write its report files again."""
    from targets.report import from_json, to_json, write_report

    path = require_run(run)
    summary = from_json(path.read_text(encoding="utf-8"), path.parent)
    files = write_report(summary, path.parent)
    packages = {item.stem: str(item) for item in sorted((path.parent / "packages").glob("*.zip"))}
    if as_json:
        stdout_json(
            {
                "report_html": str(files["html"]),
                "packages": packages,
                "report": json.loads(to_json(summary, path.parent)),
            }
        )
    else:
        show(summary, {"report_html": files["html"], "packages": packages})
    return exit_code(summary)


def package_command(run: Path, profiles: Sequence[str], platforms: Sequence[str], *, as_json: bool) -> int:
    """Write the packages of a run again."""
    from targets.package import load_info
    from targets.report import from_json

    path = require_run(run)
    summary = from_json(path.read_text(encoding="utf-8"), path.parent)
    known = [outcome.profile for outcome in summary.outcomes]
    profiles = () if "all" in profiles else profiles
    if unknown := [name for name in profiles if name not in known]:
        what = f"`{unknown[0]}` is not in this run, which has {', '.join(known)}"
        raise ConfigError.single("the command line", "--profile", what)
    made = write_packages(summary, path.parent, load_info(path.parent), profiles, platforms)
    if as_json:
        stdout_json({"packages": made})
    else:
        for name, package in made.items():
            print(f"{package}  ({name})")
    return 0
