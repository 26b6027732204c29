"""What the files beside a model say about its inputs: processor, tokenizer, labels. Plain JSON; no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from compressor.errors import PlanError
from compressor.models.types import ImageInput, TextInput
from compressor.recipe import ImagePreprocess

TOKENIZER_FILE = "tokenizer.json"
_RESAMPLE: dict[int, Literal["nearest", "bilinear", "bicubic"]] = {
    0: "nearest",
    2: "bilinear",
    3: "bicubic",
}  # PIL codes


def labels_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Class names by output index from ``id2label`` of a config.json; empty when there are none."""
    table = config.get("id2label") or {}
    return tuple(str(table[key]) for key in sorted(table, key=int))


def _size_of(
    processor: Mapping[str, Any], fallback: tuple[int, int] | None
) -> tuple[tuple[int, int] | None, list[str]]:
    """Height and width after the processor, and notes on what is done differently here."""
    if not processor.get("do_resize", True) and not processor.get("do_center_crop"):
        return None, []
    size, crop = processor.get("size"), processor.get("crop_size")
    if processor.get("do_center_crop") and crop:
        target = (crop, crop) if isinstance(crop, int) else (int(crop["height"]), int(crop["width"]))
        return target, [
            f"the processor resizes and crops to {target}; here pictures are resized to it without cropping"
        ]
    if isinstance(size, int):
        return (size, size), []
    if isinstance(size, Mapping) and "height" in size:
        return (int(size["height"]), int(size["width"])), []
    if isinstance(size, Mapping) and "shortest_edge" in size:
        edge = int(size["shortest_edge"])
        return fallback or (edge, edge), [
            f"the processor keeps the aspect ratio (shortest edge {edge}); here it does not"
        ]
    return fallback, []


def image_input(
    processor: Mapping[str, Any], *, size: tuple[int, int] | None, channels: Literal[1, 3] | None
) -> tuple[ImageInput, list[str]]:
    """The content of a ``preprocessor_config.json`` as :class:`ImageInput`, with notes on every approximation.

    ``size`` (height, width) and ``channels`` are the model's own, used where the processor does not say.
    """
    target, notes = _size_of(processor, size)
    scale = float(processor.get("rescale_factor", 1 / 255)) if processor.get("do_rescale", True) else 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    if processor.get("do_normalize", True) and processor.get("image_mean") is not None:
        mean = tuple(float(value) for value in _as_list(processor["image_mean"]))
        std = tuple(float(value) for value in _as_list(processor["image_std"]))
    code = int(processor.get("resample", 2))
    if code not in _RESAMPLE:
        notes.append(f"the processor resamples with PIL filter {code}; here with bicubic")
    settings = ImagePreprocess(size=target or size, mean=mean, std=std, scale=scale, channels=channels)
    return ImageInput(settings=settings, resample=_RESAMPLE.get(code, "bicubic")), notes


def _as_list(value: Any) -> list[float]:
    return list(value) if isinstance(value, list | tuple) else [value]


def bare_tokenizer(text: str, where: str) -> bytes:
    """The text of a tokenizer.json without its truncation and padding: those are set by whoever uses it.

    Checkpoints are often saved with the padding of their training (fixed length 128), which would silently pad every
    sentence of an edge device to that length.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise PlanError.single(where, f"tokenizer.json is not valid JSON: {error}") from error
    data["truncation"] = data["padding"] = None
    return json.dumps(data, ensure_ascii=False).encode()


def text_input(names: tuple[str, ...], *, wanted: int, limits: list[Any], pad_id: Any) -> TextInput:
    """``wanted`` tokens, cut to the smallest sane limit of the model and tokenizer."""
    sane = [int(limit) for limit in limits if isinstance(limit, int | float) and 0 < limit < 1_000_000]
    return TextInput(
        tokenizer_file=TOKENIZER_FILE, max_length=min([wanted, *sane]), pad_id=int(pad_id or 0), names=names
    )
