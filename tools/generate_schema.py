"""Write ``profiles/schema.json`` from the pydantic model of a hardware profile. `--check` only compares."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from compressor.profile import HardwareProfile
from compressor.types import write_atomic

SCHEMA = Path(__file__).parent.parent / "profiles" / "schema.json"


def schema_text() -> str:
    """The JSON schema as it should lie on disk."""
    return json.dumps(HardwareProfile.model_json_schema(), indent=2, sort_keys=True) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 when the file is stale")
    if parser.parse_args().check:
        fresh = SCHEMA.is_file() and SCHEMA.read_text(encoding="utf-8") == schema_text()
        print(f"{SCHEMA.name} is {'up to date' if fresh else 'stale: run python -m tools.generate_schema'}")
        return 0 if fresh else 1
    write_atomic(SCHEMA, schema_text())
    print(f"wrote {SCHEMA}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
