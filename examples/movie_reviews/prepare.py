"""Make ``train.csv``, ``test.csv`` and ``transfer.csv`` from the rated sentences in vaderSentiment's source (MIT).

    python -m examples.movie_reviews.prepare --out build/movie-reviews

Sentences come from movie reviews, each rated from -4 to 4 by about twenty people (Hutto and Gilbert, ICWSM 2014). The
task is binary: mean rating >= 0.3 is ``positive``, <= -0.3 is ``negative``. A random fifth is the test set; texts that
occur twice are kept once. ``transfer.csv`` holds unlabelled text for distillation: movie sentences with a neutral
rating, and the archive's product reviews, tweets and editorials.
"""

from __future__ import annotations

import argparse
import csv
import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

PACKAGE = "vaderSentiment==3.3.2"
SOURCES = ("movieReviewSnippets", "amazonReviewSnippets", "tweets", "nytEditorialSnippets")
NEUTRAL = 0.3


def download(folder: Path) -> Path:
    """Fetch the package's source archive with pip (the wheel lacks the data)."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary",
        ":all:",
        "--dest",
        str(folder),
    ]
    subprocess.run([*command, PACKAGE], check=True)
    return next(folder.glob("vader*.tar.gz"))


def ratings(archive: Path, source: str) -> Iterator[tuple[str, float]]:
    """(text, mean rating) of one source; only the two wanted members of the archives are read, nothing is unpacked."""
    with tarfile.open(archive) as outer:
        name = next(item.name for item in outer.getmembers() if item.name.endswith("hutto_ICWSM_2014.tar.gz"))
        inner_file = outer.extractfile(name)
        assert inner_file is not None
        inner_bytes = io.BytesIO(inner_file.read())
    with tarfile.open(fileobj=inner_bytes) as inner:
        member = next(item for item in inner.getmembers() if item.name.endswith(f"{source}_GroundTruth.txt"))
        stream = inner.extractfile(member)
        assert stream is not None
        for line in stream.read().decode("utf-8", errors="replace").splitlines():
            _, rating, text = line.split("\t", 2)
            yield " ".join(text.replace("''", '"').split()), float(rating)


def write(path: Path, header: list[str], rows: list[list[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows(rows)
    print(f"{path}: {len(rows)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/movie-reviews"))
    parser.add_argument("--archive", type=Path, help="the source archive, when it is already here")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory() as folder:
        archive = args.archive or download(Path(folder))
        texts = {source: list(ratings(archive, source)) for source in SOURCES}
    unique = {text.casefold(): (text, rating) for text, rating in reversed(texts["movieReviewSnippets"])}
    movies = list(reversed(unique.values()))
    rated = [(text, rating) for text, rating in movies if abs(rating) >= NEUTRAL]
    order = np.random.Generator(np.random.PCG64(args.seed)).permutation(len(rated))
    cut = len(rated) // 5
    labelled = [[text, "positive" if rating > 0 else "negative", round(rating, 4)] for text, rating in rated]
    write(args.out / "test.csv", ["text", "label", "rating"], [labelled[i] for i in sorted(order[:cut])])
    write(args.out / "train.csv", ["text", "label", "rating"], [labelled[i] for i in sorted(order[cut:])])
    others = [(text, rating) for text, rating in movies if abs(rating) < NEUTRAL]
    others += [pair for source in SOURCES[1:] for pair in texts[source]]
    extra = {
        text.casefold(): [text, round(rating, 4)]
        for text, rating in others
        if text.casefold() not in unique or abs(rating) < NEUTRAL
    }
    write(args.out / "transfer.csv", ["text", "rating"], list(extra.values()))


if __name__ == "__main__":
    main()
