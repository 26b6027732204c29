"""Find objectives by entry point. Names and documentation need no torch; only building one imports its module."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from compressor.config import suggestion
from compressor.errors import ConfigError, StageError

GROUP = "compress_for_device.objectives"


@dataclass(frozen=True)
class Description:
    """What ``compress-for-device methods show NAME`` prints."""

    name: str
    summary: str  # first line
    text: str  # formula, shapes, paper, defaults, worked number
    options: tuple[tuple[str, str, str], ...]  # name, type, default
    source: str  # module:class


@cache
def _entries() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def names() -> tuple[str, ...]:
    """All registered objectives, sorted."""
    return tuple(sorted(_entries()))


def unknown(name: str) -> str:
    """The sentence for a name that is not registered."""
    return f"unknown objective `{name}`{suggestion(name, names())}"


def get(name: str) -> type[Any]:
    """The class of an objective.

    Raises:
        ConfigError: the name is not registered.
        StageError: its module cannot be imported (no torch, for example).
    """
    entry = _entry(name)
    try:
        loaded = entry.load()
    except ImportError as error:
        raise StageError(
            f"the objective `{name}` cannot be loaded: {error}",
            hint="Install the training extra: pip install 'compress-for-device[train]'.",
        ) from error
    return loaded  # type: ignore[no-any-return]


def describe(name: str) -> Description:
    """Documentation of an objective, read from its source so that it works where torch is not installed."""
    entry = _entry(name)
    module, _, attribute = entry.value.partition(":")
    spec = importlib.util.find_spec(module)
    if spec is not None and spec.origin is not None and Path(spec.origin).suffix == ".py":
        found = _from_source(Path(spec.origin).read_text(encoding="utf-8"), attribute)
        if found is not None:
            return _description(name, entry.value, *found)
    loaded = get(name)
    fields = tuple((key, str(info.annotation), repr(info.default)) for key, info in loaded.Options.model_fields.items())
    return _description(name, entry.value, inspect.getdoc(loaded) or "", fields)


def _entry(name: str) -> EntryPoint:
    entry = _entries().get(name)
    if entry is None:
        raise ConfigError.single(
            "the recipe", "objective.use", unknown(name), hint="See `compress-for-device methods`."
        )
    return entry


def _description(name: str, value: str, text: str, options: tuple[tuple[str, str, str], ...]) -> Description:
    lines = text.strip().splitlines()
    return Description(name, lines[0] if lines else "", text, options, value)


def _from_source(source: str, attribute: str) -> tuple[str, tuple[tuple[str, str, str], ...]] | None:
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    node = classes.get(attribute)
    if node is None:
        return None
    return ast.get_docstring(node) or "", _options(node, classes)


def _options(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> tuple[tuple[str, str, str], ...]:
    """Fields of the nested ``Options`` class, or of the first base in the same file that has one."""
    for inner in node.body:
        if isinstance(inner, ast.ClassDef) and inner.name == "Options":
            fields = [part for part in inner.body if isinstance(part, ast.AnnAssign) and part.value is not None]
            return tuple(
                (ast.unparse(f.target), ast.unparse(f.annotation), ast.unparse(f.value)) for f in fields if f.value
            )
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes:
            return _options(classes[base.id], classes)
    return ()
