"""Pictures: IDX files, folders by class, and the split that turns uint8 pixels into model inputs.

Pillow is only needed for compressed pictures and for resizing, so that IDX and ``.npz`` data work in the light core.
"""

from __future__ import annotations

import gzip
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compressor.data.raw import Encoded, RawPart
from compressor.errors import ConfigError, PlanError
from compressor.models.types import ImageInput
from compressor.recipe import ImagePreprocess
from compressor.types import Array, Inputs, TensorSpec

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"})
IN_MEMORY_BYTES = 2**30  # decoded pictures up to here are kept; more are decoded batch by batch
IDX_NAMES = {"train": "train", "test": "t10k"}
SPLIT_NAMES = {"train": "train", "test": "test", "val": "validation", "valid": "validation", "validation": "validation"}


def find_idx(folder: Path, stem: str) -> Path | None:
    """``train-images-idx3-ubyte`` with or without ``.gz``; some copies write a dot instead of the dash before idx."""
    for name in (stem, stem.replace("-idx", ".idx")):
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    return None


def read_idx(path: Path) -> Array:
    """An IDX file of unsigned bytes (http://yann.lecun.com/exdb/mnist: 0, 0, 8, rank, big-endian sizes, data)."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ConfigError.single(f"`{path}`", "data.source", f"cannot be read: {error}") from error
    if len(data) < 8 or data[:3] != b"\x00\x00\x08" or not 1 <= data[3] <= 4:
        raise ConfigError.single(f"`{path}`", "data.source", "is not an IDX file of unsigned bytes")
    start = 4 + 4 * data[3]
    shape = (
        tuple(int(size) for size in np.frombuffer(data, ">i4", count=data[3], offset=4)) if len(data) >= start else ()
    )
    if not shape or len(data) != start + math.prod(shape):
        raise ConfigError.single(f"`{path}`", "data.source", f"is truncated: {len(data)} bytes for shape {shape}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def idx_parts(folder: Path) -> dict[str, RawPart]:
    """``train`` and, if there, ``test`` (t10k) of an MNIST-like folder; empty when it is none."""
    parts = {}
    for part, prefix in IDX_NAMES.items():
        images = find_idx(folder, f"{prefix}-images-idx3-ubyte")
        labels = find_idx(folder, f"{prefix}-labels-idx1-ubyte")
        if images is None:
            continue
        pixels = read_idx(images)
        numbers = read_idx(labels).astype(np.int64) if labels else None
        if numbers is not None and len(numbers) != len(pixels):
            what = f"{len(pixels)} pictures but {len(numbers)} labels"
            raise ConfigError.single(f"`{folder}`", "data.source", what)
        parts[part] = RawPart("pictures", pixels[..., None], numbers)
    return parts


def _pictures_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())


def _by_class(folder: Path) -> RawPart | None:
    files: list[Path] = []
    labels: list[str] = []
    for child in sorted(path for path in folder.iterdir() if path.is_dir()):
        found = _pictures_in(child)
        files += found
        labels += [child.name] * len(found)
    return RawPart("files", files, labels) if files else None


def folder_parts(folder: Path) -> dict[str, RawPart]:
    """Pictures in one subfolder a class, below ``train/ test/ validation/`` if there are such; empty when it is none.

    Pictures that lie directly in the folder are one unlabelled part.
    """
    subfolders = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()}
    splits = {SPLIT_NAMES[name]: path for name, path in subfolders.items() if name in SPLIT_NAMES}
    if "train" in splits:
        found = {name: _by_class(path) for name, path in splits.items()}
        return {name: part for name, part in found.items() if part is not None}
    part = _by_class(folder)
    if part is not None:
        return {"train": part}
    flat = _pictures_in(folder)
    return {"train": RawPart("files", flat)} if flat else {}


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError.single(
            "the data", "data.source", "compressed pictures and resizing need Pillow", hint="pip install pillow"
        ) from error
    return Image


def decode(sample: Encoded) -> Array:
    """A compressed picture as uint8 (H, W, 1) when grey, otherwise (H, W, 3); turned as its EXIF data say."""
    image = _pillow()
    from PIL import ImageOps, UnidentifiedImageError

    name = f"`{sample}`" if isinstance(sample, Path) else "a picture"
    try:
        opened = ImageOps.exif_transpose(image.open(io.BytesIO(sample) if isinstance(sample, bytes) else sample))
        pixels = np.asarray(opened.convert("L" if opened.mode in ("1", "L", "I;16") else "RGB"))
    except (OSError, UnidentifiedImageError, image.DecompressionBombError, ValueError) as error:
        raise ConfigError.single(name, "data.source", f"cannot be decoded: {error}") from error
    return pixels[..., None] if pixels.ndim == 2 else pixels


def with_channels(pixels: Array, channels: int | None) -> Array:
    """(..., C) with 1 or 3 channels; grey by ITU-R 601-2 luma in Pillow's fixed-point arithmetic."""
    have = pixels.shape[-1]
    if channels is None or have == channels:
        return pixels
    if have == 4:
        return with_channels(pixels[..., :3], channels)
    if channels == 3 and have == 1:
        return np.repeat(pixels, 3, axis=-1)
    if channels == 1 and have == 3:
        red, green, blue = (pixels[..., i].astype(np.uint32) for i in range(3))
        return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).astype(np.uint8)[..., None]
    raise PlanError.single("data", f"pictures with {have} channels cannot be given to a model with {channels}")


def resized(pixels: Array, size: tuple[int, int] | None, resample: str) -> Array:
    """One picture (H, W, C) at ``size`` (height, width) with Pillow's filter; unchanged when it already fits."""
    if size is None or pixels.shape[:2] == tuple(size):
        return pixels
    image = _pillow()
    made = image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    out = np.asarray(made.resize((size[1], size[0]), getattr(image.Resampling, resample.upper())))
    return out[..., None] if out.ndim == 2 else out


@dataclass(frozen=True)
class PictureStore:
    """Raw pictures, once in memory: uint8 (N, H, W, C), or compressed when they would not fit."""

    samples: Array | Sequence[Encoded]
    preprocess: ImageInput

    def take(self, rows: Array) -> Array:
        """uint8 (n, H, W, C), resized and with the channels the model wants."""
        settings = self.preprocess.settings
        if isinstance(self.samples, np.ndarray):
            pixels = with_channels(self.samples[rows], settings.channels)
            if settings.size is None or pixels.shape[1:3] == tuple(settings.size):
                return pixels
            return np.stack([resized(picture, settings.size, self.preprocess.resample) for picture in pixels])
        return np.stack([self._decoded(self.samples[int(row)]) for row in rows])

    def _decoded(self, sample: Encoded) -> Array:
        settings = self.preprocess.settings
        return resized(with_channels(decode(sample), settings.channels), settings.size, self.preprocess.resample)


def picture_store(part: RawPart, preprocess: ImageInput) -> PictureStore:
    """Decode compressed pictures now if they fit into memory at the model's size, so that no epoch does it again."""
    samples: Any = part.samples
    if part.kind == "pictures" or len(part) == 0:
        return PictureStore(samples, preprocess)
    settings = preprocess.settings
    first = with_channels(decode(samples[0]), settings.channels)
    size = settings.size or first.shape[:2]
    if len(samples) * size[0] * size[1] * first.shape[-1] > IN_MEMORY_BYTES:
        return PictureStore(samples, preprocess)
    fixed = settings.model_copy(update={"channels": settings.channels or first.shape[-1]})
    lazy = PictureStore(samples, preprocess.model_copy(update={"settings": fixed}))
    try:
        return PictureStore(lazy.take(np.arange(len(samples))), lazy.preprocess)
    except ValueError as error:
        hint = "Give `data.preprocess.size`."
        raise PlanError.single("data.source", "holds pictures of different sizes", hint=hint) from error


def pixel_table(settings: ImagePreprocess, channels: int, dtype: str) -> Array:
    """(C, 256): what each pixel value becomes, ``(value * scale - mean) / std``. A table is exact, and one look-up."""
    if len(settings.mean) not in (1, channels) or len(settings.std) not in (1, channels):
        what = f"{len(settings.mean)} means and {len(settings.std)} deviations for {channels} channels"
        raise PlanError.single("data.preprocess", what, hint="Give one of each, or one per channel.")
    mean = np.broadcast_to(np.asarray(settings.mean, np.float32), (channels,))[:, None]
    std = np.broadcast_to(np.asarray(settings.std, np.float32), (channels,))[:, None]
    values = np.arange(256, dtype=np.float32)[None] * np.float32(settings.scale)
    table = (values - mean) / std
    return table.astype(dtype) if np.dtype(dtype).kind == "f" else np.clip(np.rint(table), 0, 255).astype(dtype)


@dataclass(eq=False)
class ImageSplit:
    """One part of a picture data set."""

    name: str
    labels: Array | None
    digests: Array
    store: PictureStore
    rows: Array  # positions in the store
    spec: TensorSpec

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, index: Array) -> Inputs:
        """One float32 tensor by the model's input name, in its layout."""
        pixels = self.store.take(self.rows[index])
        channels = pixels.shape[-1]
        table = pixel_table(self.store.preprocess.settings, channels, self.spec.dtype)
        first = self.store.preprocess.settings.layout == "NCHW"
        count, height, width, _ = pixels.shape
        shape = (count, channels, height, width) if first else (count, height, width, channels)
        out = np.empty(shape, self.spec.dtype)
        for channel in range(channels):
            view = out[:, channel] if first else out[..., channel]
            view[...] = table[channel][pixels[..., channel]]
        return {self.spec.name: out}
