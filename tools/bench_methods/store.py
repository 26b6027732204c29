"""Scores on disk: what was measured is never measured again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tools.bench_methods.arms import Arm

Scores = Mapping[str, float]


class Store:
    """One JSON file: arm key -> the arm in words, its tuning on validation, and its test scores by seed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._found: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}

    def get(self, arm: Arm, kind: str, which: str) -> dict[str, float] | None:
        """Scores of one learning rate (``tuning``) or seed (``seeds``), or None."""
        found: dict[str, float] | None = self._found.get(arm.key, {}).get(kind, {}).get(which)
        return found

    def put(self, arm: Arm, kind: str, which: str, scores: Scores) -> None:
        """Keep scores; the file is replaced as a whole, so a kill leaves the old one."""
        entry = self._found.setdefault(arm.key, {"arm": asdict(arm)})
        entry.setdefault(kind, {})[which] = dict(scores)
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(self._found, indent=1))
        draft.replace(self.path)
