"""The command line; see the package."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import tools.bench_methods as package
from tools.bench_methods import page


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=package.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW")
    parser.add_argument("--seeds", type=int, default=5, choices=range(2, 11))
    parser.add_argument("--work", type=Path, default=Path("build/methods"))
    parser.add_argument("--out", type=Path, help="a Markdown page; the standard output when left out")
    parser.add_argument("--stored", action="store_true", help="train nothing: only rows whose scores are there")
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    known = page.rows()
    if arguments.list:
        print(
            "\n".join(f"{name:24s} {'robust' if row.robust else '      '}  {row.claim}" for name, row in known.items())
        )
        return
    if unknown := set(arguments.rows) - set(known):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; see --list")
    torch.set_num_threads(1)
    text = page.page(arguments.rows or list(known), arguments.seeds, arguments.work, stored=arguments.stored)
    if arguments.out:
        arguments.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
