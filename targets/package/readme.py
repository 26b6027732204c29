"""README.md and NOTICE of one package: how to run it, what it promises, what was measured where. Pure."""

from __future__ import annotations

from targets.outcome import ProfileOutcome, Row
from targets.package.manifest import Manifest
from targets.report import figures
from targets.report.markdown import escape, markdown_table
from targets.report.table import drop_text, origin_text

_EXAMPLES = {"image": "picture.png", "text": '"a sentence"', "raw": "input.npy"}


def readme(manifest: Manifest, outcome: ProfileOutcome, row: Row) -> str:
    """The page, for this very package."""
    title = f"# {escape(manifest.name)} for {escape(manifest.title)}"
    what = (
        f"`{manifest.model.file}` ({escape(manifest.model.precision)}, {manifest.model.parameters:,} parameters) for "
        f"{escape(manifest.target)}: {escape(manifest.task)}. {escape(manifest.verdict)}"
    )
    parts = [title, what, _run(manifest), *_apps(manifest), _measured(manifest, outcome, row), _interface(manifest)]
    return "\n\n".join([*parts, _files(manifest), _origin(manifest)]) + "\n"


def _run(manifest: Manifest) -> str:
    example = _EXAMPLES.get(str(manifest.preprocess.get("kind")), "input.npy")
    if manifest.preprocess.get("pair"):
        example = '"first sentence" --pair "second sentence"'
    elif manifest.postprocess.kind == "next-token":
        example = '"the beginning of a text" --new-tokens 40'
    elif manifest.postprocess.kind == "target-text":
        example = '"a source text"'
    more = " tokenizers" if manifest.postprocess.kind in ("next-token", "target-text") else ""
    note = ""
    if manifest.postprocess.kind == "target-text":
        note = " The figures and `--benchmark` are of one pass over a source and its whole target; with a text, "
        note += "`--benchmark` times writing the target, which takes a pass a token."
    flag = "" if manifest.model.format in ("onnx", "ort") else " --portable"
    lines = [
        "## Run it",
        "",
        f"    pip install onnxruntime numpy{more}",
        f"    python infer.py{flag} --self-check",
        f"    python infer.py{flag} {example}",
        f"    python infer.py{flag} --benchmark",
        "",
        "Nothing else is needed; `--json` prints for programs. The self-check verifies every file of this folder and "
        f"repeats {manifest.self_check.samples} stored answers (accepted difference {manifest.self_check.tolerance:g} "
        f"of the largest value: {manifest.self_check.why}).{note}",
    ]
    if flag:
        lines += [
            "",
            f"`{manifest.model.file}` itself needs {escape(manifest.model.runtime)} on {escape(manifest.device)}. "
            f"`infer.py` does not drive that runtime and refuses without `--portable`, which runs "
            f"`{manifest.model.portable}` (the same weights) with ONNX Runtime on the CPU; its speed says "
            "nothing about the device.",
        ]
    return "\n".join(lines)


_APPS = {
    "cpp": "CMake project for C++17 and ONNX Runtime",
    "android": "Android project in Kotlin",
    "ios": "Swift package for iOS and macOS",
}


def _apps(manifest: Manifest) -> list[str]:
    """The sample programs, when there are any."""
    found = [f"- `{name}/`: {text}, with its own README." for name, text in _APPS.items() if name in manifest.platforms]
    if not found:
        return []
    rule = "They pre-process and answer as `infer.py` does, and repeat the same stored samples."
    return ["\n".join(["## Sample programs", "", *found, "", rule])]


def _measured(manifest: Manifest, outcome: ProfileOutcome, row: Row) -> str:
    def as_score(value: float) -> str:
        return figures.score(value, manifest.metric)

    entries = [
        (f"{manifest.metric}, test", row.test, as_score),
        (f"{manifest.metric}, validation", row.validation, as_score),
        ("p50 latency", row.latency, figures.milliseconds),
        ("speed-up against the teacher", row.speedup, figures.times),
        ("file size", row.file_bytes, figures.mebibytes),
        ("peak memory", row.peak_memory, lambda value: f"{figures.significant(value)} MiB"),
    ]
    rows = [[name, figures.say(figure, render), origin_text(figure)] for name, figure, render in entries]
    lost = drop_text(row, outcome, manifest.metric)
    rows.append(["difference to the teacher", lost, "from the rows above and the teacher's"])
    word = "kept" if manifest.promise_kept else "NOT kept"
    return "\n".join(
        [
            "## What it promises",
            "",
            f"The promise of the run was {word}.",
            "",
            *markdown_table(["figure", "value", "where it comes from"], rows),
        ]
    )


def _interface(manifest: Manifest) -> str:
    rows = [
        [kind, item.name, item.dtype, " x ".join(map(str, item.shape)) or "scalar"]
        for kind, items in (("input", manifest.inputs), ("output", manifest.outputs))
        for item in items
    ]
    lines = ["## Inputs and outputs", "", *markdown_table(["", "name", "type", "shape"], rows), ""]
    lines.append("Pre- and post-processing stand in `manifest.json` as data; `infer.py` carries them out.")
    if manifest.labels:
        shown = ", ".join(escape(label) for label in manifest.labels[:20])
        more = f" and {len(manifest.labels) - 20} more" if len(manifest.labels) > 20 else ""
        lines += ["", f"Labels: {shown}{more}."]
    return "\n".join(lines)


def _files(manifest: Manifest) -> str:
    rows = [[name, figures.mebibytes(entry.bytes), entry.sha256[:16]] for name, entry in manifest.files.items()]
    note = "`SHA256SUMS` has all digests (`sha256sum --check SHA256SUMS`), `sbom.cdx.json` the bill of materials."
    return "\n".join(["## Files", "", note, "", *markdown_table(["file", "size", "SHA-256"], rows)])


def _origin(manifest: Manifest) -> str:
    teacher = manifest.teacher
    return "\n".join(
        [
            "## Where it comes from",
            "",
            f"Made by compress-for-device from {escape(teacher.get('source') or 'a teacher that is not named')} "
            f"(licence: {escape(teacher.get('licence') or 'not stated')}) in run `{manifest.run[:19]}` of "
            f"{manifest.created}. See NOTICE for the licences.",
        ]
    )


def notice(manifest: Manifest) -> str:
    """Licences as far as they are known, and plain words where they are not."""
    licence = manifest.teacher.get("licence")
    known = (
        f"Its licence: {licence}. The files in this package that derive from it are under the same terms."
        if licence
        else "Its licence is NOT STATED. Find out whether you may distribute what derives from it before you do."
    )
    return (
        f"{manifest.name} for {manifest.profile}\n\n"
        f"The model derives from: {manifest.teacher.get('source') or 'a teacher that is not named'}\n"
        f"{known}\n\n"
        "infer.py and the sample programs: Apache-2.0 (LICENSES/Apache-2.0.txt), part of compress-for-device.\n"
        "Needed to run, not contained: onnxruntime (MIT), numpy (BSD-3-Clause).\n"
    )
