"""What packages need besides the outcome, kept in the run folder so that ``package RUN`` needs neither model nor data."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.errors import ConfigError
from compressor.types import Inputs, write_atomic

if TYPE_CHECKING:
    from compressor.cli.session import Session

FOLDER = "package-info"
SAMPLES = 4


def save_info(session: Session, run: Path) -> None:
    """Write pre-processing, labels, tokenizer files and a few validation inputs (for the package's self-check)."""
    folder = run / FOLDER
    model, validation = session.model, session.data.splits["validation"]
    record = {
        "preprocess": model.preprocess.model_dump(mode="json"),
        "labels": list(model.labels),
        "files": sorted(model.files),
        "samples": min(SAMPLES, len(validation)),
    }
    for name, content in model.files.items():
        write_atomic(folder / "files" / Path(name).name, content)
    for position in range(record["samples"]):
        stream = io.BytesIO()
        np.savez(stream, allow_pickle=False, **dict(validation.batch(np.array([position]))))
        write_atomic(folder / f"sample-{position}.npz", stream.getvalue())
    write_atomic(folder / "info.json", json.dumps(record, indent=1))


def load_info(run: Path) -> Any:
    """The :class:`targets.package.PackageInfo` of a run folder."""
    folder = run / FOLDER
    try:
        record: Mapping[str, Any] = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        files = {name: (folder / "files" / Path(name).name).read_bytes() for name in record["files"]}
        samples: Sequence[Inputs] = [_sample(folder / f"sample-{i}.npz") for i in range(record["samples"])]
    except (OSError, ValueError, KeyError) as error:
        hint = "Run the recipe again; finished stages are reused."
        raise ConfigError.single(f"`{folder}`", "info.json", f"cannot be read: {error}", hint=hint) from error
    return package_info(record, files, samples)


def package_info(record: Mapping[str, Any], files: Mapping[str, bytes], samples: Sequence[Inputs]) -> Any:
    """Build the value that ``targets.package`` takes."""
    from targets.package import PackageInfo

    return PackageInfo(preprocess=record["preprocess"], files=files, labels=tuple(record["labels"]), samples=samples)


def _sample(path: Path) -> Inputs:
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}
