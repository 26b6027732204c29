"""Write ``targets/report/schema.json`` from the types. A test fails when the file is not what this writes."""

from __future__ import annotations

import json
from pathlib import Path

from targets.report import json_schema

PATH = Path(__file__).parents[1] / "targets" / "report" / "schema.json"


def text() -> str:
    """The schema as it stands in the repository."""
    return json.dumps(json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
    print(PATH)
