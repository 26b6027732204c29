"""The README's commands are executed, its links exist, and generated pages are fresh."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, environment

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
OURS = [line for line in COMMANDS if line.startswith("compress-for-device")]
CHEAP = [line for line in OURS if line.split()[1] in {"plan", "targets", "profiles", "methods", "doctor"}]


def run(line: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "compressor.cli", *shlex.split(line)[1:]]
    return subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=600)


@pytest.mark.train
@pytest.mark.parametrize("line", CHEAP)
def test_a_command_of_the_readme_works(line: str) -> None:
    done = run(line)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("line", [line for line in OURS if line not in CHEAP])
def test_a_long_command_of_the_readme_is_spelt_right(line: str) -> None:
    """Every option of a command that would need the reader's own files is known to the command."""
    command = " ".join(takewhile(lambda word: word.isalpha() and word.islower(), line.split()[1:]))
    known = run(f"compress-for-device {command} --help").stdout
    for word in shlex.split(line)[2:]:
        if word.startswith("--"):
            assert word in known, f"{word} in `{line}`"


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *[f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")]]
)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for line in COMMANDS:
        if line.startswith("make "):
            assert re.search(rf"^{line.split()[1]}:", makefile, flags=re.MULTILINE), line


@pytest.mark.parametrize("module", ["tools.generate_docs", "tools.generate_schema"])
def test_generated_files_are_fresh(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--check"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_page_claims_what_is_not_there() -> None:
    """Folders and files in the README's code map exist."""
    for folder in re.findall(r"^\| `([a-z_]+)/` \|", README, flags=re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder
    assert Path(ROOT / "LICENSE").is_file()
