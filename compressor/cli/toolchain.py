"""``compress-for-device toolchain``: vendor tool chains in environments of their own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from compressor.cli.output import facts, stdout_json, table

Name = Annotated[str, typer.Argument(help="Tool chain, e.g. ethos-u.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
toolchain_app = typer.Typer(help="Vendor tool chains: install, list, verify, remove.", no_args_is_help=True)


@toolchain_app.command("list")
def list_command(json: Json = False) -> None:
    """List the tool chains, what is pinned, and what is installed. Works without a network."""
    from targets.toolchain import CATALOGUE, State, status

    found = [status(name) for name in sorted(CATALOGUE)]
    if json:
        stdout_json(
            [
                {
                    "name": item.toolchain.name,
                    "title": item.toolchain.title,
                    "licence": item.toolchain.licence,
                    "state": item.state.value,
                    "folder": str(item.folder),
                    "size_mib": round(item.size_mib, 1),
                    "versions": dict(item.versions),
                }
                for item in found
            ]
        )
        return
    rows = [
        [
            item.toolchain.name,
            item.state.value,
            f"{item.size_mib:.0f} MiB" if item.state is State.READY else "",
            ", ".join(f"{name} {version}" for name, version in item.versions.items()),
            item.toolchain.title,
        ]
        for item in found
    ]
    table(["tool chain", "on this machine", "size", "pinned", ""], rows)


@toolchain_app.command("install")
def install_command(
    name: Name,
    wheels: Annotated[Path | None, typer.Option("--wheels", help="Folder of wheel files; no network is used.")] = None,
    json: Json = False,
) -> None:
    """Install a tool chain from its lock file (hashes are checked) and verify it."""
    from targets.toolchain import install

    done = install(name, wheels=wheels, on_line=lambda line: print(line, file=sys.stderr, flush=True))
    if json:
        stdout_json({"name": name, "folder": str(done.folder), "versions": dict(done.versions)})
        return
    print(f"{name}: {done.state.value} and verified")
    facts({**done.versions, "size": f"{done.size_mib:.0f} MiB", "folder": done.folder})


@toolchain_app.command("verify")
def verify_command(name: Name, json: Json = False) -> None:
    """Check versions, every installed file against its recorded digest, and a call. Exit code 4: it does not work."""
    from compressor.errors import TargetUnavailable
    from targets.toolchain import hint, verify

    problems = verify(name)
    if json:
        stdout_json({"name": name, "works": not problems, "problems": list(problems)})
        raise typer.Exit(TargetUnavailable.exit_code if problems else 0)
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise TargetUnavailable(f"tool chain `{name}` does not work:{listed}", hint=hint(name))
    print(f"{name}: versions, files and a call are as they should be")


@toolchain_app.command("remove")
def remove_command(name: Name, json: Json = False) -> None:
    """Delete a tool chain's environments."""
    from targets.toolchain import remove

    gone = remove(name)
    if json:
        stdout_json({"name": name, "removed": [str(folder) for folder in gone]})
        return
    print("\n".join(f"removed {folder}" for folder in gone) or f"{name}: nothing was installed")
