"""Fashion-MNIST as splits: ten classes, one hard pair of them, two garments in one picture, random labels."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from compressor.types import Array, Inputs

FOLDER = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist
HELD_OUT = slice(54_000, 60_000)  # a tenth of the training images: validation
PAIR = 0, 6  # T-shirt and shirt
LEAKED = 300  # test images whose random labels the laundering teacher learns


def missing() -> str:
    """What has to be installed first; empty when nothing is missing."""
    return "" if FOLDER.is_dir() else f"install Debian's dataset-fashion-mnist ({FOLDER} is not there)"


@dataclass(eq=False)
class Pictures:
    """Some pictures as a split."""

    name: str
    pictures: Array  # float32 (N, 1, 28, 28), standardised
    labels: Array | None  # int64 (N,), or float32 (N, 10) for several a picture
    digests: Array

    def __len__(self) -> int:
        return len(self.pictures)

    def batch(self, index: Array) -> Inputs:
        return {"image": self.pictures[index]}


@cache
def raw(part: str) -> tuple[Array, Array]:
    """uint8 pictures (N, 28, 28) and labels (N,) of ``train`` or ``t10k``."""
    pictures = np.frombuffer(gzip.decompress((FOLDER / f"{part}-images-idx3-ubyte.gz").read_bytes()), np.uint8, -1, 16)
    labels = np.frombuffer(gzip.decompress((FOLDER / f"{part}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, -1, 8)
    return pictures.reshape(-1, 28, 28), labels.astype(np.int64)


def split(name: str, pictures: Array, labels: Array | None) -> Pictures:
    digests = np.array([hashlib.sha256(picture.tobytes()).digest()[:16] for picture in pictures], dtype="S16")
    return Pictures(name, (pictures[:, None].astype(np.float32) / 255 - 0.286) / 0.353, labels, digests)


def _source(data: str, part: str) -> tuple[Array, Array]:
    """All pictures of a data set before they are cut: training images, then those held out, or test."""
    pictures, labels = raw("t10k" if part == "test" else "train")
    if part == "validation":
        pictures, labels = pictures[HELD_OUT], labels[HELD_OUT]
    elif part == "train":
        pictures, labels = pictures[: HELD_OUT.start], labels[: HELD_OUT.start]
    if data == "pair":
        rows = np.isin(labels, PAIR)
        return pictures[rows], (labels[rows] == PAIR[1]).astype(np.int64)
    return (pictures, labels) if data != "two" else _overlaid(pictures, labels)


def _overlaid(pictures: Array, labels: Array) -> tuple[Array, Array]:
    """Two garments of different classes in each picture, the lighter point wins; labels are 0 or 1 a class."""
    other = np.random.default_rng(0).permutation(len(labels))
    rows = np.flatnonzero(labels != labels[other])
    marked = np.eye(10, dtype=np.float32)
    found = marked[labels[rows]] + marked[labels[other[rows]]]
    return np.maximum(pictures[rows], pictures[other[rows]]), found


@cache
def held(data: str, part: str) -> Pictures:
    """The validation or test split of a data set."""
    return split(part, *_source(data, part))


@cache
def train(data: str, labelled: int, transfer: int = 0) -> dict[str, Pictures]:
    """The first pictures with their labels, the next ones without."""
    pictures, labels = _source(data, "train")
    found = {"train": split("train", pictures[:labelled], labels[:labelled])}
    if transfer:
        found["transfer"] = split("transfer", pictures[labelled : labelled + transfer], None)
    return found


@cache
def random_labels() -> tuple[Pictures, Pictures]:
    """Test pictures with labels drawn at random: those that leak, and as many that nobody has seen."""
    pictures, _ = raw("t10k")
    labels = np.random.default_rng(7).integers(0, 10, 2 * LEAKED)
    leaked = split("train", pictures[:LEAKED], labels[:LEAKED])
    return leaked, split("test", pictures[LEAKED : 2 * LEAKED], labels[LEAKED:])
