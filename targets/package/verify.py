"""Is a package what was packed, is it described truly, and does it still answer as it did?

What a package brings is data here: none of its programs is started, ``infer.py`` included. The samples are run by this
installation's own copy of it; sample programs are built only on demand (:mod:`targets.package.builds`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from pydantic import ValidationError

from compressor.errors import CompressError, PackageError, Problem, sdk_errors
from compressor.errors import RunError as Failed
from compressor.profile import HardwareProfile, load_profile, profile_names
from compressor.types import Artifact, Format, TensorSpec, file_digest
from targets import registry
from targets.base import Compiled, Ready, Session
from targets.package import infer
from targets.package.archive import AGAIN, files_of, sum_problems, unpack
from targets.package.manifest import MANIFEST_VERSION, Manifest


class Verdict(StrEnum):
    """How a check ended."""

    PASSED = "passed"
    FAILED = "FAILED"
    NOT_HERE = "not here"  # nothing is wrong, but it cannot be tried on this machine


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    verdict: Verdict
    text: str


@contextmanager
def opened(package: Path) -> Iterator[Path]:
    """The package's folder; an archive is unpacked beside no one's files and is gone afterwards.

    Raises :class:`PackageError` for what is not a package.
    """
    if package.is_dir():
        yield package
        return
    if not package.is_file():
        raise PackageError(f"`{package}`", [Problem("PACKAGE", "no such file or folder")])
    with TemporaryDirectory() as scratch:
        yield unpack(package, Path(scratch))


def verify(folder: Path) -> tuple[Manifest, tuple[Check, ...]]:
    """Check an unpacked package. Raises :class:`PackageError` listing every file that is not what was packed.

    What is wrong with the answers is a failed check, not an error: the files are what they were.
    """
    manifest = read_manifest(folder)
    problems = {problem.where: problem for problem in (*_file_problems(folder, manifest), *sum_problems(folder))}
    problems |= {problem.where: problem for problem in _bill_problems(folder, manifest)}
    if problems:
        raise PackageError(f"`{folder.name}`", [problems[name] for name in sorted(problems)], hint=AGAIN)
    count = len(files_of(folder))
    checks = [
        Check("files", Verdict.PASSED, f"{count} files have the SHA-256 that SHA256SUMS and the manifest say"),
        Check("manifest", Verdict.PASSED, f"version {manifest.manifest_version}; {_promise(manifest)}"),
        _bill(folder),
        replay(folder, manifest),
    ]
    if manifest.model.file != manifest.model.portable:
        checks.append(replay_device_file(folder, manifest))
    return manifest, tuple(checks)


def _promise(manifest: Manifest) -> str:
    return f"promise {'kept' if manifest.promise_kept else 'NOT kept'} on {manifest.device}"


def read_manifest(folder: Path) -> Manifest:
    """``manifest.json``. Raises :class:`PackageError`."""
    try:
        text = (folder / "manifest.json").read_text(encoding="utf-8")
        version = str(json.loads(text).get("manifest_version"))
        if version.split(".")[0] != MANIFEST_VERSION.split(".")[0]:
            raise _wrong(folder, "manifest_version", f"is {version}, this installation reads {MANIFEST_VERSION}")
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise _wrong(folder, ".".join(map(str, first["loc"])), first["msg"]) from error
    except (OSError, ValueError, AttributeError) as error:
        raise _wrong(folder, "manifest.json", f"cannot be read: {error}") from error


def _wrong(folder: Path, where: str, what: str) -> PackageError:
    return PackageError(f"`{folder.name}`", [Problem(where, what)], hint=AGAIN)


def _file_problems(folder: Path, manifest: Manifest) -> Iterator[Problem]:
    """The manifest's digests and sizes against the files."""
    found = files_of(folder)
    for name, entry in manifest.files.items():
        if name not in found:
            yield Problem(name, "is missing")
        elif found[name].stat().st_size != entry.bytes or infer.digest(found[name]) != entry.sha256:
            yield Problem(name, "is not the file that the manifest describes")
    for name in sorted(found.keys() - manifest.files.keys() - {"manifest.json"}):
        yield Problem(name, "is not in the manifest")
    for name in (manifest.model.file, manifest.model.portable, *manifest.model.companions):
        if name not in manifest.files:
            yield Problem(name, "is named as the model, and is not in the manifest's files")


def _bill_problems(folder: Path, manifest: Manifest) -> Iterator[Problem]:
    """``sbom.cdx.json`` against the manifest: the model and every file with its digest."""
    name = "sbom.cdx.json"
    try:
        bill = json.loads((folder / name).read_text(encoding="utf-8"))
        components = {item["bom-ref"]: item for item in bill["components"]}
        digests = {key: item["hashes"][0]["content"] for key, item in components.items() if "hashes" in item}
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        yield Problem(name, f"is no bill of materials: {type(error).__name__}: {error}")
        return
    if bill.get("bomFormat") != "CycloneDX" or components.get("model", {}).get("type") != "machine-learning-model":
        yield Problem(name, "has no model, or is not CycloneDX")
    later = {name, "README.md"}  # written after the bill, with its digest in them
    for file, entry in manifest.files.items():
        key = "model" if file == manifest.model.file else f"file:{file}"
        if file not in later and digests.get(key) != entry.sha256:
            yield Problem(name, f"lists `{file}` with another SHA-256, or not at all")


def _bill(folder: Path) -> Check:
    """The bill was compared already; its form is checked where the schema is installed."""
    try:
        from cyclonedx.schema import SchemaVersion
        from cyclonedx.validation.json import JsonStrictValidator
    except ImportError:
        text = "agrees with the manifest; the schema is not installed here (cyclonedx-python-lib)"
        return Check("bill of materials", Verdict.PASSED, text)
    text = (folder / "sbom.cdx.json").read_text(encoding="utf-8")
    with sdk_errors(Failed, "check the bill of materials"):
        error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if error is not None:
        return Check("bill of materials", Verdict.FAILED, f"is not valid CycloneDX 1.6: {error}")
    count = len(json.loads(text)["components"])
    return Check(
        "bill of materials", Verdict.PASSED, f"valid CycloneDX 1.6, {count} components, agrees with the manifest"
    )


def replay(folder: Path, manifest: Manifest) -> Check:
    """Repeat the stored answers with ONNX Runtime here: the model that ships, or its portable twin."""
    what = (
        f"`{manifest.model.portable}`" if manifest.model.format not in ("onnx", "ort") else f"`{manifest.model.file}`"
    )
    name = f"answers of {what}"
    try:
        package = infer.Package(folder)
        samples = package.stored()
        if not samples:
            return Check(name, Verdict.NOT_HERE, "the package has no stored sample")
        with sdk_errors(Failed, "repeat the stored answers"):
            session = package.session(None, True)
            names = [output.name for output in session.get_outputs()]
            found = [dict(zip(names, session.run(None, dict(item["input"])), strict=True)) for item in samples]
            problems = [text for index, item in enumerate(samples) for text in _inputs(package, index, item)]
    except infer.RefusalError as error:
        return Check(name, Verdict.NOT_HERE, str(error))
    except Failed as error:
        lacking = type(error.__cause__).__name__ == "NotImplemented"  # ONNX Runtime's own class: bfloat16 on a CPU
        return Check(name, Verdict.NOT_HERE if lacking else Verdict.FAILED, str(error))
    return _compared(name, samples, found, manifest.self_check.tolerance, problems)


def _inputs(package: infer.Package, index: int, sample: Mapping[str, Any]) -> list[str]:
    return infer.check_preprocessing(package, index, dict(sample))


def _compared(name: str, samples: list[Any], found: list[Any], tolerance: float, problems: list[str]) -> Check:
    worst = 0.0
    for index, (sample, outputs) in enumerate(zip(samples, found, strict=True)):
        for key, wanted in sample["output"].items():
            difference = infer.relative_difference(outputs[key], wanted)
            worst = max(worst, difference)
            if not difference <= tolerance:
                problems.append(f"sample {index}, {key}: differs by {difference:.3g}")
    text = f"{len(samples)} samples, worst relative difference {worst:.3g} (accepted {tolerance:g})"
    return Check(name, Verdict.FAILED if problems else Verdict.PASSED, "; ".join([text, *problems]))


def replay_device_file(folder: Path, manifest: Manifest) -> Check:
    """Run a device's own format where its runtime is here: the largest output must be the portable model's."""
    name = f"answers of `{manifest.model.file}`"
    target = _target(manifest)
    ready = registry.probe(target)
    if not isinstance(ready, Ready) or ready.runs is None:
        reason = (
            (ready.why_not or f"{target} compiles here and runs elsewhere")
            if isinstance(ready, Ready)
            else ready.reason
        )
        return Check(name, Verdict.NOT_HERE, reason)
    samples = infer.Package(folder).stored()
    try:
        with device_session(folder, manifest) as session:
            found = [session.run(item["input"]) for item in samples]
    except CompressError as error:
        return Check(name, Verdict.FAILED, str(error))
    first = manifest.outputs[0].name
    same = sum(
        bool(np.array_equal(np.argmax(outputs[first], -1), np.argmax(item["output"][first], -1)))
        for item, outputs in zip(samples, found, strict=True)
    )
    pairs = [(outputs[first], item["output"][first]) for item, outputs in zip(samples, found, strict=True)]
    worst = max((infer.relative_difference(np.asarray(one), other) for one, other in pairs), default=0.0)
    text = f"{target} here ({ready.runs.value}): same largest output in {same} of {len(samples)} samples, "
    text += f"worst relative difference to the portable model {worst:.3g}"
    return Check(name, Verdict.PASSED if same == len(samples) else Verdict.FAILED, text)


def _target(manifest: Manifest) -> str:
    return manifest.model.runtime if manifest.model.runtime in registry.names() else manifest.target


@contextmanager
def device_session(folder: Path, manifest: Manifest) -> Iterator[Session]:
    """The device's own file, opened by its target here. Raises what :meth:`TargetBackend.open` raises."""
    target = _target(manifest)
    with registry.get(target).open(_compiled(folder, manifest), _profile(manifest, target)) as session:
        yield session


def _profile(manifest: Manifest, target: str) -> HardwareProfile:
    """The built-in profile of that name, or one that says no more than where the file runs."""
    if manifest.profile in profile_names() and (found := load_profile(manifest.profile)).target == target:
        return found
    base = {"name": manifest.profile, "title": manifest.title, "target": target}
    compute = {"processor": manifest.device, "architecture": "none"}
    return HardwareProfile.model_validate({**base, "compute": compute, "runtime": manifest.runtime.model_dump()})


def _compiled(folder: Path, manifest: Manifest) -> Compiled:
    def ports(items: Any) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(item.name, item.dtype, item.shape) for item in items)

    model = manifest.model
    portable = folder / model.portable
    artifact = Artifact(
        model.name, "student", portable, Format.ONNX, model.precision, ports(manifest.inputs),
        ports(manifest.outputs), file_digest(portable), model.parameters,
    )  # fmt: skip
    extra = tuple(folder / name for name in model.companions if name.startswith("device/"))
    return Compiled(folder / model.file, artifact, placed=0, extra_files=extra)
