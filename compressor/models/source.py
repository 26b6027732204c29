"""Where a model is, and what is refused before anything of it is read. No torch here."""

from __future__ import annotations

import difflib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from compressor.errors import ConfigError
from compressor.recipe import TeacherConfig

PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt", ".joblib", ".th")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
# What a checkpoint needs: weights, configuration, tokenizer, model card. Other frameworks' weights stay where they are.
_WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "README.md"]


@dataclass(frozen=True)
class Source:
    """A model located: an ``.onnx`` file or a checkpoint folder, with the hub id and revision it came from.

    ``gguf``: the file in the folder that holds everything, where the checkpoint is a GGUF file.
    """

    kind: Literal["onnx", "checkpoint"]
    path: Path
    name: str
    revision: str | None = None
    gguf: str | None = None


def locate(config: TeacherConfig, *, allow_remote_code: bool = False, download: bool = True) -> Source | None:
    """Find the model of a recipe.

    Returns None for a hub id that is not in the local cache when ``download`` is false. Raises :class:`ConfigError` for
    a missing file or folder, a pickle, a folder without ``config.json``, and a hub id that cannot be fetched.
    """
    name = config.model
    if not name:
        raise ConfigError.single(
            "the teacher", "teacher.model", "is required", hint="Give a checkpoint folder, a hub id or an .onnx file."
        )
    path = Path(name).expanduser()
    if path.suffix.lower() in PICKLES:
        raise ConfigError.single(
            f"`{name}`",
            "teacher.model",
            "is a pickle, which can run any code while it is read",
            hint="Give a factory (`--model pkg.mod:factory`) that builds the module and loads safetensors.",
        )
    if path.is_file():
        return _file(path, name)
    if path.is_dir():
        check_folder(path, name)
        return Source("checkpoint", path, name, config.revision, _only_gguf(path))
    if _looks_like_path(name):
        raise ConfigError.single(f"`{name}`", "teacher.model", "does not exist", hint=_near(path))
    return _hub(config, name, allow_remote_code, download)


def _file(path: Path, name: str) -> Source:
    if path.suffix.lower() == ".onnx":
        return Source("onnx", path, name)
    if path.suffix.lower() == ".gguf":
        return Source("checkpoint", path.parent, name, gguf=path.name)
    if path.suffix.lower() == ".safetensors" or path.name == "config.json":
        hint = (
            f"Give the folder, `{path.parent}`, which must also hold config.json; or a factory that loads the weights."
        )
        raise ConfigError.single(f"`{name}`", "teacher.model", "is one file of a checkpoint", hint=hint)
    raise ConfigError.single(
        f"`{name}`",
        "teacher.model",
        f"is a `{path.suffix or 'nameless'}` file, which is not a model format known here",
        hint="Give a checkpoint folder, a hub id, an .onnx or .gguf file, or `--model pkg.mod:factory`.",
    )


def _looks_like_path(name: str) -> bool:
    if (
        name.startswith((".", "/", "~"))
        or name.endswith(("/", ".onnx", ".gguf"))
        or "\\" in name
        or not _HUB_ID.match(name)
    ):
        return True
    return "/" in name and Path(name).parent.is_dir()


def _near(path: Path) -> str:
    parent = path.parent if path.parent.is_dir() else None
    if parent is None:
        return f"`{path.parent}` does not exist either; check the path."
    near = difflib.get_close_matches(path.name, [entry.name for entry in parent.iterdir()], n=1)
    return f"Did you mean `{parent / near[0]}`?" if near else "Check the path."


def _only_gguf(path: Path) -> str | None:
    """The GGUF file of a folder that holds one and no other checkpoint."""
    found = [] if (path / "config.json").is_file() else sorted(path.glob("*.gguf"))
    return found[0].name if len(found) == 1 else None


def check_folder(path: Path, name: str) -> None:
    """Refuse a folder that is not a checkpoint transformers can read."""
    if (path / "config.json").is_file() or _only_gguf(path):
        return
    pickles = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower() in PICKLES)
    models = sorted(entry.name for entry in path.glob("*.onnx")) or sorted(entry.name for entry in path.glob("*.gguf"))
    if models:
        raise ConfigError.single(
            f"`{name}`", "teacher.model", "has no config.json", hint=f"Give the file, `{path / models[0]}`."
        )
    if pickles:
        raise ConfigError.single(
            f"`{name}`",
            "teacher.model",
            f"has no config.json, only a pickle ({', '.join(pickles[:3])})",
            hint="Give a factory (`--model pkg.mod:factory`) and keep the weights as safetensors.",
        )
    raise ConfigError.single(
        f"`{name}`",
        "teacher.model",
        "is not a checkpoint folder: it has no config.json",
        hint="Save it with `save_pretrained`.",
    )


def _hub(config: TeacherConfig, name: str, allow_remote_code: bool, download: bool) -> Source | None:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConfigError.single(
            f"`{name}`",
            "teacher.model",
            "does not exist as a file or folder, and hub ids need the [train] extra",
            hint="pip install 'compress-for-device[train]'",
        ) from error
    wanted = [*_WANTED, *(["*.py"] if allow_remote_code else [])]
    try:
        folder = snapshot_download(
            name, revision=config.revision, allow_patterns=wanted, local_files_only=not download, etag_timeout=10
        )
        path = Path(folder)
        if download and not any(path.glob("*.safetensors")):  # an old checkpoint; read with weights_only
            snapshot_download(name, revision=config.revision, allow_patterns=["*.bin", "*.bin.index.json"])
    except Exception as error:  # the hub client raises a dozen unrelated types (HTTP, validation, offline)
        if not download:
            return None
        raise _hub_error(name, error) from error
    check_folder(path, name)
    return Source("checkpoint", path, name, path.name)


def is_offline() -> bool:
    """Whether the hub client was told not to use the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _hub_error(name: str, error: Exception) -> ConfigError:
    kind = type(error).__name__
    if kind in {"RepositoryNotFoundError", "RevisionNotFoundError", "GatedRepoError"}:
        what = {"GatedRepoError": "is gated: the hub wants a login", "RevisionNotFoundError": "has no such revision"}
        return ConfigError.single(
            f"`{name}`",
            "teacher.model",
            what.get(kind, "is neither a file or folder here nor a model on the hub"),
            hint="Check the spelling; for a private model run `hf auth login` first.",
        )
    reason = (
        "HF_HUB_OFFLINE is set and it is not in the cache" if is_offline() else f"the hub cannot be reached ({kind})"
    )
    return ConfigError.single(
        f"`{name}`",
        "teacher.model",
        f"is not a file or folder here, and {reason}",
        hint="Give a local folder, or download the model first where there is a network (`hf download`).",
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint; a missing file is empty, a malformed one is a :class:`ConfigError`."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError.single(f"`{path}`", "file", f"cannot be read as JSON: {error}") from error
    return data if isinstance(data, dict) else {"_": data}


def refuse_remote_code(config: dict[str, Any], name: str, allow: bool) -> None:
    """A checkpoint whose config names Python files of its own is only loaded when the user allows it."""
    if config.get("auto_map") and not allow:
        raise ConfigError.single(
            f"`{name}`",
            "teacher.model",
            "needs remote code: its config.json names Python files to run (`auto_map`)",
            hint="Read that code; if you trust it, allow it for this run with `--trust-remote-code`.",
        )


def licence_of(folder: Path) -> str | None:
    """``license`` in the front matter of the model card (README.md), if there is one."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    text = card.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return None
    front = text[3:].split("\n---", 1)[0]
    found = re.search(r"^licen[sc]e:[ \t]*\[?[ \t]*['\"]?([\w.+-]+)", front, re.MULTILINE)
    if found is None:  # YAML list form: "license:\n- mit"
        found = re.search(r"^licen[sc]e:[ \t]*\n[ \t]*-[ \t]*['\"]?([\w.+-]+)", front, re.MULTILINE)
    return found.group(1) if found else None
