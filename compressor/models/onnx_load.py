"""An ONNX file as a teacher: task, preprocessing and labels from its shapes, its neighbours and the data. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

from compressor.errors import PlanError
from compressor.models.onnx_file import OnnxFacts, read_onnx
from compressor.models.preprocessing import TOKENIZER_FILE, bare_tokenizer, image_input, labels_of, text_input
from compressor.models.source import Source, licence_of, read_json
from compressor.models.types import ImageInput, LoadedModel, Provenance, RawInput, TextInput
from compressor.recipe import DataConfig, ImagePreprocess, TeacherConfig
from compressor.types import EMBEDDING, Task


def load_onnx(
    source: Source,
    config: TeacherConfig,
    *,
    data: DataConfig | None = None,
    picture: bool | None = None,
    facts: OnnxFacts | None = None,
) -> LoadedModel:
    """An ONNX file as a :class:`LoadedModel` without a module: only ``prune`` and ``quantize`` apply.

    ``picture`` says whether the data are pictures; None when that is not known. Files beside the model (config.json,
    tokenizer.json, preprocessor_config.json) are used if they are there. ``facts`` saves a second reading of the file.
    """
    data = data or DataConfig()
    facts = facts or read_onnx(source.path)
    folder = source.path.resolve().parent
    beside = read_json(folder / "config.json")
    notes = [f"already quantized: {', '.join(facts.quantized)}"] if facts.quantized else []
    notes += [f"the ONNX checker says: {fault}" for fault in facts.faults]
    preprocess, files, more = _preprocess(facts, folder, data, picture)
    task = config.task or infer_task(facts, preprocess)
    return LoadedModel(
        kind="onnx",
        task=task,
        module=None,
        onnx=source.path,
        inputs=facts.inputs,
        outputs=facts.outputs,
        labels=_labels(facts, task, data, beside),
        preprocess=preprocess,
        provenance=Provenance(
            source=source.name,
            digest=facts.digest,
            licence=config.licence or licence_of(folder),
            notes=tuple([*notes, *more]),
        ),
        files=files,
    )


def infer_task(facts: OnnxFacts, preprocess: ImageInput | TextInput | RawInput) -> Task:
    """The task by shapes: one (N, classes) output of a picture or text model; anything else is ``generic``."""
    plain = len(facts.outputs) == 1 and len(facts.outputs[0].shape) == 2
    if isinstance(preprocess, ImageInput) and plain:
        return "image-classification"
    if isinstance(preprocess, TextInput) and plain:
        embedding = any(word in facts.outputs[0].name.lower() for word in ("embed", "pool"))
        return "sentence-embedding" if embedding else "text-classification"
    return "generic"


def _labels(facts: OnnxFacts, task: Task, data: DataConfig, beside: dict[str, Any]) -> tuple[str, ...]:
    if task in EMBEDDING or task in ("generic", "causal-lm"):
        return data.labels or ()
    count = facts.outputs[0].shape[-1]
    labels = data.labels or labels_of(beside)
    if not isinstance(count, int) or len(labels) == count:
        return labels
    if data.labels:
        raise PlanError.single("data.labels", f"names {len(labels)} classes but the model has {count} outputs")
    return tuple(str(index) for index in range(count))


def _preprocess(
    facts: OnnxFacts, folder: Path, data: DataConfig, picture: bool | None
) -> tuple[ImageInput | TextInput | RawInput, dict[str, bytes], list[str]]:
    names = tuple(spec.name for spec in facts.inputs)
    if "input_ids" in names:
        return _text(names, facts, folder, data)
    shape = facts.inputs[0].shape if len(facts.inputs) == 1 else ()
    if len(shape) == 4 and picture is not False and facts.inputs[0].dtype in ("float32", "float16", "uint8"):
        return _image(shape, facts, folder, data)
    return RawInput(), {}, []


def _text(
    names: tuple[str, ...], facts: OnnxFacts, folder: Path, data: DataConfig
) -> tuple[TextInput | RawInput, dict[str, bytes], list[str]]:
    file = folder / TOKENIZER_FILE
    if not file.is_file():
        return RawInput(), {}, ["no tokenizer.json beside the model: its inputs must come as token ids"]
    settings = read_json(folder / "tokenizer_config.json")
    axis = facts.inputs[names.index("input_ids")].shape[-1]
    preprocess = text_input(
        names,
        wanted=data.max_length,
        limits=[settings.get("model_max_length"), axis if isinstance(axis, int) else None],
        pad_id=read_json(folder / "config.json").get("pad_token_id", 0),
    )
    return preprocess, {TOKENIZER_FILE: bare_tokenizer(file.read_text(encoding="utf-8"), f"`{folder}`")}, []


def _image(
    shape: tuple[int | str, ...], facts: OnnxFacts, folder: Path, data: DataConfig
) -> tuple[ImageInput | RawInput, dict[str, bytes], list[str]]:
    layout: Literal["NCHW", "NHWC"] = "NHWC" if shape[3] in (1, 3) and shape[1] not in (1, 3) else "NCHW"
    channels, *axes = (shape[3], shape[1], shape[2]) if layout == "NHWC" else (shape[1], shape[2], shape[3])
    if channels not in (1, 3):
        return RawInput(), {}, []
    size = cast(tuple[int, int], tuple(axes)) if all(isinstance(axis, int) for axis in axes) else None
    colour = cast(Literal[1, 3], channels)
    processor = read_json(folder / "preprocessor_config.json")
    if data.preprocess is None and processor:
        made, notes = image_input(processor, size=size, channels=colour)
        return (
            ImageInput(settings=made.settings.model_copy(update={"layout": layout}), resample=made.resample),
            {},
            notes,
        )
    notes = [] if data.preprocess else ["no data.preprocess: assuming the model wants pixels scaled to 0..1"]
    scale = 1.0 if facts.inputs[0].dtype == "uint8" else 1 / 255
    settings = data.preprocess or ImagePreprocess(layout=layout, scale=scale)
    return (
        ImageInput(
            settings=settings.model_copy(
                update={"size": settings.size or size, "channels": settings.channels or colour}
            )
        ),
        {},
        notes,
    )
