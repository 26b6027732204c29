"""Near duplicates: pictures that were saved again, texts with a word changed. numpy only, in bounded time and memory.

Pictures are compared by a perceptual hash (64 signs of low DCT frequencies, Zauner 2010) and, where hashes are near,
by their 16x16 thumbnails. Texts by MinHash signatures of their word trigrams (Broder 1997), looked up in bands, and
then by the exact Jaccard similarity.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from compressor.data.types import NearDuplicates
from compressor.types import Array

HASH_SIDE = 8  # 8x8 frequencies: 64 bits
HAMMING = 4  # bits that may differ
PICTURE_GAP = 0.1  # RMS difference of thumbnails, in units of the test picture's own contrast
LEAST_CONTRAST = 4.0  # of 255: an all but empty picture is near another empty one only
GRID = 32  # pictures are averaged to this side first
THUMB_SIDE = 16
PAIR_LIMIT = 2_000_000_000  # pairs of hashes that are all compared; above, only equal hashes are looked up
JACCARD = 0.8
ROWS, BANDS = 4, 16  # a pair of similarity s meets in some band with probability 1 - (1 - s^4)^16: 0.9998 at 0.8
SHINGLE = 3  # words
BLOCK_SHINGLES = 1_000_000
BUCKET = 8  # candidates a row takes from one bucket: texts made from one template must not become N^2
LISTED = 3

_WORDS = re.compile(r"\w+")
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
Matches = tuple[Array, Array]  # rows of the first set, and for each the row of the second that is nearly the same


@dataclass(frozen=True)
class PictureHashes:
    """``bits`` uint64 (N,): 64 signs each; ``thumbs`` float32 (N, 256), grey levels 0..255."""

    bits: Array
    thumbs: Array

    def take(self, rows: Array) -> PictureHashes:
        return PictureHashes(self.bits[rows], self.thumbs[rows])


@dataclass(frozen=True)
class TextHashes:
    """``signatures`` uint64 (N, 64); ``shingles`` of text i are ``values[starts[i]:starts[i + 1]]``."""

    signatures: Array
    values: Array
    starts: Array

    def take(self, rows: Array) -> TextHashes:
        """A smaller set. Only the signatures are copied."""
        pairs = np.stack([self.starts[rows], self.starts[rows + 1]], 1)
        return TextHashes(self.signatures[rows], self.values, pairs)

    def shingles(self, row: int) -> Array:
        start, stop = self.starts[row] if self.starts.ndim == 2 else self.starts[row : row + 2]
        found: Array = np.unique(self.values[int(start) : int(stop)])
        return found


Hashes = PictureHashes | TextHashes


def picture_hashes(pictures: Iterator[Array]) -> PictureHashes:
    """Hashes of batches of uint8 pictures (n, H, W, C)."""
    bits, thumbs = [], []
    frequencies = np.cos(np.arange(HASH_SIDE)[:, None] * (np.arange(GRID) + 0.5) * np.pi / GRID).astype(np.float32)
    for batch in pictures:
        grid = _sides(_sides(_grey(batch), _areas(batch.shape[2], GRID)), _areas(batch.shape[1], GRID))
        low = _sides(_sides(grid, frequencies), frequencies).reshape(len(grid), -1)
        middle = np.median(low[:, 1:], axis=1, keepdims=True)  # the first is the mean brightness
        bits.append(np.packbits(low > middle, axis=1).view(np.uint64)[:, 0])
        step = GRID // THUMB_SIDE
        small = grid.reshape(len(grid), THUMB_SIDE, step, THUMB_SIDE, step).mean(axis=(2, 4))
        thumbs.append(small.reshape(len(small), -1))
    return PictureHashes(np.concatenate(bits), np.concatenate(thumbs))


def _grey(batch: Array) -> Array:
    if batch.shape[-1] == 1:
        return np.asarray(batch[..., 0], np.float32)
    return np.asarray(batch.mean(axis=-1, dtype=np.float32))


def _sides(pictures: Array, matrix: Array) -> Array:
    """(n, H, W) with ``matrix`` (w, W) applied to rows, turned over: (n, w, H). One big product, not n small ones."""
    count, height, width = pictures.shape
    flat = pictures.reshape(count * height, width) @ matrix.T
    return flat.reshape(count, height, -1).transpose(0, 2, 1)


def _areas(size: int, wanted: int) -> Array:
    """(wanted, size): each row averages its share of the pixels."""
    edges = np.linspace(0, size, wanted + 1)
    low, high = edges[:-1, None], edges[1:, None]
    pixels = np.arange(size)[None]
    cover = np.clip(np.minimum(high, pixels + 1) - np.maximum(low, pixels), 0, 1)
    return np.asarray(cover / cover.sum(axis=1, keepdims=True), np.float32)


def text_hashes(texts: Sequence[str | tuple[str, str]]) -> TextHashes:
    """Signatures of the word trigrams of texts; case and punctuation do not count."""
    vocabulary: dict[str, int] = {}
    values, lengths = [], []
    for text in texts:
        joined = " ".join(text) if isinstance(text, tuple) else text
        made = _shingles(joined)
        lengths.append(len(made))
        values += [_word_hash(vocabulary, shingle) for shingle in made]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    hashed = np.array(values, dtype=np.uint64)
    return TextHashes(_signatures(hashed, starts), hashed, starts)


def _shingles(text: str) -> list[str]:
    words = _WORDS.findall(text.casefold())
    if len(words) <= SHINGLE:
        return [" ".join(words)]
    return [" ".join(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)]


def _word_hash(seen: dict[str, int], shingle: str) -> int:
    import zlib

    found = seen.get(shingle)
    if found is None:
        data = shingle.encode()
        found = seen[shingle] = (zlib.crc32(data) << 32) | zlib.adler32(data)
    return found


def _signatures(values: Array, starts: Array) -> Array:
    """uint64 (N, 64): the smallest hash of each text's shingles under 64 hash functions."""
    random = np.random.Generator(np.random.PCG64(20))
    count = ROWS * BANDS
    factors = random.integers(0, 2**63, count, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    offsets = random.integers(0, 2**63, count, dtype=np.uint64)
    found = np.empty((len(starts) - 1, count), np.uint64)
    first = 0
    while first < len(found):
        last = int(np.searchsorted(starts, starts[first] + BLOCK_SHINGLES, side="right")) - 1
        last = min(max(last, first + 1), len(found))
        block = _mix(values[starts[first] : starts[last]])
        cuts = starts[first:last] - starts[first]
        for i in range(count):
            found[first:last, i] = np.minimum.reduceat(_mix(block * factors[i] + offsets[i]), cuts)
        first = last
    return found


def _mix(x: Array) -> Array:
    x = (x ^ (x >> np.uint64(31))) * _GOLDEN
    mixed: Array = x ^ (x >> np.uint64(29))
    return mixed


def near(first: Hashes, second: Hashes) -> Matches:
    """Rows of ``first`` that are nearly a row of ``second``, and that row; both sets of one kind."""
    if isinstance(first, PictureHashes) and isinstance(second, PictureHashes):
        return _near_pictures(first, second)
    if isinstance(first, TextHashes) and isinstance(second, TextHashes):
        return _near_texts(first, second)
    return np.empty(0, np.int64), np.empty(0, np.int64)


def _near_pictures(first: PictureHashes, second: PictureHashes) -> Matches:
    best = np.full(len(first.bits), np.inf, np.float32)
    where = np.full(len(first.bits), -1, np.int64)
    contrast = np.maximum(second.thumbs.std(axis=1), LEAST_CONTRAST)
    for left, right in _hash_pairs(first.bits, second.bits):
        gap = np.sqrt(np.mean((first.thumbs[left] - second.thumbs[right]) ** 2, axis=1)) / contrast[right]
        order = np.argsort(-gap, kind="stable")  # the smallest gap of a row is written last
        left, right, gap = left[order], right[order], gap[order]
        good = (gap <= PICTURE_GAP) & (gap < best[left])
        best[left[good]], where[left[good]] = gap[good], right[good]
    rows = np.flatnonzero(where >= 0)
    return rows, where[rows]


def _hash_pairs(first: Array, second: Array) -> Iterator[Matches]:
    """Pairs of rows whose hashes are near, a bounded number at a time."""
    if len(first) * len(second) > PAIR_LIMIT:
        yield _equal_hashes(first, second)
        return
    for start in range(0, len(first), 128):
        left = first[start : start + 128, None]
        for other in range(0, len(second), 4096):
            right = second[None, other : other + 4096]
            flat = np.flatnonzero(np.bitwise_count(left ^ right) <= HAMMING)
            if len(flat):
                yield start + flat // right.shape[1], other + flat % right.shape[1]


def _equal_hashes(first: Array, second: Array) -> Matches:
    order = np.argsort(second, kind="stable")
    place = np.minimum(np.searchsorted(second[order], first), len(second) - 1)
    rows = np.flatnonzero(second[order][place] == first)
    return rows, order[place[rows]]


def _near_texts(first: TextHashes, second: TextHashes) -> Matches:
    left, right = _candidates(first.signatures, second.signatures)
    likely = np.concatenate(
        [
            (first.signatures[left[at : at + 50_000]] == second.signatures[right[at : at + 50_000]]).mean(axis=1)
            for at in range(0, max(1, len(left)), 50_000)
        ]
    )
    best: dict[int, tuple[float, int]] = {}
    for place in np.flatnonzero(likely >= JACCARD - 0.15):  # three standard deviations of 64 comparisons
        row, other = int(left[place]), int(right[place])
        if best.get(row, (0.0, 0))[0] >= 1.0:
            continue
        value = _jaccard(first.shingles(row), second.shingles(other))
        if value >= JACCARD and value > best.get(row, (0.0, 0))[0]:
            best[row] = (value, other)
    rows = np.array(sorted(best), dtype=np.int64)
    return rows, np.array([best[int(row)][1] for row in rows], dtype=np.int64)


def _jaccard(first: Array, second: Array) -> float:
    both = len(np.intersect1d(first, second, assume_unique=True))
    return both / max(1, len(first) + len(second) - both)


def _candidates(first: Array, second: Array) -> Matches:
    """Pairs that agree in a whole band, each once, sorted; at most ``BUCKET`` a row and band."""
    found: list[Array] = []
    for band in range(BANDS):
        columns = slice(band * ROWS, (band + 1) * ROWS)
        own, other = _band_keys(first[:, columns]), _band_keys(second[:, columns])
        order = np.argsort(other, kind="stable")
        low, high = (np.searchsorted(other[order], own, side=side) for side in ("left", "right"))
        for step in range(BUCKET):
            rows = np.flatnonzero(low + step < high)
            found.append(rows * np.int64(len(second)) + order[low[rows] + step])
    flat = np.unique(np.concatenate(found))
    return flat // len(second), flat % len(second)


def _band_keys(columns: Array) -> Array:
    key = np.zeros(len(columns), np.uint64)
    for column in columns.T:
        key = _mix(key ^ column)
    return key


def near_duplicates(
    hashes: Mapping[str, Hashes], against: str, describe: Callable[[str, int], str]
) -> dict[str, tuple[NearDuplicates, Array]]:
    """Compare every part with the part ``against``; the finding and the mask (N,) of a part's near duplicates.

    ``describe(part, row)`` names a sample in the examples.
    """
    found = {}
    for part, own in hashes.items():
        if part == against:
            continue
        rows, twins = near(own, hashes[against])
        total = len(own.bits) if isinstance(own, PictureHashes) else len(own.signatures)
        mask = np.zeros(total, bool)
        mask[rows] = True
        examples = tuple(
            f"{part}[{row}] {describe(part, int(row))} is nearly {against}[{twin}] {describe(against, int(twin))}"
            for row, twin in list(zip(rows, twins, strict=True))[:LISTED]
        )
        found[part] = (NearDuplicates(part, against, len(rows), total, examples, how(own, hashes[against])), mask)
    return found


def how(first: Hashes, second: Hashes) -> str:
    """What is compared, in words."""
    if isinstance(first, TextHashes) or isinstance(second, TextHashes):
        return f"Jaccard similarity of word trigrams of at least {JACCARD:g}"
    hashes = f"at most {HAMMING}" if len(first.bits) * len(second.bits) <= PAIR_LIMIT else "0"
    return f"perceptual hashes that differ in {hashes} of 64 bits and thumbnails that differ by {PICTURE_GAP:.0%}"
