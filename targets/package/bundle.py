"""Write the package of one profile: a folder that runs by itself, and the same as a .zip."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from compressor import delta_file
from compressor.errors import CompileError, ConfigError, RunError, sdk_errors
from compressor.profile import Platform
from compressor.types import EMBEDDING, MULTI_LABEL, TEXT2TEXT, Array, Artifact, stand_in_path, write_atomic
from targets.outcome import ProfileOutcome, Row, RunSummary
from targets.package import infer
from targets.package.archive import files_of, write_sums, write_zip
from targets.package.info import PackageInfo, pack_samples, save_info
from targets.package.manifest import (
    FileEntry,
    Manifest,
    Model,
    Output,
    Postprocess,
    Runtime,
    SelfCheck,
    Tensor,
    figures_of,
    quantization_of,
    runtime_of,
    tolerance_of,
)
from targets.package.platforms import choose, write_apps
from targets.package.readme import notice, readme
from targets.package.sbom import bill_of_materials

_FORMATS: Mapping[str, Literal["onnx", "ort", "tensorrt-engine", "other"]] = {
    ".onnx": "onnx",
    ".ort": "ort",
    ".engine": "tensorrt-engine",
    ".plan": "tensorrt-engine",
}
_LICENCE = Path(__file__).parent / "licences" / "Apache-2.0.txt"
_RESERVED = {
    "manifest.json",
    "SHA256SUMS",
    "infer.py",
    "delta.py",
    "README.md",
    "NOTICE",
    "sbom.cdx.json",
    "samples.npz",
}


def write_package(
    outcome: ProfileOutcome,
    summary: RunSummary,
    info: PackageInfo,
    folder: Path,
    *,
    runtime: Mapping[str, Any] | None = None,
    platforms: Sequence[str] = (),
) -> Path:
    """Write ``folder/<profile>/`` and ``folder/<profile>.zip`` for what ships on this profile; returns the .zip.

    ``folder`` is the run's folder of packages; ``info`` is kept in it too (see :func:`targets.package.load_info`).
    ``runtime`` is the profile's ``[runtime]`` as data; without it, the threads of the measurement count.
    ``platforms`` are sample programs to put in (see :mod:`targets.package.platforms`). The old package stays until the
    new one is complete. Raises :class:`ConfigError` when nothing ships, or for a platform that is unknown.
    """
    row = outcome.shipped
    if row is None:
        what = f"nothing ships: {outcome.missing or outcome.verdict}"
        raise ConfigError.single("the package", outcome.profile, what, hint="The report has the reason of every row.")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", outcome.profile):
        hint = "Use letters, digits, `.`, `_` and `-` only."
        raise ConfigError.single("the package", outcome.profile, "is not usable as a file name", hint=hint)
    folder.mkdir(parents=True, exist_ok=True)
    save_info(info, folder)
    scratch = Path(tempfile.mkdtemp(prefix=f".{outcome.profile}-", dir=folder))
    try:
        made = scratch / outcome.profile
        made.mkdir()
        _fill(made, outcome, summary, row, info, runtime_of(row, runtime), choose(platforms, outcome.target))
        archive = folder / f"{outcome.profile}.zip"
        write_zip(made, archive)
        _swap(made, folder / outcome.profile, scratch)
        return archive
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _swap(new: Path, place: Path, scratch: Path) -> None:
    """Put the new folder where the old one is; the old one leaves with the scratch folder."""
    if place.exists():
        place.replace(scratch / "old")
    new.replace(place)


def _fill(
    folder: Path,
    outcome: ProfileOutcome,
    summary: RunSummary,
    row: Row,
    info: PackageInfo,
    runtime: Runtime,
    platforms: Sequence[Platform],
) -> None:
    model = _copy_model(folder, outcome, row)
    for name, content in info.files.items():
        write_atomic(_inside(folder, name), content)
    tolerance, why = tolerance_of(row.artifact)
    if info.samples:
        outputs = _answers_of(row.artifact, folder / model.portable, info, runtime)
        write_atomic(folder / "samples.npz", pack_samples(info.samples, info.raw, outputs))
    write_atomic(folder / "infer.py", Path(infer.__file__).read_bytes())
    write_atomic(folder / "delta.py", Path(delta_file.__file__).read_bytes())
    write_atomic(folder / "LICENSES" / "Apache-2.0.txt", _LICENCE.read_bytes())
    manifest = Manifest(
        name=summary.name,
        profile=outcome.profile,
        title=outcome.title,
        target=outcome.target,
        device=outcome.device,
        created=summary.created,
        run=summary.digest,
        task=summary.task,
        metric=summary.metric,
        model=model,
        inputs=tuple(Tensor.of(spec) for spec in row.artifact.inputs),
        outputs=tuple(Tensor.of(spec) for spec in row.artifact.outputs),
        preprocess=dict(info.preprocess),
        postprocess=Output(kind=_meaning(summary.task, folder / model.portable)),
        labels=tuple(info.labels),
        runtime=runtime,
        promise_kept=outcome.kept,
        verdict=outcome.verdict,
        figures=figures_of(row),
        self_check=SelfCheck(samples=len(info.samples), tolerance=tolerance, why=why),
        teacher=dict(summary.teacher),
        teachers=tuple(dict(item) for item in summary.teachers),
        platforms=tuple(platforms),
        versions={**summary.versions, **outcome.versions},
        files={},
    )
    write_apps(folder, manifest, platforms)
    _write_papers(folder, manifest, outcome, row)


def _write_papers(folder: Path, manifest: Manifest, outcome: ProfileOutcome, row: Row) -> None:
    """NOTICE, SBOM, README, manifest and sums, in the order in which each needs the digests of those before."""
    write_atomic(folder / "NOTICE", notice(manifest))
    manifest = _with_files(manifest, folder)
    write_atomic(folder / "sbom.cdx.json", json.dumps(bill_of_materials(manifest, row), indent=1) + "\n")
    write_atomic(folder / "README.md", readme(_with_files(manifest, folder), outcome, row))
    manifest = _with_files(manifest, folder)
    write_atomic(folder / "manifest.json", manifest.model_dump_json(indent=1) + "\n")
    write_sums(folder)


def _with_files(manifest: Manifest, folder: Path) -> Manifest:
    entries = {
        name: FileEntry(sha256=infer.digest(path), bytes=path.stat().st_size)
        for name, path in files_of(folder).items()
        if name != "manifest.json"
    }
    return manifest.model_copy(update={"files": entries})


def _copy_model(folder: Path, outcome: ProfileOutcome, row: Row) -> Model:
    """What ONNX Runtime loads becomes ``model.onnx`` (or .ort).

    A device's own files keep their names, in ``device/``, because they refer to each other by name; the portable
    ``model.onnx`` of the same weights lies beside that folder.
    """
    source = row.compiled.path if row.compiled is not None else row.artifact.path
    extra = (*row.compiled.extra_files, *row.compiled.source_files) if row.compiled is not None else ()
    kind = _FORMATS.get(source.suffix, "other")
    if kind == "onnx" and (any(path.name in _RESERVED for path in extra) or _compiled_inside(source)):
        kind = "other"  # a build kit: an .onnx with tools around it; or a context binary that only its device loads
    companions: list[str] = []
    if kind in ("onnx", "ort"):
        file = f"model{source.suffix}"
        shutil.copyfile(source, folder / file)
        companions += [_copy_beside(path, source.parent, folder) for path in extra]
    else:
        device = folder / "device"
        device.mkdir()
        file = _copy_beside(source, source.parent, device, "device/")
        companions += [_copy_beside(path, source.parent, device, "device/") for path in extra]
    portable = file if kind == "onnx" else "model.onnx"
    original = source if kind == "onnx" else row.artifact.path
    if kind != "onnx":
        shutil.copyfile(original, folder / portable)
    companions += [_copy_beside(path, original.parent, folder) for path in _external_files(original)]
    return Model(
        name=row.artifact.name,
        file=file,
        format=kind,
        runtime=row.artifact.runtime or outcome.target,
        portable=portable,
        precision=row.artifact.precision,
        parameters=row.artifact.parameters,
        quantization=quantization_of(row.artifact),
        companions=tuple(dict.fromkeys(companions)),
    )


def _compiled_inside(path: Path) -> bool:
    """Is the graph an envelope around what an execution provider compiled?"""
    import onnx

    with sdk_errors(CompileError, f"read `{path.name}`"):
        graph = onnx.load(str(path), load_external_data=False).graph
    return any(node.op_type == "EPContext" for node in graph.node)


def _copy_beside(path: Path, base: Path, folder: Path, prefix: str = "") -> str:
    """Copy ``path`` to where it lies relative to ``base``; its name in the package."""
    path, base = path.resolve(), base.resolve()
    name = path.relative_to(base).as_posix() if path.is_relative_to(base) else path.name
    target = folder / name if prefix else _inside(folder, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)
    return prefix + name


def _inside(folder: Path, name: str) -> Path:
    """A path in the package; a name that would leave it or replace one of our own files is refused."""
    path = folder / name
    if name in _RESERVED or not path.resolve().is_relative_to(folder.resolve()) or path.resolve() == folder.resolve():
        raise ConfigError.single("the package", name, "is not a name that a file of the package can have")
    return path


def _external_files(path: Path) -> tuple[Path, ...]:
    """Weight files that an ONNX model keeps beside itself. One outside its folder is refused."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    with sdk_errors(CompileError, f"read `{path.name}`"):
        model = onnx.load(str(path), load_external_data=False)
    folder = path.parent.resolve()
    found = {folder / ExternalDataInfo(item).location for item in model.graph.initializer if uses_external_data(item)}
    for file in found:
        if not file.resolve().is_relative_to(folder):
            raise CompileError(f"`{path.name}` keeps weights outside its folder: {file}", hint="Save it in one folder.")
    return tuple(path.parent / file.relative_to(folder) for file in sorted(found))


def _answers_of(artifact: Artifact, model: Path, info: PackageInfo, runtime: Runtime) -> list[dict[str, Array]]:
    """Answers of the portable file; of its emulation where ONNX Runtime's CPU provider lacks the format (bfloat16)."""
    emulation = stand_in_path(artifact.path)
    try:
        return _answers(model, info, runtime)
    except RunError:
        if not emulation.is_file():
            raise
        return _answers(emulation, info, runtime)


def _answers(model: Path, info: PackageInfo, runtime: Runtime) -> list[dict[str, Array]]:
    """Outputs for the stored samples, through the session that ``infer.py`` opens."""
    with sdk_errors(RunError, f"run `{model.name}` on the stored samples"):
        session = infer.open_session(model, runtime.model_dump())
        names = [output.name for output in session.get_outputs()]
        return [dict(zip(names, session.run(None, dict(sample)), strict=True)) for sample in info.samples]


def _meaning(task: str, model: Path) -> Postprocess:
    """What the first output is: a classifier that ends in a Softmax gives probabilities already."""
    if task in EMBEDDING:
        return "embedding"
    if task in TEXT2TEXT:
        return "target-text"
    if task in ("token-classification", "causal-lm"):
        return "tags" if task == "token-classification" else "next-token"
    if task not in MULTI_LABEL and task not in ("image-classification", "text-classification"):
        return "none"
    import onnx

    graph = onnx.load(str(model), load_external_data=False).graph
    makers = {name: node for node in graph.node for name in node.output}
    node = makers.get(graph.output[0].name)
    while node is not None and node.op_type in ("QuantizeLinear", "DequantizeLinear", "Identity", "Cast"):
        node = makers.get(node.input[0])
    end = node.op_type if node is not None else ""
    if task in MULTI_LABEL:
        return "independent-probabilities" if end == "Sigmoid" else "sigmoid"
    return "probabilities" if end == "Softmax" else "softmax"
