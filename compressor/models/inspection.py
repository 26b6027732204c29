"""Describe a model for ``plan`` in a fraction of a second: no weights are read into memory, no torch is imported."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from compressor.errors import Problem, ProblemList
from compressor.models.entry import check_entry
from compressor.models.gguf_file import read_gguf
from compressor.models.preprocessing import labels_of
from compressor.models.source import Source, is_offline, locate, read_json, refuse_remote_code
from compressor.recipe import DataConfig, TeacherConfig
from compressor.types import EMBEDDING, TEXT2TEXT, Task, TensorSpec

# What the heads of transformers are called. Loading asks optimum, which takes seconds to import; a test compares both.
_SUFFIXES: Mapping[str, Task] = {
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
    "ForImageClassificationWithTeacher": "image-classification",
    "ForTokenClassification": "token-classification",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForConditionalGeneration": "text2text-generation",
    "MTModel": "text2text-generation",
    "Model": "sentence-embedding",
}


@dataclass(frozen=True)
class Inspection:
    """A model as far as it can be known without loading it. None: not known before loading."""

    kind: Literal["checkpoint", "factory", "onnx"] | None
    task: Task | None
    parameters: int | None = None
    file_bytes: int | None = None
    layers: int | None = None
    labels: tuple[str, ...] = ()
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()


def inspect_model(
    config: TeacherConfig,
    *,
    factory: str | None = None,
    data: DataConfig | None = None,
    allow_remote_code: bool = False,
) -> Inspection:
    """Facts and every problem found; never raises for a bad model and never runs a factory."""
    kind: Literal["checkpoint", "factory", "onnx"] | None = "factory" if factory else None
    try:
        if factory is not None:
            check_entry(factory, "factory")
            return Inspection(
                "factory", config.task, labels=(data.labels or ()) if data else (), notes=("built when it runs",)
            )
        source = locate(config, allow_remote_code=allow_remote_code, download=is_offline())
        if source is None:
            return Inspection(
                "checkpoint", config.task, notes=(f"`{config.model}` is not in the local cache; fetched when it runs",)
            )
        kind = source.kind
        return (
            _onnx_facts(source, config, data)
            if kind == "onnx"
            else _checkpoint_facts(source, config, allow_remote_code)
        )
    except ProblemList as error:
        found = tuple(_named(error.subject, problem) for problem in error.problems)
        return Inspection(kind, config.task, problems=found)


def _named(subject: str, problem: Problem) -> Problem:
    """Keep the file's name, which stood in the error's heading."""
    return problem if subject in ("the plan", "the teacher") else Problem(problem.where, f"{subject} {problem.what}")


def _onnx_facts(source: Source, config: TeacherConfig, data: DataConfig | None) -> Inspection:
    from compressor.models.onnx_file import read_onnx
    from compressor.models.onnx_load import load_onnx

    facts = read_onnx(source.path)
    loaded = load_onnx(source, config, data=data, facts=facts)
    return Inspection(
        "onnx",
        loaded.task,
        parameters=facts.parameters,
        file_bytes=facts.file_bytes,
        labels=loaded.labels,
        inputs=facts.inputs,
        outputs=facts.outputs,
        notes=(f"{facts.nodes} nodes", *loaded.provenance.notes),
    )


def _gguf_facts(source: Source, gguf: str, config: TeacherConfig) -> Inspection:
    file = source.path / gguf
    facts = read_gguf(file, source.name)
    return Inspection(
        "checkpoint",
        config.task or "causal-lm",
        parameters=facts.parameters,
        file_bytes=file.stat().st_size,
        layers=facts.layers,
        notes=facts.notes,
    )


def _checkpoint_facts(source: Source, config: TeacherConfig, allow_remote_code: bool) -> Inspection:
    if source.gguf is not None:
        return _gguf_facts(source, source.gguf, config)
    settings = read_json(source.path / "config.json")
    refuse_remote_code(settings, source.name, allow_remote_code)
    weights = sorted(source.path.glob("*.safetensors"))
    notes, problems = [], []
    if not weights:
        old = sorted(source.path.glob("pytorch_model*.bin"))
        if old:
            notes.append("weights are a .bin file, read with weights_only")
        else:
            problems.append(Problem("teacher.model", f"`{source.name}` has no weights (model.safetensors)"))
        weights = old
    parameters = None
    if weights and weights[0].suffix == ".safetensors":
        parameters = sum(safetensors_parameters(file, problems) for file in weights)
    task = config.task or checkpoint_task(settings, source.path)
    if task is None:
        names = ", ".join(settings.get("architectures") or ["no architecture"])
        problems.append(Problem("teacher.task", f"`{source.name}` is a {names}; give `teacher.task`"))
    return Inspection(
        "checkpoint",
        task,
        parameters=parameters,
        file_bytes=sum(file.stat().st_size for file in weights),
        layers=_layers(settings),
        labels=labels_of(settings) if task not in EMBEDDING | TEXT2TEXT and task != "causal-lm" else (),
        problems=tuple(problems),
        notes=tuple(notes),
    )


def checkpoint_task(settings: Mapping[str, Any], folder: Path) -> Task | None:
    """The task by the architecture's name in config.json; None when it is not one of ours."""
    if (folder / "modules.json").is_file():
        return "sentence-embedding"
    name = str((settings.get("architectures") or [""])[0])
    task = next((task for suffix, task in _SUFFIXES.items() if name.endswith(suffix)), None)
    if settings.get("problem_type") == "multi_label_classification":
        return {
            "text-classification": "multi-label-text-classification",
            "image-classification": "multi-label-image-classification",
        }.get(task or "", task)  # type: ignore[return-value]
    return task


def _layers(settings: Mapping[str, Any]) -> int | None:
    for key in ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "encoder_layers"):
        if isinstance(settings.get(key), int):
            return int(settings[key])
    depths = settings.get("depths")
    return sum(depths) if isinstance(depths, list) else None


def safetensors_parameters(path: Path, problems: list[Problem]) -> int:
    """Number of weights by the header of a safetensors file; a fault is added to ``problems``.

    Format, 8 bytes of length and then JSON: https://huggingface.co/docs/safetensors.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ValueError("the header is longer than the file")
            header = json.loads(stream.read(length))
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        if max((entry["data_offsets"][1] for entry in tensors), default=0) + 8 + length > size:
            raise ValueError("weights are missing at the end")
        return sum(math.prod(entry["shape"]) for entry in tensors)
    except (ValueError, struct.error, KeyError, TypeError, OSError) as error:
        problems.append(Problem("teacher.model", f"`{path}` is truncated or not a safetensors file: {error}"))
        return 0
