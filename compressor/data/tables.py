"""Tables: csv, tsv, json, jsonl by the standard library (so they work in the light core and leave no cache behind);
parquet, saved data sets and hub ids through ``datasets``.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from compressor.config import suggestion
from compressor.data.images import EXTENSIONS
from compressor.data.raw import ONLY, RawPart
from compressor.errors import ConfigError
from compressor.recipe import DataConfig

SUFFIXES = frozenset({".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".txt", ".conll"})
LABELS = ("label", "labels", "class", "target", "category", "y", "tags", "ner_tags", "pos_tags")
TEXTS = (
    "text",
    "sentence",
    "review",
    "content",
    "document",
    "question",
    "sentence1",
    "premise",
    "title",
    "words",
    "tokens",
)
IMAGES = ("image", "img", "picture", "pixel_values", "file", "file_name", "path")
MAX_CELL = 16 * 2**20  # characters; the csv module's own limit of 128 Ki is too small for documents


@dataclass(frozen=True)
class Table:
    """Columns of one part; ``names`` are the class names of columns that have them."""

    columns: Mapping[str, Sequence[Any]]
    folder: Path | None = None  # file names in an image column are relative to it
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def read_table(path: Path) -> Table:
    """One file. :class:`ConfigError` names the file and line of a fault."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            return Table(_parquet(path), path.parent)
        with path.open(encoding="utf-8-sig", newline="") as stream:
            if suffix in (".csv", ".tsv"):
                return Table(_csv(path, stream, "\t" if suffix == ".tsv" else ","), path.parent)
            if suffix in (".jsonl", ".ndjson"):
                return Table(
                    _columns(path, (_json(path, line, i) for i, line in enumerate(stream, 1) if line.strip())),
                    path.parent,
                )
            if suffix == ".conll":
                return Table(_conll(path, stream), path.parent)
            if suffix == ".txt":
                return Table({"text": [line.rstrip("\r\n") for line in stream if line.strip()]}, path.parent)
            return Table(_json_table(path, _json(path, stream.read(), 1)), path.parent)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError.single(f"`{path}`", "data.source", f"cannot be read: {error}") from error


def _csv(path: Path, stream: Iterable[str], delimiter: str) -> dict[str, list[Any]]:
    csv.field_size_limit(MAX_CELL)
    reader = csv.DictReader(stream, delimiter=delimiter, strict=True)
    try:
        return _columns(path, _whole_rows(path, reader))
    except csv.Error as error:
        raise ConfigError.single(f"`{path}`", f"line {reader.line_num}", str(error)) from error


def _whole_rows(path: Path, reader: csv.DictReader[str]) -> Iterable[dict[str, Any]]:
    for row in reader:
        if None in row or None in row.values():
            what = f"has more or fewer than {len(reader.fieldnames or [])} fields"
            raise ConfigError.single(
                f"`{path}`", f"line {reader.line_num}", what, hint="The first line must name every column."
            )
        yield row


def _conll(path: Path, stream: Iterable[str]) -> dict[str, list[Any]]:
    """A word and its tag (first and last field) a line, an empty line between sentences, as in CoNLL-2003."""
    words: list[Any] = [[]]
    tags: list[Any] = [[]]
    for number, line in enumerate(stream, 1):
        fields = line.split()
        if not fields or fields[0] == "-DOCSTART-":
            words.append([])
            tags.append([])
        elif len(fields) < 2:
            raise ConfigError.single(f"`{path}`", f"line {number}", "has no tag", hint="A line is a word and its tag.")
        else:
            words[-1].append(fields[0])
            tags[-1].append(fields[-1])
    return {"words": [item for item in words if item], "tags": [item for item in tags if item]}


def _json(path: Path, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError.single(f"`{path}`", f"line {line}", f"is not JSON: {error}") from error


def _json_table(path: Path, data: Any) -> dict[str, list[Any]]:
    if isinstance(data, dict) and isinstance(data.get("data"), list):
        data = data["data"]
    if isinstance(data, dict) and data and all(isinstance(column, list) for column in data.values()):
        return data
    if not isinstance(data, list):
        raise ConfigError.single(f"`{path}`", "data.source", "is neither a list of objects nor an object of columns")
    return _columns(path, data)


def _columns(path: Path, rows: Iterable[Any]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {}
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or (number > 1 and row.keys() != columns.keys()):
            what = (
                "is not an object"
                if not isinstance(row, dict)
                else f"has the keys {', '.join(row)}, not {', '.join(columns)}"
            )
            raise ConfigError.single(f"`{path}`", f"row {number}", what)
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return columns


def _parquet(path: Path) -> dict[str, list[Any]]:
    try:
        import pyarrow  # type: ignore[import-untyped]
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError.single(
            f"`{path}`", "data.source", "parquet needs pyarrow", hint="pip install pyarrow"
        ) from error
    try:
        columns: dict[str, list[Any]] = parquet.read_table(path).to_pydict()
    except pyarrow.ArrowException as error:
        raise ConfigError.single(f"`{path}`", "data.source", f"is not a whole parquet file: {error}") from error
    return columns


def read_datasets(name: str, config: DataConfig, *, local: bool) -> dict[str, Table]:
    """A hub id, or a folder written by ``save_to_disk``, by part. Scripts (remote code) are never run."""
    try:
        import datasets
    except ImportError as error:
        hint = "pip install 'compress-for-device[train]', or give a csv, json or npz file."
        raise ConfigError.single(f"`{name}`", "data.source", "needs the package `datasets`", hint=hint) from error
    try:
        loaded = datasets.load_from_disk(name) if local else datasets.load_dataset(name, config.subset)
    except Exception as error:  # datasets raises its own, hub, arrow and builtin errors
        lines = str(error).splitlines() or [""]
        what = f"cannot be loaded: {type(error).__name__}: {lines[0][:200]}"
        hint = "Check the path or id; without a network give local files."
        raise ConfigError.single(f"`{name}`", "data.source", what, hint=hint) from error
    parts = loaded if isinstance(loaded, dict) else {"train": loaded}
    return {str(part): _from_datasets(table, datasets) for part, table in parts.items()}


def _from_datasets(table: Any, datasets: Any) -> Table:
    names: dict[str, tuple[str, ...]] = {}
    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
        elif isinstance(feature := getattr(feature, "feature", feature), datasets.ClassLabel):
            names[column] = tuple(feature.names)
    return Table({column: list(table[column]) for column in table.column_names}, None, names)


def _table_part(
    table: Table, config: DataConfig, subject: str, *, labelled: bool = True
) -> tuple[RawPart, tuple[str, ...]]:
    """A table as samples, labels (or targets) and domains, and the class names of its label column.

    Columns are those of the recipe, or found by their usual names. A table without text or pictures is a feature matrix
    float32 (N, F) of its other columns.
    """
    wanted, key = (config.target, "data.target") if config.target else (config.label, "data.label")
    label = _column(table, wanted, LABELS, key, subject) if labelled else None
    rest = [name for name in table.columns if name != label]
    labels: Any = table.columns[label] if label else None
    names = table.names.get(label, ()) if label else ()
    if labels is not None and names:
        labels = [_named(value, names) for value in labels]
    image = _column(table, config.image, IMAGES, "data.image", subject)
    if image and (config.image or _holds_pictures(table.columns[image])):
        return RawPart("files", _encoded(table, image, subject), labels), names
    paired = labelled or config.text in table.columns  # further text need not be pairs, nor its column have that name
    text = _column(table, config.text if paired else None, TEXTS, "data.text", subject) or _only_text(table, rest)
    if text:
        pair = config.text_pair if labelled or config.text_pair in table.columns else None
        second = _column(table, pair, (), "data.text_pair", subject)
        score = _column(table, config.score if labelled else None, (), "data.score", subject)
        texts = [*table.columns[text]]
        if texts and isinstance(texts[0], list | tuple):
            return RawPart("words", [tuple(map(str, words)) for words in texts], labels), names
        scores = table.columns[score] if score else None
        samples = [*zip(texts, table.columns[second], strict=True)] if second else texts
        return RawPart("texts", samples, labels, scores), names
    return RawPart("arrays", {ONLY: _matrix(table, rest, subject)}, labels), names


def table_part(
    table: Table, config: DataConfig, subject: str, *, labelled: bool = True
) -> tuple[RawPart, tuple[str, ...]]:
    """:func:`_table_part` without the column of domains, which stands beside the samples."""
    known = config.domain is not None and (labelled or config.domain in table.columns)  # further data may lack it
    domain = _column(table, config.domain, (), "data.domain", subject) if known else None
    if domain is None:
        return _table_part(table, config, subject, labelled=labelled)
    rest = replace(table, columns={name: cells for name, cells in table.columns.items() if name != domain})
    part, names = _table_part(rest, config, subject, labelled=labelled)
    return replace(part, domains=table.columns[domain]), names


def _named(value: Any, names: Sequence[str]) -> Any:
    """A class number as its name; lists item by item."""
    if isinstance(value, list):
        return [_named(item, names) for item in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def _column(table: Table, wanted: str | None, usual: Sequence[str], key: str, subject: str) -> str | None:
    if wanted is None:
        return next((name for name in usual if name in table.columns), None)
    if wanted not in table.columns:
        raise ConfigError.single(
            f"`{subject}`", key, f"there is no column `{wanted}`{suggestion(wanted, [*table.columns])}"
        )
    return wanted


def _only_text(table: Table, rest: Sequence[str]) -> str | None:
    """The one column of words, where there is exactly one."""
    found = [
        name
        for name in rest
        if any(isinstance(cell, str) and not _is_number(cell) for cell in table.columns[name][:50])
    ]
    return found[0] if len(found) == 1 else None


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _holds_pictures(column: Sequence[Any]) -> bool:
    if not len(column):
        return False
    first = column[0]
    return isinstance(first, bytes | dict) or (isinstance(first, str) and Path(first).suffix.lower() in EXTENSIONS)


def _encoded(table: Table, column: str, subject: str) -> list[bytes | Path]:
    found: list[bytes | Path] = []
    for row, cell in enumerate(table.columns[column]):
        value = (cell.get("bytes") or cell.get("path")) if isinstance(cell, dict) else cell
        if isinstance(value, str):
            value = (table.folder or Path()) / value
            if not value.is_file():
                raise ConfigError.single(f"`{subject}`", f"row {row + 1}", f"picture `{value}` does not exist")
        if not isinstance(value, bytes | Path):
            raise ConfigError.single(f"`{subject}`", f"row {row + 1}", f"`{column}` holds no picture")
        found.append(value)
    return found


def _matrix(table: Table, columns: Sequence[str], subject: str) -> np.ndarray:
    if not columns:
        raise ConfigError.single(
            f"`{subject}`", "data.source", "has no column of samples", hint="Give `data.text` or `data.image`."
        )
    matrix = []
    for name in columns:
        try:
            matrix.append(np.asarray(table.columns[name], dtype=np.float32))
        except (TypeError, ValueError) as error:
            what = f"column `{name}` is neither numbers nor the only text column"
            hint = f"Say which one holds the samples: `data.text` or `data.image`, one of {', '.join(columns)}."
            raise ConfigError.single(f"`{subject}`", "data.source", what, hint=hint) from error
    return np.stack(matrix, axis=1)
