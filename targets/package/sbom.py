"""Software bill of materials: CycloneDX 1.6 in JSON, written by hand (a few fixed records do not need a library)."""

from __future__ import annotations

import re
import uuid
from typing import Any

from compressor.types import Measurement
from targets.outcome import Row
from targets.package.manifest import Manifest
from targets.package.platforms import MAVEN, SWIFT, SWIFT_VERSION, runtime_of

_SPACE = uuid.UUID("6f2b7f0a-3c49-5f0e-9f5e-6a1d3a1c9f54")  # ours, so that serial numbers are the same every time
# SPDX identifiers that are written as such; everything else goes in as a plain name, which the format allows.
KNOWN_LICENCES = {
    name.lower(): name
    for name in (
        "Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "ISC", "MPL-2.0", "GPL-2.0-only", "GPL-3.0-only",
        "LGPL-3.0-only", "AGPL-3.0-only", "CC0-1.0", "CC-BY-4.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0",
        "CC-BY-NC-SA-4.0", "Unlicense",
    )
}  # fmt: skip
RUNTIME = {"onnxruntime": "MIT", "numpy": "BSD-3-Clause"}


def bill_of_materials(manifest: Manifest, row: Row) -> dict[str, Any]:
    """The package, its model, its files and what it needs to run."""
    files = [_file(name, entry.sha256) for name, entry in manifest.files.items() if name != manifest.model.file]
    libraries = [_library(name, licence, manifest.versions) for name, licence in RUNTIME.items()]
    runtimes = app_runtimes(manifest)
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_SPACE, manifest.run + manifest.profile + row.artifact.digest)}",
        "version": 1,
        "metadata": {
            **_timestamp(manifest.created),
            "tools": {"components": [_tool(manifest.versions)]},
            "component": {
                "type": "application",
                "bom-ref": "package",
                "name": f"{manifest.name} for {manifest.profile}",
            },
        },
        "components": [_model(manifest, row), *files, *libraries, *runtimes],
        "dependencies": [
            {"ref": "package", "dependsOn": ["model", *(item["bom-ref"] for item in (*libraries, *runtimes))]},
            {"ref": "model"},
            *({"ref": item["bom-ref"]} for item in (*libraries, *runtimes)),
        ],
    }


def app_runtimes(manifest: Manifest) -> list[dict[str, Any]]:
    """What the sample programs are linked with, as their build files name it."""
    found: list[dict[str, Any]] = []
    if "android" in manifest.platforms:
        name, version, licence = MAVEN[runtime_of(manifest, "android")]
        group, _, artifact = name.partition(":")
        found.append(
            _runtime(f"maven:{artifact}", artifact, f"pkg:maven/{group}/{artifact}@{version}", version, licence)
        )
    if "ios" in manifest.platforms and runtime_of(manifest, "ios") != "coreml":  # that one is the system's
        url = f"pkg:swift/{SWIFT.removeprefix('https://')}@{SWIFT_VERSION}"
        found.append(_runtime("swift:onnxruntime", "onnxruntime", url, SWIFT_VERSION, "MIT"))
    if "cpp" in manifest.platforms:
        found.append(_runtime("cpp:onnxruntime", "onnxruntime", "pkg:github/microsoft/onnxruntime", "", "MIT"))
    return found


def _runtime(reference: str, name: str, purl: str, version: str, licence: str) -> dict[str, Any]:
    found = {"type": "library", "bom-ref": reference, "name": name, "scope": "optional", "purl": purl}
    return found | ({"version": version} if version else {}) | {"licenses": licences(licence)}


def licences(text: str | None) -> list[dict[str, Any]]:
    """CycloneDX's form of a licence: an SPDX identifier where it is one, otherwise a name."""
    if not text:
        return []
    known = KNOWN_LICENCES.get(text.strip().lower())
    return [{"license": {"id": known} if known else {"name": text.strip()}}]


def _timestamp(created: str) -> dict[str, str]:
    """Only a full RFC 3339 date-time is valid there."""
    full = re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", created)
    return {"timestamp": created} if full else {}


def _tool(versions: dict[str, str]) -> dict[str, Any]:
    found = {"type": "application", "name": "compress-for-device"}
    return found | ({"version": versions["compress-for-device"]} if versions.get("compress-for-device") else {})


def _model(manifest: Manifest, row: Row) -> dict[str, Any]:
    metrics = [
        {"type": manifest.metric, "value": f"{figure.value:.6g}", "slice": f"{split}, {figure.origin.value}"}
        for split, figure in (("validation", row.validation), ("test", row.test))
        if isinstance(figure, Measurement)
    ]
    card: dict[str, Any] = {
        "modelParameters": {
            "task": manifest.task,
            "inputs": [{"format": f"{item.dtype} {list(item.shape)}"} for item in manifest.inputs],
            "outputs": [{"format": f"{item.dtype} {list(item.shape)}"} for item in manifest.outputs],
        }
    }
    if metrics:
        card["quantitativeAnalysis"] = {"performanceMetrics": metrics}
    return {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": row.artifact.name,
        "version": row.artifact.digest.removeprefix("sha256:")[:12] or "unknown",
        "hashes": [{"alg": "SHA-256", "content": manifest.files[manifest.model.file].sha256}],
        "licenses": licences(manifest.teacher.get("licence")),
        "pedigree": {"notes": f"made from {manifest.teacher.get('source') or 'a teacher that is not named'}"},
        "modelCard": card,
    }


def _file(name: str, sha256: str) -> dict[str, Any]:
    ours = name == "infer.py" or (name.startswith(("cpp/", "android/", "ios/")) and not _is_data(name))
    own = {"licenses": licences("Apache-2.0")} if ours else {}
    hashes = [{"alg": "SHA-256", "content": sha256}]
    return {"type": "file", "bom-ref": f"file:{name}", "name": name, "hashes": hashes, **own}


def _is_data(name: str) -> bool:
    """Model, rules, vocabulary and samples beside a sample program's sources."""
    return any(f"/{folder}/" in f"/{name}" for folder in ("cpp/data", "src/main/assets", "Resources"))


def _library(name: str, licence: str, versions: dict[str, str]) -> dict[str, Any]:
    version = versions.get(name)
    found: dict[str, Any] = {"type": "library", "bom-ref": f"pypi:{name}", "name": name, "scope": "required"}
    if version and version != "not installed":
        found |= {"version": version, "purl": f"pkg:pypi/{name}@{version}"}
    else:
        found |= {"purl": f"pkg:pypi/{name}"}
    return found | {"licenses": licences(licence)}
