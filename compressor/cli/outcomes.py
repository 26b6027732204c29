"""A profile's outcome kept beside its compiled files, with the key of all that shaped it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from compressor.types import write_atomic

if TYPE_CHECKING:
    from targets.outcome import ProfileOutcome


def read_outcome(path: Path, key: str) -> ProfileOutcome | None:
    """The stored outcome, or None when there is none for this key or one of its files is gone."""
    from targets.outcome import ProfileOutcome

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["key"] != key:
            return None
        outcome = TypeAdapter(ProfileOutcome).validate_python(data["outcome"])
    except (OSError, ValueError, KeyError, ValidationError):
        return None
    compiled = [row.compiled for row in outcome.rows if row.compiled is not None]
    return outcome if all(item.path.exists() and item.artifact.path.exists() for item in compiled) else None


def write_outcome(path: Path, outcome: ProfileOutcome, key: str) -> None:
    """Store an outcome under its key."""
    from targets.outcome import ProfileOutcome

    data = TypeAdapter(ProfileOutcome).dump_python(outcome, mode="json")
    write_atomic(path, json.dumps({"key": key, "outcome": data}, indent=1))
