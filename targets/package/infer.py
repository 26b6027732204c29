#!/usr/bin/env python3
"""Run the packaged model. Needs Python 3.10 or later, numpy and onnxruntime; nothing else.

python infer.py INPUT...      pictures (.npy .png .pgm .ppm; more with Pillow), sentences or .txt files, .npy/.npz
python infer.py --self-check  verify every file and repeat stored answers
python infer.py --benchmark   latency on this device
"""

# This file is copied verbatim into every package and must run alone, so that it is longer than our files are otherwise.
# ruff: noqa: T201

from __future__ import annotations

import argparse
import bisect
import hashlib
import importlib.util
import json
import re
import struct
import sys
import time
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = "np.ndarray[Any, Any]"
HERE = Path(__file__).resolve().parent


class RefusalError(Exception):
    """Something the user can mend; printed without a traceback."""


# ---------------------------------------------------------------------------------------------------- pictures

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type; PNG specification, table 11.1


def read_picture(path: Path) -> Array:
    """uint8 (height, width) or (height, width, 3). Pillow reads it when it is there, otherwise PNG, PGM and PPM."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        return read_plainly(path)
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            return np.asarray(picture.convert("L" if picture.mode in ("1", "L", "I;16") else "RGB"))
    except OSError as error:
        raise RefusalError(f"{path}: {error}") from error


def read_plainly(path: Path) -> Array:
    """Without Pillow: 8-bit PNG that is not interlaced, and binary PGM and PPM."""
    data = path.read_bytes()
    try:
        if data.startswith(PNG_MAGIC):
            return decode_png(data)
        if data[:2] in (b"P5", b"P6"):
            return decode_netpbm(data)
    except (struct.error, zlib.error, ValueError, IndexError, KeyError) as error:
        raise RefusalError(f"{path}: damaged picture ({error})") from error
    raise RefusalError(
        f"{path}: only .npy, PNG, PGM and PPM are read without Pillow; `pip install pillow` for the others"
    )


def decode_netpbm(data: bytes) -> Array:
    """Binary PGM (P5) or PPM (P6) with 8 bits a sample."""
    head = re.match(rb"P([56])(?:\s|#[^\n]*\n)+(\d+)(?:\s|#[^\n]*\n)+(\d+)(?:\s|#[^\n]*\n)+(\d+)\s", data)
    if head is None:
        raise ValueError("no valid header")
    width, height, largest = int(head[2]), int(head[3]), int(head[4])
    if largest != 255:
        raise ValueError(f"largest sample {largest}, only 255 is read")
    shape = (height, width) if head[1] == b"5" else (height, width, 3)
    count = int(np.prod(shape))
    return np.frombuffer(data, np.uint8, count, head.end()).reshape(shape)


def decode_png(data: bytes) -> Array:
    """PNG with 8 bits a sample, not interlaced. Transparency is dropped, as Pillow's ``convert`` does."""
    chunks: list[tuple[bytes, bytes]] = []
    at = len(PNG_MAGIC)
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += length + 12
    width, height, depth, colour, _, _, interlace = struct.unpack(">IIBBBBB", dict(chunks)[b"IHDR"])
    if depth != 8 or interlace or colour not in PNG_CHANNELS:
        raise ValueError(f"{depth} bits, colour type {colour}, interlace {interlace}; `pip install pillow` reads it")
    channels = PNG_CHANNELS[colour]
    size = (width * channels + 1) * height
    inflate = zlib.decompressobj()
    raw = inflate.decompress(b"".join(body for name, body in chunks if name == b"IDAT"), size)
    if len(raw) != size:
        raise ValueError("picture data end early")
    pixels = unfilter(np.frombuffer(raw, np.uint8).reshape(height, -1), channels).reshape(height, width, channels)
    if colour == 3:
        palette: Array = np.frombuffer(dict(chunks)[b"PLTE"], np.uint8).reshape(-1, 3)
        pixels = palette[pixels[:, :, 0]]
    if colour == 4:
        return np.repeat(pixels[:, :, :1], 3, axis=2)
    return pixels[:, :, 0] if colour == 0 else pixels[:, :, :3]


def unfilter(lines: Array, step: int) -> Array:
    """Undo PNG's line filters (specification, section 9). ``step`` is the number of bytes of a pixel."""
    above = np.zeros(lines.shape[1] - 1, np.uint8)
    found = []
    for line in lines:
        kind, line = int(line[0]), line[1:]
        if kind == 0:
            above = line
        elif kind == 1:
            above = np.cumsum(line.reshape(-1, step), axis=0, dtype=np.uint8).reshape(-1)
        elif kind == 2:
            above = line + above
        elif kind in (3, 4):
            above = unfilter_line(line.tolist(), above.tolist(), step, paeth if kind == 4 else average)
        else:
            raise ValueError(f"unknown line filter {kind}")
        found.append(above)
    return np.stack(found)


def unfilter_line(line: list[int], above: list[int], step: int, predict: Callable[[int, int, int], int]) -> Array:
    """A line whose bytes are differences to what ``predict(left, above, above left)`` says."""
    out = [0] * step + line
    above = [0] * step + above
    for at in range(step, len(out)):
        out[at] = (out[at] + predict(out[at - step], above[at], above[at - step])) & 255
    return np.array(out[step:], np.uint8)


def average(left: int, up: int, _: int) -> int:
    return (left + up) // 2


def paeth(left: int, up: int, corner: int) -> int:
    guess = left + up - corner
    distances = abs(guess - left), abs(guess - up), abs(guess - corner)
    return (left, up, corner)[distances.index(min(distances))]


def to_channels(picture: Array, channels: int | None) -> Array:
    """(height, width, channels): grey is repeated, colour becomes ITU-R 601 luma in Pillow's fixed-point form."""
    picture = picture[:, :, None] if picture.ndim == 2 else picture
    if channels == 1 and picture.shape[2] == 3:
        weights = np.array([19595, 38470, 7471], np.int64)
        return np.asarray((picture.astype(np.int64) @ weights + 0x8000) >> 16, np.uint8)[:, :, None]
    return np.repeat(picture, 3, axis=2) if channels == 3 and picture.shape[2] == 1 else picture


def triangle(x: Array) -> Array:
    return np.maximum(0.0, 1.0 - np.abs(x))


def cubic(x: Array) -> Array:
    """Keys, *Cubic convolution interpolation for digital image processing* (1981), a = -0.5."""
    x = np.abs(x)
    near = ((-0.5 + 2) * x - (-0.5 + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


FILTERS = {"bilinear": (triangle, 1.0), "bicubic": (cubic, 2.0)}
BITS = 32 - 8 - 2  # Pillow keeps its 8-bit weights in that many fractional bits


def resize(picture: Array, size: Sequence[int], resample: str) -> Array:
    """uint8 (h, w, c) to (size[0], size[1], c), bit for bit what Pillow's ``resize`` gives (antialiased)."""
    height, width = size
    if resample == "nearest":
        rows, columns = nearest(picture.shape[0], height), nearest(picture.shape[1], width)
        return np.ascontiguousarray(picture[rows][:, columns])
    if picture.shape[1] != width:
        picture = convolve(picture.transpose(1, 0, 2), width, resample).transpose(1, 0, 2)
    return convolve(picture, height, resample) if picture.shape[0] != height else picture


def nearest(old: int, new: int) -> Array:
    """Source index of every pixel; the sum runs up as Pillow's does."""
    scale = old / new
    places = np.cumsum(np.concatenate([[scale * 0.5], np.full(new - 1, scale)]))
    return np.minimum(places.astype(np.int64), old - 1)


def convolve(picture: Array, new: int, resample: str) -> Array:
    """Resample the first axis with a filter that widens when the picture shrinks."""
    kernel, reach = FILTERS[resample]
    old = picture.shape[0]
    scale = old / new
    stretch = max(scale, 1.0)
    support = reach * stretch
    out = np.empty((new, *picture.shape[1:]), np.uint8)
    for at in range(new):
        centre = (at + 0.5) * scale
        first, last = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), old)
        weights = kernel((np.arange(first, last) - centre + 0.5) * (1.0 / stretch))
        weights = weights / weights.sum()
        whole = np.trunc(weights * (1 << BITS) + np.where(weights < 0, -0.5, 0.5)).astype(np.int64)
        total = np.tensordot(whole, picture[first:last].astype(np.int64), 1) + (1 << (BITS - 1))
        out[at] = np.clip(total >> BITS, 0, 255)
    return out


def picture_input(picture: Array, rules: dict[str, Any], dtype: str = "float32") -> Array:
    """One uint8 picture as the model's input with a batch axis: resize, ``(pixel * scale - mean) / std``, layout."""
    settings = rules["settings"]
    picture = to_channels(picture, settings.get("channels"))
    if settings.get("size"):
        picture = resize(picture, settings["size"], rules.get("resample", "bilinear"))
    mean, std = (np.asarray(settings[key], np.float32) for key in ("mean", "std"))
    scaled: Array = (picture.astype(np.float32) * np.float32(settings["scale"]) - mean) / std
    if np.dtype(dtype).kind != "f":
        scaled = np.clip(np.rint(scaled), 0, 255)
    ordered = scaled.transpose(2, 0, 1) if settings["layout"] == "NCHW" else scaled
    return np.ascontiguousarray(ordered.astype(dtype))[None]


# ---------------------------------------------------------------------------------------------------- text

# Unicode as BERT's normalizer knows it (version 8): base-36 pairs of gap and length, from U+0080 on. Python's own
# tables differ between releases. Written by tools/generate_unicode_tables.py of compress-for-device.
CONTROL = (
    "3k w d 1 11u 6 m 1 5c 1 1d 1 3cu 1 1ks 5 q 5 1d 5 1 a 11u8 4xs 16n 1 6x 3 1 1 3b3 1 xya 4 43z 8 h406 1 u 2o "
    "1egw 1eke 2 1eke"
)
PUNCTUATION = (
    "4h 1 5 1 3 1 a 2 3 1 3 1 ji 1 8 1 cy 6 15 2 1f 1 1 1 2 1 2 1 18 2 k 2 1 2 d 1 2 2 22 4 2u 1 17 e 6h 3 1i f v "
    "1 79 2 a 1 an 1 lf 1 2i 1 a 2 4o f 1 1 11 4 1z 1 22 5 4 2 33 6 4r 1 h0 9 47 1 h8 2 18 2 26 3 1z 2 4d 3 1 3 "
    "11 b 8p 2 60 2 3k 7 1 6 4s 7 4b 4 1n 5 1q 2 1s 8 b 1 n0 o 8 k 1 d 1 c u 2 e 2 hl 4 t 2 u5 e 27 2 v a b7 m 1r "
    "4 w 2 l7 4 1 2 34 1 3z 1b 1 j ce 3 4 a 2 c g 1 c 1 2q 1 2i 1 mwy 2 7h 3 2r 1 a 1 37 6 ak 4 2e 2 14 3 1 1 1d "
    "2 1b 1 2p d g 2 3g 4 3i 2 g 2 6x 1 g2a 2 5s a m z 1 e 1 1 4 1 1 2 45 3 1 6 1 4 a 2 3 2 q 3 1 1 r 1 1 1 1 7 "
    "be 3 ik 1 1c 1 bi 1 kn 1 5j 1 v 1 7k 9 12 1 34 7 1u 7 2h 4 x6 7 31 2 1 4 3i 4 1c 2 27 5 3 1 d 1 1 3 2g 6 2z "
    "1 f0 1 6y n 2x 3 6w 3 2lt 5 dtl 2 3p 1 1t 5 8 1 g2i 1 5wn 5"
)
ACCENT = (
    "lc 34 7n 5 7d 19 1 1 1 2 1 2 1 1 20 b 1c l g 1 2t 7 2 6 2 2 1 4 z 1 u r 2j b 1m 9 y 4 1 9 1 3 1 5 17 3 3r w "
    "1j 1 1 1 4 8 4 1 3 7 a 2 t 1 1m 1 4 4 8 1 k 2 t 2 1l 1 4 2 4 2 2 3 3 1 u 2 3 1 b 2 1l 1 4 5 1 2 4 1 k 2 t 1 "
    "1m 1 2 1 1 4 8 1 8 1 b 2 u 1 1p 1 c 1 1e 1 1p 3 5 3 1 4 7 2 b 2 t 1 1m 1 2 1 6 1 5 2 k 2 t 1 1r 4 8 1 k 2 2u "
    "1 7 3 1 1 2i 1 2 7 c 8 2q 1 2 6 1 2 b 6 22 2 r 1 1 1 1 1 1j e 1 5 1 2 5 b 1 10 9 1 2u 4 1 6 1 2 2 2 p 2 4 3 "
    "g 4 d 1 2 2 6 1 f 1 jj 3 qa 3 t 3 t 2 u 2 1s 2 1 7 8 1 2 b 9 1 19 3 4b 1 3a 3 4 2 9 1 6 3 63 2 2 1 1m 1 1 7 "
    "1 1 1 1 2 8 6 a 2 1 1c e 1u 4 1c 1 1 5 1 1 5 1 14 9 c 2 w 4 2 2 1 3 1k 1 1 2 3 1 1 3 1m 8 2 2 48 3 1 d 1 7 4 "
    "1 6 1 3 2 5i 1i 6 4 k0 d 4 1 3 c 2da 3 3x 1 2o w fe 4 2z 2 n9w 1 4 a w 2 28 2 7k 1 3 1 4 1 p 2 4d 1 r i 1g 8 "
    "p b 1a 3 1c 1 2 4 2 1 14 1 1v 6 2 2 2 2 c 1 8 1 1b 1 1f 1 1 3 2 2 5 2 1 1 16 2 8 1 6m 1 2 1 4 1 fn4 1 kh g g "
    "g r1 1 6a 1 45 5 1ae 3 1 2 5 4 14 3 4 1 4l 2 10a 1 1i f 1k 3 1d 4 2 2 1x 3 10 5 1 8 1q 1 c 2 1g 9 b 3 2q 3 2 "
    "1 1 2 4n 1 3 8 l 2 1m 1 3 1 11 7 3 5 8u 6 1 1 4 2 1 2 6m 4 6 2 1 2 r 2 2d 8 2 1 1 2 2y 1 1 1 2 6 1 1 2t 3 2 "
    "4 1 5 gjo 5 1n 7 uw 4 f7u 2 43s 3 h 8 2 7 u 4 44 3 1iz 1j 4 1e 8 1 e 1 m 5 1 f 2sg 7 gzl5 6o"
)
SPACES = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B))))
CJK: tuple[tuple[int, int], ...] = (
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B81F),
)
CJK += ((0x2B920, 0x2CEAF), (0x2F800, 0x2FA1F))


class Ranges:
    """A set of code points from its run lengths."""

    def __init__(self, table: str) -> None:
        self.edges: list[int] = []
        at = 0
        for word in table.split():
            at += int(word, 36)
            self.edges.append(at)

    def __contains__(self, character: str) -> bool:
        return bisect.bisect_right(self.edges, ord(character)) % 2 == 1


IS_CONTROL, IS_PUNCTUATION, IS_ACCENT = Ranges(CONTROL), Ranges(PUNCTUATION), Ranges(ACCENT)


def is_control(character: str) -> bool:
    if character < "\x80":
        return character == "\x7f" or (character < " " and character not in "\t\n\r")
    return character in IS_CONTROL


def is_punctuation(character: str) -> bool:
    if character < "\x80":
        return "!" <= character <= "~" and not character.isalnum()
    return character in IS_PUNCTUATION


def is_cjk(character: str) -> bool:
    return character >= "\u3400" and any(low <= ord(character) <= high for low, high in CJK)


class WordPiece:
    """BERT's tokenizer in plain Python: normalize, split at spaces and punctuation, longest pieces first.

    Devlin et al., *BERT* (2019); the details follow the ``tokenizers`` library, whose file it reads.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        model, self.rules = spec["model"], spec.get("normalizer") or {}
        self.vocabulary: dict[str, int] = model["vocab"]
        self.unknown = self.vocabulary[model["unk_token"]]
        self.prefix: str = model["continuing_subword_prefix"]
        self.longest: int = model["max_input_chars_per_word"]
        self.added = {token["content"]: token for token in spec.get("added_tokens", [])}
        names = sorted(self.added, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, names))) if names else None
        self.post = spec.get("post_processor")
        self.before, self.after = template(self.post)
        self.known: dict[str, list[int]] = {}

    def encode(self, text: str, longest: int) -> list[int]:
        """Token ids with the special ones, cut to ``longest`` at the right."""
        room = max(0, longest - len(self.before) - len(self.after))
        ids: list[int] = []
        for part in self.parts(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                for word in self.words(part):
                    ids += self.pieces(word)
            if len(ids) >= room:
                break
        return [*self.before, *ids[:room], *self.after]

    def all_ids(self, text: str) -> list[int]:
        """Token ids without special ones at the ends, not cut."""
        ids: list[int] = []
        for part in self.parts(text):
            ids += (
                [part] if isinstance(part, int) else [piece for word in self.words(part) for piece in self.pieces(word)]
            )
        return ids

    def encode_pair(self, first: str, second: str, longest: int) -> tuple[list[int], list[int]]:
        """Token and type ids of two texts; the longer one is cut first."""
        layout = pair_template(self.post)
        special = sum(len(item) for item, _ in layout if isinstance(item, list))
        sides = [self.all_ids(first), self.all_ids(second)]
        lengths = cut_longest([len(side) for side in sides], max(0, longest - special))
        ids: list[int] = []
        types: list[int] = []
        for item, kind in layout:
            found = item if isinstance(item, list) else sides[item][: lengths[item]]
            ids += found
            types += [kind] * len(found)
        return ids, types

    def parts(self, text: str) -> Iterator[str | int]:
        """Text between special tokens, and the ids of those that stand in it."""
        at = 0
        for found in self.special.finditer(text) if self.special else ():
            token, start, end = self.added[found[0]], found.start(), found.end()
            between = text[at:start]
            yield between.rstrip("".join(SPACES)) if token.get("lstrip") else between
            yield token["id"]
            while token.get("rstrip") and end < len(text) and text[end] in SPACES:
                end += 1
            at = max(at, end)
        yield text[at:]

    def normalize(self, text: str) -> str:
        rules = self.rules
        if rules.get("clean_text"):
            kept = (character for character in text if character not in "\0\ufffd" and not is_control(character))
            text = "".join(" " if character in SPACES else character for character in kept)
        if rules.get("handle_chinese_chars"):
            text = "".join(f" {character} " if is_cjk(character) else character for character in text)
        strip = rules.get("strip_accents")
        if rules.get("lowercase") if strip is None else strip:
            text = "".join(
                char for char in unicodedata.normalize("NFD", text) if char < "\x80" or char not in IS_ACCENT
            )
        if rules.get("lowercase"):  # character by character: no final sigma
            text = "".join(character.lower() for character in text)
        return text

    def words(self, text: str) -> Iterator[str]:
        word = ""
        for character in self.normalize(text):
            space, alone = character in SPACES, is_punctuation(character)
            if (space or alone) and word:
                yield word
            word = "" if space or alone else word + character
            if alone and not space:
                yield character
        if word:
            yield word

    def pieces(self, word: str) -> list[int]:
        if word not in self.known:
            self.known[word] = self.split(word)
        return self.known[word]

    def split(self, word: str) -> list[int]:
        ids: list[int] = []
        start = 0
        while start < len(word) <= self.longest:
            prefix = self.prefix if start else ""
            ends = (end for end in range(len(word), start, -1) if prefix + word[start:end] in self.vocabulary)
            end = next(ends, None)
            if end is None:
                return [self.unknown]
            ids.append(self.vocabulary[prefix + word[start:end]])
            start = end
        return ids or [self.unknown]


def template(post: dict[str, Any] | None) -> tuple[list[int], list[int]]:
    """Special ids before and after a single sentence."""
    if post is None:
        return [], []
    if post["type"] == "BertProcessing":
        return [post["cls"][1]], [post["sep"][1]]
    sides: tuple[list[int], list[int]] = ([], [])
    after = 0
    for piece in post["single"]:
        if "Sequence" in piece:
            after = 1
        else:
            sides[after].extend(post["special_tokens"][piece["SpecialToken"]["id"]]["ids"])
    return sides


def pair_template(post: dict[str, Any] | None) -> list[tuple[list[int] | int, int]]:
    """What a pair becomes: lists of special ids, 0 for the first text, 1 for the second; each with its type id."""
    if post is None:
        return [(0, 0), (1, 1)]
    if post["type"] == "BertProcessing":
        start, end = [post["cls"][1]], [post["sep"][1]]
        return [(start, 0), (0, 0), (end, 0), (1, 1), (end, 1)]
    found: list[tuple[list[int] | int, int]] = []
    for piece in post["pair"]:
        ((kind, value),) = piece.items()
        ids = post["special_tokens"][value["id"]]["ids"] if kind == "SpecialToken" else int(value["id"] == "B")
        found.append((ids, value["type_id"]))
    return found


def cut_longest(lengths: list[int], room: int) -> list[int]:
    """Lengths of two texts that fit: the longer one is cut to the shorter before both are (``longest_first``)."""
    short, long = sorted(lengths)
    if short + long > room:
        long = short if short > room else max(short, room - short)
        if short + long > room:
            short, long = room // 2, room // 2 + room % 2
    return [short, long] if lengths[0] <= lengths[1] else [long, short]


def is_plain(spec: dict[str, Any]) -> bool:
    """Does :class:`WordPiece` do exactly what this tokenizer does?"""
    kinds = [(spec.get(key) or {}).get("type") for key in ("model", "normalizer", "pre_tokenizer", "post_processor")]
    post = spec.get("post_processor") or {}
    single = post.get("single", [])
    types = [next(iter(piece.values()))["type_id"] for piece in single]
    odd_tokens = any(token.get("single_word") or token.get("normalized") for token in spec.get("added_tokens", []))
    return (
        kinds[:3] == ["WordPiece", "BertNormalizer", "BertPreTokenizer"]
        and kinds[3] in (None, "TemplateProcessing", "BertProcessing")
        and not any(types)
        and sum("Sequence" in piece for piece in single) == (1 if single else 0)
        and not odd_tokens
    )


Encode: TypeAlias = "Callable[[str, int, str | None], tuple[list[int], list[int]]]"


def load_tokenizer(path: Path, by_word: bool = False) -> Encode:
    """A function from text, length limit and perhaps a second text to ids and types; ``by_word``: parted at blanks."""
    text = path.read_text(encoding="utf-8")
    spec = json.loads(text)
    if is_plain(spec):
        plain = WordPiece(spec)

        def encode(sentence: str, longest: int, second: str | None = None) -> tuple[list[int], list[int]]:
            if second is not None:
                return plain.encode_pair(sentence, second, longest)
            ids = plain.encode(sentence, longest)
            return ids, [0] * len(ids)

        return encode
    try:
        from tokenizers import Tokenizer
    except ImportError:
        kind = (spec.get("model") or {}).get("type")
        reason = f"the tokenizer of this model ({kind}) is not a plain BERT WordPiece, which is all that is built in"
        raise RefusalError(f"{reason}; `pip install tokenizers` and try again") from None
    library = Tokenizer.from_str(text)
    library.no_padding()

    def encode_with_library(sentence: str, longest: int, second: str | None = None) -> tuple[list[int], list[int]]:
        library.enable_truncation(longest)
        found = library.encode(sentence.split() if by_word else sentence, second, is_pretokenized=by_word)
        return found.ids, found.type_ids

    return encode_with_library


def text_input(ids: list[int], types: list[int], manifest: dict[str, Any]) -> dict[str, Array]:
    """One sentence as the model's inputs, shape (1, tokens); padded only where the model's shape is fixed."""
    rules = manifest["preprocess"]
    specs = {spec["name"]: spec for spec in manifest["inputs"]}
    made = {}
    for name in rules["names"]:
        spec = specs.get(name, {"dtype": "int64", "shape": []})
        fixed = spec["shape"][1] if len(spec["shape"]) == 2 and isinstance(spec["shape"][1], int) else len(ids)
        values, pad = ids, rules["pad_id"]
        if "mask" in name:
            values, pad = [1] * len(ids), 0
        elif "type" in name or "segment" in name:
            values, pad = types, 0
        made[name] = np.array([values[:fixed] + [pad] * (fixed - len(values))], spec["dtype"])
    return made if rules.get("start_id") is None else {**made, **decoder_input([rules["start_id"]], manifest)}


def decoder_input(ids: list[int], manifest: dict[str, Any]) -> dict[str, Array]:
    """What the decoder of an encoder-decoder model has read so far, shape (1, tokens)."""
    specs = {spec["name"]: spec for spec in manifest["inputs"]}
    made = {}
    for name, values in (("decoder_input_ids", ids), ("decoder_attention_mask", [1] * len(ids))):
        size = specs[name]["shape"][1]
        fill = size - len(ids) if isinstance(size, int) else 0
        pad = manifest["preprocess"]["pad_id"] if name == "decoder_input_ids" else 0
        made[name] = np.array([values + [pad] * fill], specs[name]["dtype"])
    return made


# ---------------------------------------------------------------------------------------------------- the package


def open_session(model: Path | bytes, runtime: dict[str, Any]) -> Any:
    """An ONNX Runtime session on the CPU with these threads, graph level and arena; of a file or of its content."""
    try:
        import onnxruntime
    except ImportError:
        raise RefusalError("onnxruntime is not installed; `pip install onnxruntime numpy`") from None
    level = {"disabled": "DISABLE_ALL", "basic": "ENABLE_BASIC", "extended": "ENABLE_EXTENDED"}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = runtime["threads"]
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = runtime["arena"]
    options.graph_optimization_level = getattr(
        onnxruntime.GraphOptimizationLevel, f"ORT_{level.get(runtime['graph_level'], 'ENABLE_ALL')}"
    )
    given = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def load_delta(path: Path, folder: Path) -> tuple[Any, Any]:
    """The delta.py of a package, and the update it reads."""
    found = importlib.util.spec_from_file_location("package_delta", folder / "delta.py")
    if found is None or found.loader is None or not (folder / "delta.py").is_file():
        raise RefusalError("delta.py is missing from this package, so that it cannot be updated")
    module = sys.modules[found.name] = importlib.util.module_from_spec(found)  # its dataclasses look themselves up
    found.loader.exec_module(module)
    try:
        return module, module.read_delta(path)
    except module.DeltaError as error:
        raise RefusalError(str(error)) from error


class Package:
    """The files beside this one."""

    def __init__(self, folder: Path, delta: Path | None = None) -> None:
        self.folder = folder
        self.delta = load_delta(delta, folder) if delta is not None else None
        try:
            self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RefusalError(f"manifest.json cannot be read: {error}") from error
        if self.manifest.get("manifest_version", "").split(".")[0] != "1":
            raise RefusalError(
                f"manifest version {self.manifest.get('manifest_version')} is not readable by this infer.py"
            )
        self._tokenize: Encode | None = None
        self._library: Any = None  # of models that write
        self.second: str | None = None  # of --pair
        self.by_word = self.manifest["postprocess"]["kind"] == "tags"

    def session(self, threads: int | None, portable: bool) -> Any:
        """An ONNX Runtime session set up as it was when the figures were taken."""
        model, runtime = self.manifest["model"], self.manifest["runtime"]
        name = model["file"]
        if model["format"] not in ("onnx", "ort"):
            if not portable:
                raise RefusalError(
                    f"{name} is for {model['runtime']}, which this script does not drive; see README.md. "
                    f"`--portable` runs {model['portable']} with ONNX Runtime instead: same task, other speed"
                )
            name = model["portable"]
        content: Path | bytes = self.folder / name
        if self.delta is not None:
            content = self.updated(self.folder / model["portable"], model["portable"] if portable else name)
        return open_session(content, {**runtime, "threads": threads or runtime["threads"]})

    def updated(self, portable: Path, name: str) -> bytes:
        """The model with the delta applied, in memory: the package's files stay as they are."""
        if portable.name != name:
            raise RefusalError(f"a delta updates {portable.name}, not {name}; give `--portable`")
        module, delta = self.delta  # type: ignore[misc]
        try:
            made: bytes = module.apply(portable.read_bytes(), delta, portable.name)
        except module.DeltaError as error:
            raise RefusalError(str(error)) from error
        return made

    def encoded(self, text: str, second: str | None = None) -> tuple[list[int], list[int]]:
        """Token and type ids of a text or a pair."""
        rules = self.manifest["preprocess"]
        if self._tokenize is None:
            self._tokenize = load_tokenizer(self.folder / rules["tokenizer_file"], self.by_word)
        return self._tokenize(text, rules["max_length"], second)

    def tokens(self, text: str, second: str | None = None) -> dict[str, Array]:
        """A text as the model's inputs; a model of pairs takes the second text beside it or after a tab."""
        if self.manifest["preprocess"].get("pair") and second is None:
            text, tab, second = text.partition("\t")
            if not tab:
                raise RefusalError("this model takes two texts: give --pair SECOND, or lines with a tab between them")
        return text_input(*self.encoded(text, second), self.manifest)

    def first_tokens(self, words: list[str]) -> list[int]:
        """Position of the first token of each word; words beyond the model's length have none."""
        path = self.folder / self.manifest["preprocess"]["tokenizer_file"]
        spec = json.loads(path.read_text(encoding="utf-8"))
        longest = self.manifest["preprocess"]["max_length"]
        if not is_plain(spec):
            from tokenizers import Tokenizer

            library = Tokenizer.from_str(json.dumps(spec))
            library.enable_truncation(longest)
            owners = library.encode(words, is_pretokenized=True).word_ids
            return [owners.index(number) for number in range(len(words)) if number in owners]
        plain = WordPiece(spec)
        at, places = len(plain.before), []
        for word in words:
            if at < longest - len(plain.after):
                places.append(at)
            at += len(plain.all_ids(word))
        return places

    def library(self) -> Any:
        """The tokenizer that turns ids back into text."""
        if self._library is None:
            try:
                from tokenizers import Tokenizer
            except ImportError:
                raise RefusalError("writing text needs `pip install tokenizers`") from None
            self._library = Tokenizer.from_file(str(self.folder / self.manifest["preprocess"]["tokenizer_file"]))
        return self._library

    def continued(self, session: Any, text: str, count: int) -> dict[str, Any]:
        """The likeliest ``count`` tokens after ``text``, one after the other."""
        library = self.library()
        rules, name = self.manifest["preprocess"], session.get_outputs()[0].name
        ids = list(library.encode(text).ids)
        if not ids:
            raise RefusalError("the text has no token to continue")
        start = len(ids)
        for _ in range(count):
            seen = ids[-rules["max_length"] :]
            (logits,) = session.run([name], text_input(seen, [0] * len(seen), self.manifest))
            ids.append(int(np.argmax(logits[0, len(seen) - 1])))
            if ids[-1] == rules.get("eos_id"):
                break
        return {"continuation": library.decode(ids[start:]), "tokens": ids[start:]}

    def written(self, session: Any, inputs: dict[str, Array], count: int | None) -> dict[str, Any]:
        """The target of an encoder-decoder model, token after token (greedy), until its end or ``count`` tokens.

        The model is run on the source and all that was written at every step; no cache is kept.
        """
        library = self.library()
        rules, name = self.manifest["preprocess"], session.get_outputs()[0].name
        limit = rules["target_length"] if count is None else min(count, rules["target_length"])
        ids = [rules["start_id"]]
        while len(ids) <= limit and (len(ids) == 1 or ids[-1] != rules["eos_id"]):
            (logits,) = session.run([name], {**inputs, **decoder_input(ids, self.manifest)})
            last = np.array(logits[0, len(ids) - 1])
            if rules["pad_id"] != rules["eos_id"]:
                last[rules["pad_id"]] = -np.inf  # padding is never written
            ids.append(int(np.argmax(last)))
        return {"text": library.decode(ids[1:], skip_special_tokens=True), "tokens": ids[1:]}

    def inputs_of(self, argument: str) -> Iterator[tuple[str, dict[str, Array]]]:
        """Model inputs, each with the name to show, from one argument of the command line."""
        kind = self.manifest["preprocess"]["kind"]
        if kind == "text":
            for line in read_lines(argument):
                yield line, self.tokens(" ".join(line.split()) if self.by_word else line, self.second)
        elif argument.endswith((".npy", ".npz")):
            yield from self.arrays(Path(argument))
        elif kind == "image":
            yield argument, self.picture(read_picture(existing(Path(argument))))
        else:
            raise RefusalError(f"{argument}: this model takes .npy (one input) or .npz (arrays by input name)")

    def picture(self, pixels: Array) -> dict[str, Array]:
        spec = self.manifest["inputs"][0]
        return {spec["name"]: picture_input(pixels, self.manifest["preprocess"], spec["dtype"])}

    def arrays(self, path: Path) -> Iterator[tuple[str, dict[str, Array]]]:
        """uint8 arrays are pictures where the model takes pictures; everything else goes in as it is."""
        found = np.load(existing(path), allow_pickle=False)
        specs = {spec["name"]: spec for spec in self.manifest["inputs"]}
        if not isinstance(found, np.ndarray):
            yield str(path), {name: found[name].astype(spec["dtype"]) for name, spec in specs.items()}
            return
        name, spec = next(iter(specs.items()))
        if self.manifest["preprocess"]["kind"] == "image" and found.dtype == np.uint8:
            single = found.ndim == 2 or (found.ndim == 3 and found.shape[2] in (1, 3))
            for index, pixels in enumerate([found] if single else found):
                yield f"{path}[{index}]", self.picture(pixels)
            return
        batch = found if found.ndim == len(spec["shape"]) else found[None]
        for index in range(len(batch)):
            yield f"{path}[{index}]", {name: batch[index : index + 1].astype(spec["dtype"])}

    def stored(self) -> list[dict[str, dict[str, Array]]]:
        """Samples of the self-check: per sample ``input``, ``output`` and perhaps ``raw``, arrays by name."""
        path = self.folder / "samples.npz"
        samples: dict[int, dict[str, dict[str, Array]]] = {}
        if path.is_file():
            with np.load(path, allow_pickle=False) as found:
                for key in found.files:
                    index, part, name = key.split(".", 2)
                    samples.setdefault(int(index), {}).setdefault(part, {})[name] = found[key]
        if self.delta is not None:  # the updated model answers otherwise; a delta made from a package says how
            answers = self.delta[1].answers
            for index, sample in samples.items():
                sample["output"] = answers[index] if index < len(answers) else {}
        return [samples[index] for index in sorted(samples)]


def existing(path: Path) -> Path:
    if not path.is_file():
        raise RefusalError(f"{path}: no such file")
    return path


def read_lines(argument: str) -> list[str]:
    """The sentence itself, the lines of a .txt file, or standard input for ``-``."""
    if argument == "-":
        return [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if argument.endswith(".txt") and Path(argument).is_file():
        return [line for line in Path(argument).read_text(encoding="utf-8").split("\n") if line.strip()]
    return [argument]


# ---------------------------------------------------------------------------------------------------- commands


def answer(outputs: dict[str, Array], manifest: dict[str, Any], top: int) -> dict[str, Any]:
    """What the outputs of one input mean for the task."""
    first = np.asarray(next(iter(outputs.values())), np.float64)[0]
    kind = manifest["postprocess"]["kind"]
    if kind in ("softmax", "probabilities"):
        shifted = np.exp(first - first.max()) if kind == "softmax" else first
        shares = shifted / shifted.sum() if kind == "softmax" else first
        order = np.argsort(-shares, kind="stable")[:top]
        labels = manifest["labels"]
        named = [labels[index] if index < len(labels) else str(index) for index in order.tolist()]
        return {
            "label": named[0],
            "scores": {name: float(shares[index]) for name, index in zip(named, order, strict=True)},
        }
    if kind in ("sigmoid", "independent-probabilities"):
        shares = 1 / (1 + np.exp(-first)) if kind == "sigmoid" else first
        labels = manifest["labels"]
        named = [labels[index] if index < len(labels) else str(index) for index in range(len(shares))]
        order = np.argsort(-shares, kind="stable")[:top].tolist()
        return {
            "labels": [name for name, share in zip(named, shares, strict=True) if share > 0.5],
            "scores": {named[index]: float(shares[index]) for index in order},
        }
    if kind == "embedding":
        return {"embedding": first.tolist()}
    return {"outputs": {name: np.asarray(value)[0].tolist() for name, value in outputs.items()}}


def tagged(package: Package, line: str, outputs: dict[str, Array]) -> dict[str, Any]:
    """The label of each word: that of its first token."""
    words, labels = line.split(), package.manifest["labels"]
    first = np.asarray(next(iter(outputs.values())))[0]
    classes = [int(np.argmax(first[place])) for place in package.first_tokens(words)]
    named = [labels[index] if index < len(labels) else str(index) for index in classes]
    return {"words": words[: len(named)], "tags": named}


def show(name: str, found: dict[str, Any]) -> None:
    if "tags" in found:
        print("  ".join(f"{word}/{tag}" for word, tag in zip(found["words"], found["tags"], strict=True)))
    elif "text" in found:
        print(f"{name}  ->  {found['text']}")
    elif "continuation" in found:
        print(f"{name}{found['continuation']}")
    elif "labels" in found:
        scores = "  ".join(f"{label} {100 * share:.1f} %" for label, share in found["scores"].items())
        print(f"{name}\n  {', '.join(found['labels']) or 'no label'} ({scores})")
    elif "label" in found:
        scores = "  ".join(f"{label} {100 * share:.1f} %" for label, share in found["scores"].items())
        print(f"{name}\n  {scores}")
    elif "embedding" in found:
        values = ", ".join(f"{value:+.4f}" for value in found["embedding"][:6])
        print(f"{name}\n  {len(found['embedding'])} dimensions: {values}, ...")
    else:
        shapes = ", ".join(f"{key} {np.shape(value)}" for key, value in found["outputs"].items())
        print(f"{name}\n  {shapes}; all values with --json")


def explained(
    package: Package,
    session: Any,
    given: tuple[str, dict[str, Array]],
    outputs: dict[str, Array],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """What the outputs mean for a named input; a language model goes on writing."""
    name, inputs = given
    kind = package.manifest["postprocess"]["kind"]
    text = package.manifest["preprocess"]["kind"] == "text"
    if kind == "next-token" and text:
        return package.continued(session, name, 40 if options.new_tokens is None else options.new_tokens)
    if kind == "target-text" and text:
        return package.written(session, inputs, options.new_tokens)
    if kind == "tags" and text:
        return tagged(package, name, outputs)
    return answer(outputs, package.manifest, options.top)


def run(package: Package, options: argparse.Namespace) -> int:
    package.second = options.pair
    session = package.session(options.threads, options.portable)
    names = [output.name for output in session.get_outputs()]
    answers, raw = [], []
    for argument in options.input:
        for name, inputs in package.inputs_of(argument):
            outputs = dict(zip(names, session.run(None, inputs), strict=True))
            raw.append(outputs)
            answers.append({"input": name, **explained(package, session, (name, inputs), outputs, options)})
            if not options.json:
                show(name, answers[-1])
    if options.out:
        stacked: dict[str, Any] = {name: np.concatenate([outputs[name] for outputs in raw]) for name in names}
        np.savez(options.out, **stacked)
    if options.json:
        print(json.dumps(answers, ensure_ascii=False))
    return 0


def digest(path: Path) -> str:
    state = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            state.update(block)
    return state.hexdigest()


def changed_files(folder: Path) -> list[str]:
    """Files that are not what SHA256SUMS says, or not there."""
    lines = (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("  ", 1) for line in lines]
    return [name for wanted, name in pairs if not (folder / name).is_file() or digest(folder / name) != wanted]


def self_check(package: Package, options: argparse.Namespace) -> int:
    """Files as packed, pre-processing as in training, answers as stored."""
    problems = [f"{name}: missing or changed since it was packed" for name in changed_files(package.folder)]
    worst, samples = 0.0, package.stored()
    tolerance = float(package.manifest["self_check"]["tolerance"])
    if not problems:
        session = package.session(options.threads, options.portable)
        names = [output.name for output in session.get_outputs()]
        for index, sample in enumerate(samples):
            problems += check_preprocessing(package, index, sample)
            outputs = dict(zip(names, session.run(None, sample["input"]), strict=True))
            for name, wanted in sample["output"].items():
                difference = relative_difference(outputs[name], wanted)
                worst = max(worst, difference)
                if not difference <= tolerance:
                    problems.append(f"sample {index}, {name}: differs by {difference:.3g}, accepted {tolerance:g}")
    if package.delta is not None and not any(sample["output"] for sample in samples):
        print("this delta brings no answers (it was not made from a package): only files were checked", file=sys.stderr)
    result = {"passed": not problems, "samples": len(samples), "worst": worst, "tolerance": tolerance}
    if options.json:
        print(json.dumps({**result, "problems": problems}))
    else:
        for problem in problems:
            print(problem)
        word = "passed" if not problems else "FAILED"
        print(
            f"self-check {word}: {len(samples)} samples, worst relative difference {worst:.3g} (accepted {tolerance:g})"
        )
    return 1 if problems else 0


def check_preprocessing(package: Package, index: int, sample: dict[str, dict[str, Array]]) -> list[str]:
    """The raw sample, where it is stored, must become the stored input."""
    if "raw" not in sample:
        return []
    value = sample["raw"]["value"]
    made = package.tokens(*np.atleast_1d(value).tolist()) if value.dtype.kind == "U" else package.picture(value)
    wrong = [
        name
        for name, wanted in sample["input"].items()
        if not name.startswith("decoder_")  # the stored target, which nobody gives when the model is used
        and (made[name].shape != wanted.shape or relative_difference(made[name], wanted) > 1e-5)
    ]
    return [f"sample {index}, {name}: pre-processing gives another input" for name in wrong]


def relative_difference(found: Array, wanted: Array) -> float:
    """Largest absolute difference over the largest magnitude that was wanted."""
    if found.shape != wanted.shape:
        return float("inf")
    scale = max(float(np.abs(wanted).max(initial=0.0)), 1e-12)
    difference = np.abs(np.asarray(found, np.float64) - np.asarray(wanted, np.float64))
    return float(difference.max(initial=0.0)) / scale


def benchmark(package: Package, options: argparse.Namespace) -> int:
    """p50 and p95 of single runs, after a warm-up of at least 20 runs and half a second.

    An encoder-decoder model with an input given is timed writing the whole target.
    """
    session = package.session(options.threads, options.portable)
    if options.input:
        _, inputs = next(package.inputs_of(options.input[0]))
    else:
        samples = package.stored()
        if not samples:
            raise RefusalError("this package has no stored sample; give an input to benchmark with")
        inputs = samples[0]["input"]
    writes = bool(options.input) and package.manifest["postprocess"]["kind"] == "target-text"

    def once() -> None:
        if writes:
            package.written(session, inputs, options.new_tokens)
        else:
            session.run(None, inputs)

    warm = time.perf_counter()
    runs = 0
    while runs < 20 or time.perf_counter() - warm < 0.5:
        once()
        runs += 1
    times_ms: list[float] = []
    started = time.perf_counter()
    while len(times_ms) < 50 or (time.perf_counter() - started < 3.0 and len(times_ms) < 5000):
        before = time.perf_counter()
        once()
        times_ms.append(1000 * (time.perf_counter() - before))
    p50, p95 = (float(value) for value in np.percentile(times_ms, [50, 95]))
    shapes = {name: list(value.shape) for name, value in inputs.items()}
    result = {
        "p50_ms": p50,
        "p95_ms": p95,
        "mean_ms": float(np.mean(times_ms)),
        "runs": len(times_ms),
        "inputs": shapes,
    }
    if options.json:
        print(json.dumps(result))
    else:
        print(f"p50 {p50:.3f} ms, p95 {p95:.3f} ms, {len(times_ms)} runs with inputs {shapes}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "input", nargs="*", help="pictures, sentences, .txt, .npy or .npz files; - reads standard input"
    )
    parser.add_argument("--self-check", action="store_true", help="verify files and answers")
    parser.add_argument("--benchmark", action="store_true", help="measure latency on this device")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--top", type=int, default=5, help="how many classes to show (default: 5)")
    parser.add_argument("--pair", help="the second text of models that take two")
    parser.add_argument("--new-tokens", type=int, help="how many tokens a language model writes at most (40)")
    parser.add_argument("--threads", type=int, help="threads (default: those of the measurement)")
    parser.add_argument(
        "--portable", action="store_true", help="run the portable ONNX file beside a device's own format"
    )
    parser.add_argument("--delta", type=Path, help="an update of the model's weights, applied in memory")
    parser.add_argument("--out", help="write the bare outputs of all inputs to this .npz")
    options = parser.parse_args(arguments)
    if not (options.input or options.self_check or options.benchmark):
        parser.error("give an input, --self-check or --benchmark")
    return options


def main(arguments: Sequence[str] | None = None, folder: Path = HERE) -> int:
    options = parse(arguments)
    try:
        package = Package(folder, options.delta)
        command = self_check if options.self_check else benchmark if options.benchmark else run
        return command(package, options)
    except (RefusalError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
