"""Which rows of the methods catalogue are built, which are a recipe, which are not offered. Data; needs no torch."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from compressor.distil.objectives import registry
from compressor.distil.objectives.base import Counts, Needs

FILE = Path(__file__).with_name("catalogue.toml")
PAPERS = Path(__file__).with_name("papers.toml")
Status = Literal["built", "recipe", "not offered"]
# What a classifier of the usual kind offers: enough to ask an objective what it would read.
USUAL: Counts = {
    "hidden": 4, "qkv": 3, "q": 3, "k": 3, "v": 3, "attn": 3, "pooled": 1, "logits": 1, "mask": 1, "tokens": 1,
}  # fmt: skip
FAMILIES = {
    "logits": "output distributions",
    "decoupled": "output distributions",
    "batchwise": "output distributions",
    "multilabel": "several labels a sample",
    "listwise": "rankings and lists",
    "ranking": "rankings and lists",
    "features": "features and attention",
    "relations": "features and attention",
    "filters": "features and attention",
    "masked": "language models",
    "contrast": "features and attention",
    "ladder": "features and attention",
    "layerwise": "features and attention",
    "prepared": "features and attention",
    "embedding": "sentence embeddings",
    "sequence": "language models",
    "crossvocab": "language models",
    "vocabularies": "language models",
    "heads": "heads and exits of the student",
    "exits": "heads and exits of the student",
}


@dataclass(frozen=True)
class Row:
    """One row of the catalogue."""

    id: str
    title: str
    status: Status
    built: tuple[str, ...] = ()  # objectives
    part: str = ""  # another part of the tool that carries it
    recipe: str = ""
    reason: str = ""  # why it is not offered
    note: str = ""
    paper: str = ""
    what: str = ""
    when: str = ""
    names: tuple[str, ...] = ()  # under which people look for it

    @property
    def text(self) -> str:
        """A recipe to paste: its own, or that of the first objective that carries it; empty when there is none."""
        return self.recipe or (recipe_of(self.built[0]) if self.built else "")


@cache
def _data() -> dict[str, Any]:
    return tomllib.loads(FILE.read_text(encoding="utf-8"))


@cache
def rows() -> tuple[Row, ...]:
    """All rows in the catalogue's order."""
    return tuple(_row(name, item) for name, item in _data()["rows"].items())


@cache
def _papers() -> dict[str, Any]:
    return tomllib.loads(PAPERS.read_text(encoding="utf-8"))


def _row(name: str, item: dict[str, Any]) -> Row:
    carried = "built" in item or "part" in item
    status: Status = "not offered" if "not_offered" in item else "built" if carried else "recipe"
    more = _papers().get(name, {})
    return Row(
        name,
        item["title"],
        status,
        tuple(item.get("built", ())),
        item.get("part", ""),
        item.get("recipe", "").strip(),
        item.get("not_offered", ""),
        item.get("note", ""),
        more.get("paper", ""),
        " ".join(more.get("what", "").split()),
        more.get("when", ""),
        tuple(more.get("names", ())),
    )


def find(name: str) -> tuple[Row, ...]:
    """The rows that an id (``X1``), a paper's short name (``GKD``) or words of a title mean; several if it is unclear.

    An id wins over a name, a name over the beginning of a title, that over words in it.
    """
    wanted = name.casefold().strip()
    plain = re.sub(r"[^a-z0-9]+", "", wanted)
    if not plain:
        return ()
    tests: tuple[Callable[[Row], bool], ...] = (
        lambda row: row.id.casefold() == wanted,
        lambda row: plain in {re.sub(r"[^a-z0-9]+", "", known.casefold()) for known in row.names},
        lambda row: re.sub(r"[^a-z0-9]+", "", row.title.partition(":")[0].casefold()) == plain,
        lambda row: wanted in row.title.casefold() or wanted in row.paper.casefold(),
    )
    for test in tests:
        found = tuple(row for row in rows() if test(row))
        if found:
            return found
    return ()


def known_names() -> tuple[str, ...]:
    """Everything ``methods show`` understands: objectives, ids and short names of papers."""
    return (*registry.names(), *(row.id for row in rows()), *(known for row in rows() for known in row.names))


def parts_of(recipe: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The objectives that a recipe names, and the keys of its stages that do the rest (``rollouts``, ``strategy``)."""
    stages = tomllib.loads(recipe).get("stage", []) if recipe else []
    used = {item["use"]: None for stage in stages for item in stage.get("objective", [])}
    plain = {"kind", "objective", "labels", "epochs", "batch", "learning_rate", "weight_decay"}
    keys = {key: None for stage in stages for key in stage if key not in plain}
    return tuple(used), tuple(keys)


def ids_of(objective: str) -> tuple[str, ...]:
    """The catalogue's rows that an objective carries."""
    return tuple(row.id for row in rows() if objective in row.built)


def family(objective: str) -> str:
    """The group that ``methods list`` shows an objective under."""
    module = registry.describe(objective).source.partition(":")[0]
    return FAMILIES.get(module.rpartition(".")[2], "from other packages")


def recipe_of(objective: str) -> str:
    """A recipe to paste: the stages (and further teachers) that use an objective, valid as they stand."""
    own = _data().get("objectives", {}).get(objective)
    if own is not None:
        return str(own["recipe"]).strip()
    return f'[[stage]]\nkind = "distil"\nlabels = 0.5\n\n[[stage.objective]]\nuse = "{objective}"\nweight = 0.5'


def asks_for(objective: str) -> tuple[str, ...]:
    """Where the values come from that an objective needs beside signals, labels and masks; empty for most."""
    from compressor.distil.terms import SOURCES

    needs = needs_of(objective)
    return tuple(SOURCES[field] for field in sorted(needs.batch) if field in SOURCES) if needs is not None else ()


def when_of(text: str) -> str:
    """The ``When:`` line of an objective's documentation, joined; empty when there is none."""
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("When:"):
            lines = [line.removeprefix("When:").strip()]
        elif lines and (not line.strip() or ":" in line.split(" ")[0] or line.startswith(("Worked ", "Defaults"))):
            break
        elif lines:
            lines.append(line.strip())
    return " ".join(lines)


def needs_of(objective: str) -> Needs | None:
    """What the objective would read of two usual classifiers, or None where its default match does not fit them.

    Raises:
        StageError: torch is not installed.
    """
    built = registry.get(objective)()
    return None if built.bind(USUAL, USUAL) else built.needs
