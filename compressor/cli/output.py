"""Text for people on stdout or stderr, JSON for programs; readable without colour."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from compressor.errors import CompressError, ProblemList


def stdout_json(data: Any) -> None:
    """Print a value as JSON."""
    print(json.dumps(data, indent=2, default=str, ensure_ascii=False))


def fail(error: CompressError) -> int:
    """Print an error with its hint on stderr (as JSON when the command was given ``--json``); its exit code."""
    if "--json" in sys.argv:
        detail: dict[str, Any] = {"error": type(error).__name__, "message": str(error), "hint": error.hint}
        if isinstance(error, ProblemList):
            detail["problems"] = [{"where": problem.where, "what": problem.what} for problem in error.problems]
        stdout_json({**detail, "exit_code": error.exit_code})
    print(f"error: {error}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
    return error.exit_code


def usage_error(error: Exception) -> int | None:
    """Exit code 2 for a wrong command line (typer's own errors); None when it is something else."""
    show, message = getattr(error, "show", None), getattr(error, "format_message", None)
    if show is None or message is None:
        return None
    print(f"error: {message()}\nhint: `compress-for-device --help` lists the commands and options.", file=sys.stderr)
    return 2


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """A plain table, wrapped to the terminal; columns of a pipe are never cut."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 200, soft_wrap=False)
    made = Table(*headers, title=title or None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        made.add_row(*map(Text, row))  # cells are no markup: `pip install 'x[train]'` keeps its brackets
    console.print(made)


def facts(pairs: Mapping[str, Any], indent: int = 2) -> None:
    """``name: value`` lines."""
    width = max((len(name) for name in pairs), default=0)
    for name, value in pairs.items():
        print(f"{' ' * indent}{name:<{width}}  {value}")


class Progress:
    """Listens to events: a live line with time left on a terminal, plain lines otherwise. Everything on stderr."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._live = sys.stderr.isatty() and not quiet
        self._open = False

    def __call__(self, name: str, data: Mapping[str, Any]) -> None:
        if self.quiet:
            return
        text = self._text(name, data)
        if text is None:
            return
        if name == "progress":
            if self._live:
                sys.stderr.write(f"\r\x1b[2K{text}")
                sys.stderr.flush()
                self._open = True
            return
        if self._open:
            sys.stderr.write("\r\x1b[2K")
            self._open = False
        print(text, file=sys.stderr, flush=True)

    @staticmethod
    def _text(name: str, data: Mapping[str, Any]) -> str | None:
        match name:
            case "stage-start":
                return f"{data['stage']}: {'resuming' if data.get('resumed') else 'working'} ..."
            case "stage-done":
                return f"{data['stage']}: " + ("reused" if data["reused"] else f"done in {data['seconds']:.1f} s")
            case "stage-wait":
                return f"{data['stage']}: waiting, {data['reason']}"
            case "seed":
                return str(data["text"])
            case "stage-damaged":
                return f"{data['stage']}: stored result is damaged and is made again"
            case "epoch-progress" | "epoch" | "bank" | "precision" | "warning" | "deploy" | "measure-progress":
                return "  " + str(
                    data.get("text") or ", ".join(f"{key} {_short(value)}" for key, value in data.items())
                )
            case _:
                return None


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
