"""Data files of the sample programs: the manifest's rules, the vocabulary and the stored samples in plain lines.

Programs in C++, Kotlin and Swift then need no JSON, no NumPy and no Unicode tables of their own: their answers do not
depend on the platform's Unicode version. Tabs separate fields; tabs, line ends and backslashes in them are escaped.

| file | lines |
| --- | --- |
| ``settings.tsv`` | key and values: the model, its inputs and outputs, pre- and post-processing, labels |
| ``vocabulary.tsv`` | id and piece |
| ``characters.tsv`` | what normalization makes of characters: ``drop``, ``space``, ``punctuation``, ``wide``, ``to`` |
| ``samples.tsv`` | sample, part (``input``, ``output``, ``raw``), name, type, shape, offset, size in ``samples.bin`` |
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from targets.package import infer
from targets.package.info import unpack_samples
from targets.package.manifest import Manifest

Line = tuple[Any, ...]
ML_PACKAGE = ".mlpackage.zip"  # Core ML's model is a folder; in a package of ours it is zipped
COREML_TOLERANCE = (
    0.02  # of the stored answers, relative to the largest: the GPU and the Neural Engine compute in float16
)


def write_data(package: Path, folder: Path, manifest: Manifest, runtime: str, *, copy: bool) -> None:
    """Write the data files for one program into ``folder``; ``copy`` puts the model's files there too.

    Without ``copy`` the settings name the model by its path relative to ``folder``.
    """
    model = manifest.model
    own = runtime in ("litert", "coreml") or model.format in ("onnx", "ort")
    file = model.file if own else model.portable
    named = _copy_model(package, folder, manifest, file) if copy else f"../../{file}"
    spec = _tokenizer(package, manifest)
    lines = [*_settings(manifest, runtime, named, spec)]
    if runtime == "coreml":
        lines += _coreml_settings(package, manifest)
    _write(folder / "settings.tsv", lines)
    if spec is not None:
        pieces = sorted(spec["model"]["vocab"].items(), key=lambda item: item[1])
        _write(folder / "vocabulary.tsv", ((number, piece) for piece, number in pieces))
        _write(folder / "characters.tsv", characters(spec))
    _write_samples(package / "samples.npz", folder)


def _copy_model(package: Path, folder: Path, manifest: Manifest, file: str) -> str:
    """The model beside its settings, with the weight files that must lie beside it."""
    base = (package / file).parent
    if file.endswith(ML_PACKAGE):
        with zipfile.ZipFile(package / file) as archive:
            archive.extractall(folder)
        return Path(file).name.removesuffix(".zip")
    for name in (file, *manifest.model.companions):
        path = package / name
        if path.is_relative_to(base) and (name == file or not name.startswith("device/")):
            target = folder / path.relative_to(base)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    return Path(file).name


def _tokenizer(package: Path, manifest: Manifest) -> dict[str, Any] | None:
    """The tokenizer's file where it is a plain BERT WordPiece; None: the program takes token ids."""
    rules = manifest.preprocess
    if rules.get("kind") != "text" or manifest.postprocess.kind in ("tags", "next-token", "target-text"):
        return None
    spec: dict[str, Any] = json.loads((package / rules["tokenizer_file"]).read_text(encoding="utf-8"))
    return spec if infer.is_plain(spec) else None


def _settings(manifest: Manifest, runtime: str, model: str, spec: dict[str, Any] | None) -> Iterator[Line]:
    yield "name", f"{manifest.name} for {manifest.profile}"
    yield "model", model
    yield "runtime", runtime, manifest.runtime.threads, manifest.runtime.graph_level, int(manifest.runtime.arena)
    for kind, tensors in (("input", manifest.inputs), ("output", manifest.outputs)):
        for item in tensors:
            yield kind, item.name, item.dtype, ",".join(str(_fixed(size)) for size in item.shape)
    kind = str(manifest.preprocess.get("kind", "raw"))
    yield "preprocess", kind
    if kind == "image":
        yield from _picture_settings(manifest)
    elif kind == "text":
        yield from _text_settings(manifest, spec)
    yield "postprocess", manifest.postprocess.kind
    yield "tolerance", manifest.self_check.tolerance
    yield from (("label", label) for label in manifest.labels)


def _coreml_settings(package: Path, manifest: Manifest) -> Iterator[Line]:
    """The last line of a key counts."""
    facts = json.loads((package / "device" / "mac.json").read_text(encoding="utf-8"))
    yield "compute_units", facts["compute_units"]
    yield "tolerance", max(manifest.self_check.tolerance, COREML_TOLERANCE)


def _fixed(size: int | str) -> int:
    return size if isinstance(size, int) else -1


def _picture_settings(manifest: Manifest) -> Iterator[Line]:
    rules = manifest.preprocess
    settings = rules["settings"]
    shape = manifest.inputs[0].shape
    axis = 1 if settings["layout"] == "NCHW" else 3
    channels = settings.get("channels") or (shape[axis] if len(shape) == 4 and isinstance(shape[axis], int) else 3)
    yield "channels", channels
    yield "size", *(settings.get("size") or ())
    yield "scale", _single(settings["scale"])
    yield "mean", *map(_single, np.atleast_1d(settings["mean"]))
    yield "std", *map(_single, np.atleast_1d(settings["std"]))
    yield "layout", settings["layout"]
    yield "resample", rules.get("resample", "bilinear")


def _single(value: float) -> str:
    """Nine digits give a float32 back exactly."""
    return f"{float(np.float32(value)):.9g}"


def _text_settings(manifest: Manifest, spec: dict[str, Any] | None) -> Iterator[Line]:
    rules = manifest.preprocess
    yield "names", *rules["names"]
    yield "max_length", rules["max_length"]
    yield "pad_id", rules["pad_id"]
    yield "pair", int(bool(rules.get("pair")))
    yield "tokenizer", "ids" if spec is None else "wordpiece"
    if spec is None:
        return
    model = spec["model"]
    before, after = infer.template(spec.get("post_processor"))
    yield "unknown", model["vocab"][model["unk_token"]]
    yield "prefix", model["continuing_subword_prefix"]
    yield "longest_word", model["max_input_chars_per_word"]
    yield "before", *before
    yield "after", *after
    for item, kind in infer.pair_template(spec.get("post_processor")):
        yield "pair_part", kind, *(item if isinstance(item, list) else ("first" if item == 0 else "second",))
    for token in sorted(spec.get("added_tokens", []), key=lambda token: -len(token["content"])):
        yield "special", token["id"], token["content"], int(bool(token.get("lstrip"))), int(bool(token.get("rstrip")))


def characters(spec: dict[str, Any]) -> Iterator[Line]:
    """Normalization as a table: it works on one character at a time, so that every character has one result."""
    rules = spec.get("normalizer") or {}
    strip = rules.get("lowercase") if rules.get("strip_accents") is None else rules["strip_accents"]
    dropped = list(_pairs(infer.IS_CONTROL)) if rules.get("clean_text") else []
    if rules.get("clean_text"):
        dropped += [(0, 8), (0x0B, 0x0C), (0x0E, 0x1F), (0x7F, 0x7F), (0xFFFD, 0xFFFD)]
    if strip:
        dropped += _pairs(infer.IS_ACCENT)
    yield from (("drop", f"{first:x}", f"{last:x}") for first, last in sorted(dropped))
    yield from (("space", f"{ord(sign):x}", f"{ord(sign):x}") for sign in sorted(infer.SPACES))
    plain = ((code, code) for code in range(0x80) if infer.is_punctuation(chr(code)))
    yield from (("punctuation", f"{a:x}", f"{b:x}") for a, b in (*plain, *_pairs(infer.IS_PUNCTUATION)))
    if rules.get("handle_chinese_chars"):
        yield from (("wide", f"{first:x}", f"{last:x}") for first, last in infer.CJK)
    if strip:
        yield ("hangul", "1")  # syllables fall apart by arithmetic: 11,172 lines less
    tokenizer = infer.WordPiece(spec)
    skip = {code for first, last in dropped for code in range(first, min(last, 0x1FFFF) + 1)}
    for code in _changing():
        sign = chr(code)
        if code in skip or sign in infer.SPACES or 0xAC00 <= code <= 0xD7A3:
            continue
        made = tokenizer.normalize(sign).strip(" ")
        if made != sign:
            yield "to", f"{code:x}", " ".join(f"{ord(part):x}" for part in made)


def _pairs(ranges: infer.Ranges) -> Iterator[tuple[int, int]]:
    """First and last code points of the runs."""
    edges = [*ranges.edges, *([0x110000] if len(ranges.edges) % 2 else [])]
    yield from ((first, end - 1) for first, end in zip(edges[::2], edges[1::2], strict=True))


def _changing() -> Iterator[int]:
    """Code points that lower case or canonical decomposition changes; beyond plane 2 there are none."""
    import unicodedata

    for code in (*range(0xD800), *range(0xE000, 0x2FFFF)):
        sign = chr(code)
        if sign.lower() != sign or unicodedata.decomposition(sign):
            yield code


def _write_samples(path: Path, folder: Path) -> None:
    """The samples of ``samples.npz`` in one file of bytes (little endian) and a list of where each array lies."""
    samples = unpack_samples(path.read_bytes()) if path.is_file() else []
    lines, parts, offset = [], [], 0
    for index, sample in enumerate(samples):
        for part, arrays in sorted(sample.items()):
            for name, array in arrays.items():
                for content, kind, shape in _contents(array):
                    lines.append((index, part, name, kind, shape, offset, len(content)))
                    parts.append(content)
                    offset += len(content)
    _write(folder / "samples.tsv", lines)
    (folder / "samples.bin").write_bytes(b"".join(parts))


def _contents(array: Any) -> Iterator[tuple[bytes, str, str]]:
    """One array, or one text of a pair after the other in UTF-8."""
    if array.dtype.kind == "U":
        yield from ((text.encode(), "text", "") for text in np.atleast_1d(array).tolist())
        return
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    yield np.ascontiguousarray(little).tobytes(), str(array.dtype), ",".join(map(str, array.shape))


def _write(path: Path, lines: Iterable[Line]) -> None:
    text = "".join("\t".join(_escaped(field) for field in line) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8", newline="\n")


def _escaped(field: Any) -> str:
    text = str(field)
    for sign, code in (("\\", "\\\\"), ("\t", "\\t"), ("\n", "\\n"), ("\r", "\\r")):
        text = text.replace(sign, code)
    return text
