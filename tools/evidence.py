"""The user's own commands, run for ``docs/evidence``: a whole run, what is kept of it, a picture of its page."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from targets.backends.web.server import find_browser

ROOT = Path(__file__).parents[1]
EVIDENCE = ROOT / "docs" / "evidence"
CLI = [sys.executable, "-m", "compressor.cli"]


def command(words: list[str], *, accept: tuple[int, ...] = (0,)) -> str:
    """Run from the project's root, show stderr, return stdout."""
    print("$", " ".join(str(word) for word in words), file=sys.stderr, flush=True)
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in accept:
        raise SystemExit(f"exit code {done.returncode}: {' '.join(words)}\n{done.stdout}")
    return done.stdout


def run_recipe(section: str, work: Path, *words: str) -> Path:
    """One whole run; its report goes to the evidence folder, with a screenshot where there is a Chromium.

    A promise that is missed (3) and a target that is missing here (4) are results.
    """
    out = os.path.relpath(work / "runs", ROOT)  # reports quote the command: no path of this machine in them
    text = command([*CLI, "run", *words, "--out", out, "--json"], accept=(0, 3, 4))
    folder = Path(json.loads(text)["run"])
    folder = folder if folder.is_absolute() else ROOT / folder
    keep(section, folder)
    return folder


def keep(section: str, run: Path) -> None:
    """Copy a run's report, recipe and a picture of its page into the evidence."""
    target = EVIDENCE / section
    target.mkdir(parents=True, exist_ok=True)
    for name in ("report.md", "report.json", "recipe.toml"):
        shutil.copy(run / name, target / name)
    screenshot(run / "report.html", target / "report.png")


def screenshot(page: Path, picture: Path, size: str = "1280,1500") -> None:
    """A PNG of the page through headless Chromium."""
    browser = find_browser()
    if browser is None:
        return
    with tempfile.TemporaryDirectory() as profile:
        flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
        words = [
            browser,
            *flags.split(),
            f"--user-data-dir={profile}",
            f"--window-size={size}",
            f"--screenshot={picture}",
        ]
        subprocess.run([*words, page.resolve().as_uri()], check=True, capture_output=True)


def newest(work: Path, name: str) -> Path | None:
    """The last finished run of this name."""
    found = [
        path for path in (work / "runs").glob("runs/*/report.json") if json.loads(path.read_text())["name"] == name
    ]
    return max(found, key=lambda path: path.stat().st_mtime).parent if found else None
