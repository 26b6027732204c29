"""Find out what a data source is and read its raw samples."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from compressor.config import suggestion
from compressor.data.images import SPLIT_NAMES, folder_parts, idx_parts
from compressor.data.raw import ONLY, RawData, RawPart
from compressor.data.tables import SUFFIXES, Table, read_datasets, read_table, table_part
from compressor.errors import ConfigError, PlanError
from compressor.models.entry import import_entry
from compressor.recipe import DataConfig
from compressor.types import Array

PARTS = ("train", "validation", "calibration", "test", "transfer", "fresh")
_LABEL_KEYS = ("y", "label", "labels", "target", "targets")
_WORD = {"x", "y", "images", "labels", "data", "targets"}

Parts = dict[str, RawPart]
Found = tuple[Parts, tuple[str, ...]]  # parts and class names


def read_raw(config: DataConfig, *, loader: str | None = None) -> RawData:
    """Read ``config.source`` (or call ``pkg.mod:loader``), the test and the transfer source.

    The parts are named as the source names them; ``train`` is always there. Raises :class:`ConfigError` for sources
    that cannot be read, :class:`PlanError` for empty parts and an unknown ``data.test``.
    """
    names: tuple[str, ...] = ()
    if loader is not None:
        parts = _call(loader)
        source = loader
    elif config.source is None:
        raise ConfigError.single(
            "the data", "data.source", "is required", hint="Give a folder, a file, a hub id or a loader."
        )
    else:
        parts, names = read_source(config.source, config)
        source = config.source
    parts = _choose_test(parts, config)
    if config.transfer is not None:
        parts["transfer"] = _transfer(config.transfer, config)
    if config.fresh is not None:
        found, _ = read_source(config.fresh, config)
        parts["fresh"] = found.get("test") or next(iter(found.values()))
    empty = [name for name, part in parts.items() if len(part) == 0]
    if empty or "train" not in parts:
        what = (
            f"the part {empty[0]} of `{source}` is empty"
            if empty
            else f"`{source}` has no part `train`: {', '.join(parts)}"
        )
        raise PlanError.single("data", what, hint="Each part needs at least one sample.")
    return RawData({name: part for name, part in parts.items() if name in PARTS}, names, source)


def _choose_test(parts: Parts, config: DataConfig) -> Parts:
    """``data.test`` names a part of the source, or another source."""
    if config.test is None:
        return dict(parts)
    own = SPLIT_NAMES.get(config.test, config.test)
    if own in parts:
        rest = {name: part for name, part in parts.items() if name not in (own, "test")}
        return {**rest, "test": parts[own]}
    if not _exists(config.test) and "/" not in config.test:
        what = f"`{config.test}` is neither a part of the source nor a path{suggestion(config.test, [*parts])}"
        raise PlanError.single("data.test", what)
    found, _ = read_source(config.test, config)
    return {**parts, "test": found.get("test") or next(iter(found.values()))}


def _transfer(source: str, config: DataConfig) -> RawPart:
    found, _ = read_source(source, config, labelled=False)
    return replace(found.get("train") or next(iter(found.values())), labels=None)


def _exists(name: str) -> bool:
    return Path(name).expanduser().exists()


def read_source(name: str, config: DataConfig, *, labelled: bool = True) -> Found:
    """Parts of one folder, file or hub id, and the class names where the source gives them an order."""
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(path, config, labelled)
    if path.is_file():
        return _file(path, config, labelled)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix.lower() in SUFFIXES | {".npz"}:
        raise ConfigError.single(f"`{name}`", "data.source", "does not exist", hint="Check the path.")
    return _tables(read_datasets(name, config, local=False), config, name, labelled)


def _folder(path: Path, config: DataConfig, labelled: bool) -> Found:
    if parts := idx_parts(path):
        return parts, ()
    if any((path / mark).is_file() for mark in ("dataset_dict.json", "state.json")):
        return _tables(read_datasets(str(path), config, local=True), config, str(path), labelled)
    files = {file.stem.lower(): file for file in sorted(path.iterdir()) if file.suffix.lower() in SUFFIXES - {".txt"}}
    tables = {SPLIT_NAMES[stem]: file for stem, file in files.items() if stem in SPLIT_NAMES}
    if not tables and len(files) == 1:
        tables = {"train": next(iter(files.values()))}
    if tables:
        return _tables({part: read_table(file) for part, file in tables.items()}, config, str(path), labelled)
    if parts := folder_parts(path):
        names = {str(label) for part in parts.values() for label in (part.labels if part.labels is not None else ())}
        return parts, tuple(sorted(names))
    what = "holds no IDX files, no pictures in class folders and no train/test tables"
    raise ConfigError.single(f"`{path}`", "data.source", what, hint=f"Tables end in {', '.join(sorted(SUFFIXES))}.")


def _file(path: Path, config: DataConfig, labelled: bool) -> Found:
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return _npz(path), ()
    if suffix in SUFFIXES:
        return _tables({"train": read_table(path)}, config, str(path), labelled)
    what = f"is a `{suffix or 'nameless'}` file; known are {', '.join(sorted(SUFFIXES | {'.npz'}))}"
    raise ConfigError.single(f"`{path}`", "data.source", what, hint="Convert it, or give `--data pkg.mod:loader`.")


def _tables(tables: Mapping[str, Table], config: DataConfig, subject: str, labelled: bool) -> Found:
    parts: Parts = {}
    names: tuple[str, ...] = ()
    for part, table in tables.items():
        name = SPLIT_NAMES.get(part, part)
        parts[name], found = table_part(table, config, subject, labelled=labelled)
        names = names or found
    return parts, names


def _npz(path: Path) -> Parts:
    """``x_train y_train x_test y_test`` (any order of the two words), or one unsplit set with its labels in ``y``."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        hint = "Save plain number arrays with np.savez." if "pickle" in str(error) else "Write it again."
        raise ConfigError.single(f"`{path}`", "data.source", f"cannot be read safely: {error}", hint=hint) from error
    groups: dict[str, dict[str, Array]] = {}
    for name, array in arrays.items():
        part, rest = _npz_name(name)
        groups.setdefault(part, {})[rest] = array
    return {part: _part(*_take_labels(columns), f"`{path}`") for part, columns in groups.items()}


def _npz_name(name: str) -> tuple[str, str]:
    words = name.lower().split("_")
    for place in (0, -1):
        if len(words) == 2 and words[place] in SPLIT_NAMES and words[-1 - place] in _WORD:
            return SPLIT_NAMES[words[place]], words[-1 - place]
    return "train", name


def _take_labels(columns: dict[str, Array]) -> tuple[Any, Array | None]:
    key = next((key for key in _LABEL_KEYS if key in columns), None)
    inputs = {name: array for name, array in columns.items() if name != key}
    return (next(iter(inputs.values())) if len(inputs) == 1 else inputs), (columns[key] if key else None)


def _call(loader: str) -> Parts:
    """Run the user's loader: no arguments, a mapping of part -> (inputs, labels), labels may be None."""
    function = import_entry(loader, "loader")
    try:
        made = function()
    except Exception as error:
        raise ConfigError.single(
            f"`{loader}`", "loader", f"failed: {type(error).__name__}: {error}", hint="Mend the loader."
        ) from error
    good = (
        isinstance(made, Mapping)
        and made
        and all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in made.values())
    )
    if not good:
        what = f"returned a {type(made).__name__}, not a mapping of part -> (inputs, labels)"
        raise ConfigError.single(f"`{loader}`", "loader", what, hint="For instance {'train': (x, y), 'test': (x, y)}.")
    unknown = [str(name) for name in made if name not in PARTS]
    if unknown:
        raise ConfigError.single(f"`{loader}`", "loader", f"unknown part `{unknown[0]}`{suggestion(unknown[0], PARTS)}")
    return {str(name): _part(inputs, labels, f"`{loader}`") for name, (inputs, labels) in made.items()}


def _part(inputs: Any, labels: Any, subject: str) -> RawPart:
    """Arrays, texts or arrays by name, with labels, as a :class:`RawPart`."""
    labels = None if labels is None else labels if isinstance(labels, list | tuple) else np.asarray(labels)
    part = _samples(inputs, labels, subject)
    lengths = {len(column) for column in part.samples.values()} if isinstance(part.samples, Mapping) else {len(part)}
    if len(lengths) > 1 or (labels is not None and len(labels) != len(part)):
        what = (
            f"{' and '.join(map(str, sorted(lengths)))} inputs but {len(labels) if labels is not None else 'no'} labels"
        )
        raise ConfigError.single(subject, "data", what, hint="Inputs and labels must have the same length.")
    return part


def _samples(inputs: Any, labels: Any, subject: str) -> RawPart:
    if isinstance(inputs, Mapping):
        return RawPart("arrays", {str(name): np.asarray(column) for name, column in inputs.items()}, labels)
    if isinstance(inputs, list | tuple) and len(inputs) and isinstance(inputs[0], str | tuple):
        return RawPart("texts", list(inputs), labels)
    if isinstance(inputs, list | tuple) and len(inputs) and isinstance(inputs[0], bytes | Path):
        return RawPart("files", list(inputs), labels)
    nested = isinstance(inputs, list | tuple) and len(inputs) and isinstance(inputs[0], list) and inputs[0]
    if nested and isinstance(inputs[0][0], str):
        return RawPart("words", [tuple(words) for words in inputs], labels)
    array = np.asarray(inputs)
    if array.dtype.kind not in "fiub" or array.ndim == 0:
        raise ConfigError.single(
            subject, "data", f"inputs are {array.dtype} {array.shape}, not arrays of numbers or texts"
        )
    if array.dtype == np.uint8 and array.ndim in (3, 4):
        return RawPart("pictures", array if array.ndim == 4 else array[..., None], labels)
    return RawPart("arrays", {ONLY: array}, labels)
