"""Every registered objective has two exact checks and a mechanism check, and the index that says so is true."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from compressor.distil.objectives import registry

TESTS = Path(__file__).parents[3]
INDEX = tomllib.loads((TESTS / "data" / "objective_checks.toml").read_text(encoding="utf-8"))
CASES = "test_the_named_quantity_moves"  # one line of a table for each of many objectives


def written() -> dict[str, str]:
    """Name of each test of objectives -> the text of its file."""
    files = [*(TESTS / "unit" / "distil").rglob("test_*.py"), TESTS / "contract" / "test_objectives.py"]
    texts = [path.read_text(encoding="utf-8") for path in files]
    return {name: text for text in texts for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}


def test_every_objective_is_in_the_index_with_checks_that_exist():
    names, known = set(registry.names()), written()
    own = {name for name in names if registry.describe(name).source.startswith("compressor.")}
    assert own <= set(INDEX), "give a new objective two exact checks, a mechanism check and a line in the index"
    assert set(INDEX) <= names
    for name, entry in INDEX.items():
        assert len(set(entry["exact"])) >= 2, name
        missing = {*entry["exact"], entry["by"]} - set(known)
        assert not missing, f"{name}: {missing}"
        assert entry["moves"]
        if entry["by"] == CASES:
            assert re.search(rf'^    "{name}": ', known[CASES], re.MULTILINE), f"{name} is no case of {CASES}"
