"""Outcomes in, documents out: ``report.json``, ``report.md`` and one self-contained ``report.html``."""

from __future__ import annotations

from pathlib import Path

from compressor.errors import ConfigError
from compressor.types import write_atomic
from targets.outcome import RunSummary
from targets.report.html import to_html
from targets.report.markdown import to_markdown
from targets.report.serialise import SCHEMA_VERSION, finite, from_json, json_schema, to_json

__all__ = [
    "SCHEMA_VERSION",
    "from_json",
    "json_schema",
    "read_report",
    "to_html",
    "to_json",
    "to_markdown",
    "write_report",
]


def write_report(summary: RunSummary, folder: Path) -> dict[str, Path]:
    """Write the three files into the run folder, each atomically; returns them by kind (``json``, ``md``, ``html``)."""
    clean = finite(summary)
    written = {
        "json": (folder / "report.json", to_json(clean, folder)),
        "md": (folder / "report.md", to_markdown(clean)),
        "html": (folder / "report.html", to_html(clean)),
    }
    for path, text in written.values():
        write_atomic(path, text)
    return {kind: path for kind, (path, _) in written.items()}


def read_report(folder: Path) -> RunSummary:
    """The summary of a run folder from its ``report.json``. Raises :class:`ConfigError` when there is none."""
    path = folder / "report.json"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        hint = "Give the run folder that `compress-for-device run` printed."
        raise ConfigError.single(f"`{path}`", "file", f"cannot be read: {error}", hint=hint) from error
    return from_json(text, folder.absolute())
