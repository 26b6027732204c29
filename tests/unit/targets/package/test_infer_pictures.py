"""Reading and resizing pictures in ``infer.py`` gives what Pillow gives, bit for bit."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from targets.package import infer
from targets.package.infer import RefusalError, picture_input, read_picture, read_plainly, resize, to_channels

Image = pytest.importorskip("PIL.Image", reason="Pillow is the reference")
DRAW = np.random.default_rng(11)


def picture(height: int, width: int, channels: int) -> Any:
    shape = (height, width) if channels == 1 else (height, width, channels)
    smooth = np.add.outer(np.arange(height) * 3, np.arange(width) * 5)
    noise = DRAW.integers(0, 90, shape)
    return ((smooth[..., None] if channels > 1 else smooth) % 160 + noise).astype(np.uint8)


@pytest.mark.parametrize("resample", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(28, 28), (7, 9), (64, 50), (1, 1), (33, 28), (28, 61)])
@pytest.mark.parametrize("channels", [1, 3])
def test_resize_is_that_of_pillow(resample: str, size: tuple[int, int], channels: int) -> None:
    for old in ((28, 28), (37, 61), (5, 3)):
        pixels = picture(*old, channels)
        wanted = np.asarray(
            Image.fromarray(pixels).resize((size[1], size[0]), getattr(Image.Resampling, resample.upper()))
        )
        found = resize(pixels.reshape(*old, channels), size, resample)
        np.testing.assert_array_equal(found.reshape(wanted.shape), wanted)


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_extremes_do_not_wrap_around(resample: str) -> None:
    pixels = np.where(DRAW.integers(0, 2, (17, 23)) > 0, 255, 0).astype(np.uint8)
    wanted = np.asarray(Image.fromarray(pixels).resize((40, 31), getattr(Image.Resampling, resample.upper())))
    np.testing.assert_array_equal(resize(pixels[:, :, None], (31, 40), resample)[:, :, 0], wanted)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P"])
@pytest.mark.parametrize("optimised", [False, True])
def test_plain_png_reader_agrees_with_pillow(
    mode: str, optimised: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow picks line filters by content: smooth and noisy pictures bring all five."""
    path = tmp_path / "picture.png"
    for pixels in (picture(40, 31, 3), picture(1, 1, 3), np.repeat(picture(9, 70, 1)[..., None], 3, 2)):
        Image.fromarray(pixels).convert(mode).save(path, optimize=optimised)
        wanted = read_picture(path)
        np.testing.assert_array_equal(read_plainly(path), wanted)
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, "PIL", None)
            np.testing.assert_array_equal(read_picture(path), wanted)


def png(filters: list[int], pixels: Any) -> bytes:
    """A grey PNG whose lines are filtered as asked, written from the specification."""
    height, width = pixels.shape
    lines = b""
    for row, kind in enumerate(filters):
        above = pixels[row - 1].astype(int) if row else np.zeros(width, int)
        current = pixels[row].astype(int)
        left = np.concatenate([[0], current[:-1]])
        corner = np.concatenate([[0], above[:-1]])
        nearest = [infer.paeth(int(a), int(b), int(c)) for a, b, c in zip(left, above, corner, strict=True)]
        guess = [np.zeros(width, int), left, above, (left + above) // 2, np.array(nearest)][kind]
        lines += bytes([kind]) + ((current - guess) % 256).astype(np.uint8).tobytes()

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return infer.PNG_MAGIC + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def test_every_line_filter() -> None:
    pixels = picture(10, 13, 1)
    data = png([0, 1, 2, 3, 4, 4, 3, 2, 1, 0], pixels)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)
    np.testing.assert_array_equal(infer.decode_png(data), pixels)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_netpbm(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.pgm" if mode == "L" else "a.ppm")
    Image.fromarray(picture(6, 5, 3)).convert(mode).save(path)
    np.testing.assert_array_equal(read_plainly(path), read_picture(path))
    commented = path.read_bytes().replace(b"\n", b"\n# a comment\n", 1)
    np.testing.assert_array_equal(infer.decode_netpbm(commented), read_picture(path))


def damaged(data: bytes) -> list[bytes]:
    return [
        b"",
        data[:40],
        data[:-30],
        data.replace(b"IDAT", b"IDAX"),
        b"GIF89a",
        b"P5 3 3 65535\n",
        b"P5\n9 9 255\nxx",
    ]


def test_damaged_pictures_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    for data in damaged(png([0] * 6, picture(6, 6, 1))):
        path.write_bytes(data)
        with pytest.raises(RefusalError):
            read_plainly(path)
    path.write_bytes(b"nothing")
    with pytest.raises(RefusalError):
        read_picture(path)


def test_a_bomb_inflates_no_further_than_its_header_says() -> None:
    head = struct.pack(">IIBBBBB", 4, 4, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(50_000_000))
    data = infer.PNG_MAGIC
    for name, part in ((b"IHDR", head), (b"IDAT", body)):
        data += struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
    assert infer.decode_png(data).shape == (4, 4)


def test_grey_is_that_of_pillow() -> None:
    pixels = picture(20, 20, 3)
    np.testing.assert_array_equal(to_channels(pixels, 1)[:, :, 0], np.asarray(Image.fromarray(pixels).convert("L")))
    assert to_channels(picture(4, 5, 1), 3).shape == (4, 5, 3)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_scaling_and_layout(layout: str) -> None:
    settings = {"size": None, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "scale": 1 / 255, "layout": layout}
    pixels = picture(4, 5, 3)
    found = picture_input(pixels, {"settings": {**settings, "channels": 3}})
    wanted = (pixels.astype(np.float64) / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    wanted = wanted.transpose(2, 0, 1) if layout == "NCHW" else wanted
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    np.testing.assert_allclose(found[0], wanted, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_pixels_become_what_they_were_in_training(dtype: str) -> None:
    """The table look-up of the data part and the formula here are the same numbers."""
    from compressor.data.images import pixel_table
    from compressor.recipe import ImagePreprocess

    rules = ImagePreprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), channels=3)
    pixels = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    table = pixel_table(rules, 3, dtype)
    found = picture_input(pixels, {"settings": rules.model_dump(mode="json")}, dtype)
    np.testing.assert_array_equal(found[0].reshape(3, 256), table)
