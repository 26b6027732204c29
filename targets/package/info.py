"""What a package needs that an outcome does not hold; kept beside the packages, so that they can be written again."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from compressor.errors import ConfigError
from compressor.types import Array, Inputs, write_atomic

STORE = ".package-info"  # beside the packages


@dataclass(frozen=True)
class PackageInfo:
    """The same for all profiles of a run.

    ``preprocess`` is the dump of an image, text or raw input rule; ``files`` go into the package beside the manifest
    (tokenizer.json, a licence). ``samples`` are model inputs by name, batch 1, for the self-check; their expected
    outputs are made when packing, by the model that ships. ``raw`` are the same samples before pre-processing (a
    string, a pair of them, or a uint8 picture), so that the self-check covers pre-processing, too.
    """

    preprocess: Mapping[str, Any]
    files: Mapping[str, bytes] = field(default_factory=dict)
    labels: Sequence[str] = ()
    samples: Sequence[Inputs] = ()
    raw: Sequence[str | tuple[str, ...] | Array] = ()


def save_info(info: PackageInfo, packages: Path) -> None:
    """Keep ``info`` in the folder of the packages."""
    folder = packages / STORE
    data = {
        "preprocess": dict(info.preprocess),
        "labels": list(info.labels),
        "files": {name: base64.b64encode(content).decode() for name, content in info.files.items()},
    }
    write_atomic(folder / "info.json", json.dumps(data, ensure_ascii=False, indent=1))
    write_atomic(folder / "samples.npz", pack_samples(info.samples, info.raw, ()))


def load_info(run_folder: Path) -> PackageInfo:
    """What :func:`save_info` kept in the ``packages`` of a run; :class:`ConfigError` when absent or damaged."""
    folder = run_folder / "packages" / STORE
    try:
        data = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        samples = unpack_samples((folder / "samples.npz").read_bytes())
        return PackageInfo(
            preprocess=data["preprocess"],
            files={name: base64.b64decode(content) for name, content in data["files"].items()},
            labels=tuple(data["labels"]),
            samples=[sample["input"] for sample in samples],
            raw=[_plain(sample["raw"]["value"]) for sample in samples if "raw" in sample],
        )
    except (OSError, ValueError, KeyError) as error:
        hint = "Run `compress-for-device run` again; finished stages are not computed twice."
        raise ConfigError.single(f"`{folder}`", "file", f"cannot be read: {error}", hint=hint) from error


def pack_samples(
    samples: Sequence[Inputs], raw: Sequence[str | tuple[str, ...] | Array], outputs: Sequence[Mapping[str, Array]]
) -> bytes:
    """An .npz whose keys are ``<index>.<input|output|raw>.<name>``; no pickle, the same bytes every time."""
    arrays: dict[str, Any] = {}
    for index, sample in enumerate(samples):
        arrays |= {f"{index}.input.{name}": np.asarray(value) for name, value in sample.items()}
        if index < len(outputs):
            arrays |= {f"{index}.output.{name}": np.asarray(value) for name, value in outputs[index].items()}
        if index < len(raw):
            arrays[f"{index}.raw.value"] = np.asarray(raw[index])
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def unpack_samples(content: bytes) -> list[dict[str, dict[str, Array]]]:
    """Per sample: part (``input``, ``output``, ``raw``) to arrays by name."""
    found: dict[int, dict[str, dict[str, Array]]] = {}
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        for key in stored.files:
            index, part, name = key.split(".", 2)
            found.setdefault(int(index), {}).setdefault(part, {})[name] = stored[key]
    return [found[index] for index in sorted(found)]


def _plain(value: Array) -> str | tuple[str, ...] | Array:
    if value.dtype.kind != "U":
        return value
    return tuple(value.tolist()) if value.ndim else str(value)
