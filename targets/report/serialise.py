"""``report.json``: a :class:`RunSummary` as data and back, so that a report is rendered again without computing.

The file is the summary field by field, with two differences: artifacts stand once, in ``artifacts`` under their name,
and rows refer to them (a big model's layer facts would otherwise stand there once per row); and every path is
relative to the run folder, so that the folder can be moved.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from compressor.errors import ConfigError, Problem
from compressor.types import Figure, Measurement, Unavailable, write_atomic
from targets.outcome import PairedSeeds, ParityRow, ProfileOutcome, Row, RunSummary

SCHEMA_VERSION = "1.0"
_SUBJECT = "report.json"


def to_json(summary: RunSummary, folder: Path | None = None) -> str:
    """The whole summary as indented JSON.

    Paths are written relative to ``folder`` (the run folder) when it is given. A number that is not finite becomes an
    ``Unavailable`` with that reason: JSON has no NaN and neither has a report.
    """
    data = TypeAdapter(RunSummary).dump_python(finite(summary), mode="json")
    for row in data["parity"]:
        row["worst"] = row["worst"] if math.isfinite(row["worst"] or 0.0) else None
    if folder is not None:
        _map_paths(data, _relative_to(folder))
    document = {"schema_version": SCHEMA_VERSION, **_share_artifacts(data)}
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(text: str, folder: Path | None = None) -> RunSummary:
    """Read what :func:`to_json` wrote; relative paths are taken from ``folder``.

    Raises :class:`ConfigError` for anything that is not a report of this major version.
    """
    data = _parse(text)
    _check_version(data.pop("schema_version", None))
    try:
        _place_artifacts(data)
        for row in data.get("parity", []):
            row["worst"] = math.inf if row.get("worst") is None else row["worst"]
        if folder is not None:
            _map_paths(data, lambda path: os.path.normpath(folder / path))
    except (TypeError, AttributeError, KeyError) as error:
        raise ConfigError.single(_SUBJECT, "structure", f"is not that of a report ({error})") from error
    try:
        return TypeAdapter(RunSummary).validate_python(data)
    except ValidationError as error:
        found = [Problem(".".join(map(str, item["loc"])), item["msg"].lower()) for item in error.errors()]
        raise ConfigError(_SUBJECT, found, hint="Was the file edited by hand?") from None


def json_schema() -> dict[str, Any]:
    """The JSON schema (2020-12) of ``report.json``."""
    schema = TypeAdapter(RunSummary).json_schema(mode="validation")
    definitions = schema["$defs"]
    reference = {"type": "string", "description": "A key of the top-level `artifacts`."}
    definitions["Row"]["properties"]["artifact"] = reference
    definitions["Compiled"]["properties"]["artifact"] = reference
    worst = {"anyOf": [{"type": "number"}, {"type": "null"}], "description": "null: the difference was not finite"}
    definitions["ParityRow"]["properties"]["worst"] = worst
    artifacts = {"type": "object", "additionalProperties": {"$ref": "#/$defs/Artifact"}}
    version = {"type": "string", "pattern": r"^1\.\d+$", "description": "major.minor; readers refuse another major"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "compress-for-device report",
        "description": schema.get("description", ""),
        "type": "object",
        "properties": {"schema_version": version, "artifacts": artifacts, **schema["properties"]},
        "required": ["schema_version", "artifacts", *schema["required"]],
        "$defs": definitions,
    }


def finite(summary: RunSummary) -> RunSummary:
    """The same summary without a NaN or infinity in any figure: such a number is Unavailable, with that reason."""
    outcomes = tuple(
        dataclasses.replace(outcome, rows=tuple(_finite_row(row) for row in outcome.rows))
        for outcome in summary.outcomes
    )
    stages = tuple(dataclasses.replace(stage, metrics=_finite_map(stage.metrics)) for stage in summary.stages)
    parity = tuple(_finite_parity(row) for row in summary.parity)
    return dataclasses.replace(
        summary, outcomes=outcomes, stages=stages, parity=parity, paired_seeds=_finite_seeds(summary.paired_seeds)
    )


def _finite_seeds(found: PairedSeeds | None) -> PairedSeeds | None:
    if found is None:
        return None
    rows = tuple(
        dataclasses.replace(
            row,
            student_validation=_finite_figure(row.student_validation),
            twin_validation=_finite_figure(row.twin_validation),
            student_test=_finite_figure(row.student_test),
            twin_test=_finite_figure(row.twin_test),
        )
        for row in found.rows
    )
    return dataclasses.replace(
        found,
        rows=rows,
        teacher_validation=_finite_figure(found.teacher_validation),
        teacher_test=_finite_figure(found.teacher_test),
    )


def _finite_row(row: Row) -> Row:
    loyalty = row.loyalty
    if loyalty is not None and not math.isfinite(loyalty.label + loyalty.probability):
        loyalty = None
    agreement = row.agreement if row.agreement is not None and math.isfinite(row.agreement) else None
    return dataclasses.replace(
        row,
        loyalty=loyalty,
        agreement=agreement,
        validation=_finite_figure(row.validation),
        test=_finite_figure(row.test),
        latency=_finite_figure(row.latency),
        speedup=_finite_figure(row.speedup),
        file_bytes=_finite_figure(row.file_bytes),
        peak_memory=_finite_figure(row.peak_memory),
    )


def _finite_figure(figure: Figure) -> Figure:
    if not isinstance(figure, Measurement):
        return figure
    if not math.isfinite(figure.value):
        return Unavailable(f"the number from {figure.device} was not finite")
    return dataclasses.replace(figure, detail=_finite_map(figure.detail))


def _finite_map(values: Any) -> dict[str, float | int | str]:
    return {
        key: "not finite" if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }


def _finite_parity(row: ParityRow) -> ParityRow:
    return row if math.isfinite(row.worst) else dataclasses.replace(row, worst=math.inf, passed=False)


def _parse(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError.single(_SUBJECT, "syntax", str(error), hint="The file is damaged; run again.") from error
    if not isinstance(data, dict):
        raise ConfigError.single(_SUBJECT, "structure", "must be an object")
    return data


def _check_version(version: Any) -> None:
    if not isinstance(version, str) or version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        known = SCHEMA_VERSION.split(".")[0]
        raise ConfigError.single(
            _SUBJECT,
            "schema_version",
            f"`{version}` is not readable here; this release reads {known}.x",
            hint="Use the release of compress-for-device that wrote the report.",
        )


def _share_artifacts(data: dict[str, Any]) -> dict[str, Any]:
    """Move every artifact to one table and leave its key behind. The same name with other content gets a number."""
    table: dict[str, Any] = {}

    def key_of(artifact: dict[str, Any]) -> str:
        key, number = artifact["name"], 1
        while table.setdefault(key, artifact) != artifact:
            number += 1
            key = f"{artifact['name']}#{number}"
        return str(key)

    for row in _rows(data):
        row["artifact"] = key_of(row["artifact"])
        if row["compiled"] is not None:
            row["compiled"]["artifact"] = key_of(row["compiled"]["artifact"])
    return {"artifacts": table, **data}


def _place_artifacts(data: dict[str, Any]) -> None:
    table = data.pop("artifacts")
    for row in _rows(data):
        row["artifact"] = table[row["artifact"]]
        if row.get("compiled") is not None:
            row["compiled"]["artifact"] = table[row["compiled"]["artifact"]]


def _rows(data: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for outcome in data.get("outcomes", []) for row in outcome.get("rows", [])]


def _relative_to(folder: Path) -> Callable[[str], str]:
    root = folder.absolute()
    return lambda path: Path(os.path.relpath(Path(path).absolute(), root)).as_posix()


def _map_paths(data: dict[str, Any], change: Callable[[str], str]) -> None:
    """Apply ``change`` to every path of a dumped summary, artifacts shared between rows only once."""
    seen: set[int] = set()

    def apply(holder: dict[str, Any], key: str) -> None:
        if id(holder) not in seen:
            seen.add(id(holder))
            holder[key] = change(holder[key])

    for stage in data.get("stages", []):
        apply(stage, "folder")
    for row in _rows(data):
        apply(row["artifact"], "path")
        compiled = row.get("compiled")
        if compiled is not None:
            apply(compiled["artifact"], "path")
            apply(compiled, "path")
            for key in ("extra_files", "source_files"):
                compiled[key] = [change(path) for path in compiled.get(key, [])]


def write_outcome(path: Path, outcome: ProfileOutcome, key: str) -> None:
    """Keep the outcome of one profile under its content address; paths are relative to the file's folder."""
    holder: dict[str, Any] = {"outcomes": [TypeAdapter(ProfileOutcome).dump_python(outcome, mode="json")]}
    _map_paths(holder, _relative_to(path.parent))
    document = {"schema_version": SCHEMA_VERSION, "key": key, **_share_artifacts(holder)}
    write_atomic(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def read_outcome(path: Path, key: str) -> ProfileOutcome | None:
    """The outcome that :func:`write_outcome` kept, or None: not there, damaged, or made from something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.pop("key") != key or data.pop("schema_version") != SCHEMA_VERSION:
            return None
        _place_artifacts(data)
        _map_paths(data, lambda name: os.path.normpath(path.parent.absolute() / name))
        return TypeAdapter(ProfileOutcome).validate_python(data["outcomes"][0])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None
