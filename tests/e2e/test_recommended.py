"""The proposed recipe runs on the digits demo, here with a second teacher, and its report says what was checked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from compressor.recommend import facts_of, recommend
from tests.e2e.conftest import ROOT, environment

pytestmark = [pytest.mark.train, pytest.mark.slow]


def test_the_proposal_runs_with_two_teachers(tmp_path: Path) -> None:
    proposal = recommend(facts_of("image-classification", 10, 1200, 0, "cnn", ("this-machine",)))
    recipe = tmp_path / "recommended.toml"
    recipe.write_text(proposal.text)
    words = ["--model", "examples.digits.model:teacher", "--data", "examples.digits:load"]
    words += ["--teacher", "second=examples.digits.model:teacher", "--out", str(tmp_path / "build"), "--json"]
    command = [sys.executable, "-m", "compressor.cli", "run", str(recipe), *words]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode in (0, 3), done.stdout + done.stderr
    report = json.loads(done.stdout)["report"]
    assert [teacher["name"] for teacher in report["teachers"]] == ["main", "second"]
    checks = {finding["check"]: finding for finding in report["integrity"]}
    assert {"contamination, equal samples", "canary", "power"} <= set(checks)
    assert any(name.startswith("teacher hacking") for name in checks)
    manifest = next((tmp_path / "build").rglob("manifest.json"))
    assert len(json.loads(manifest.read_text())["teachers"]) == 2
